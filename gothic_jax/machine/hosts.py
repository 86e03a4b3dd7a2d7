"""Which of a run's processes this one is, as the setting or the program that started it says.

Nothing here needs JAX: only the first process locks the run's folder, before the slow imports.
"""

import dataclasses
import re
from collections.abc import Mapping

from gothic_jax.errors import UserError

OFF = "off"
"""As the setting: a run of its own, even where a launcher starts several processes."""
_FORM = "HOST:PORT,COUNT,INDEX, as node1:7000,2,0"


@dataclasses.dataclass(frozen=True)
class Place:
    """One of a run's processes among the others."""

    coordinator: str
    """HOST:PORT at which the first process awaits the others."""
    count: int
    index: int
    device: int | None = None
    """The one device of its host that it takes, where others of the run take the rest."""


def find_place(setting: str, environment: Mapping[str, str]) -> Place | None:
    """The place of this process, or None where it is the only one. Raises UserError.

    `setting` is HOST:PORT,COUNT,INDEX. Where it is empty, the environment decides: JAX's
    variables, or else those that Slurm's srun, Open MPI's mpirun or a Kubernetes Job set. The
    addresses are those that JAX's own detection forms of them.
    """
    if setting == OFF:
        return None
    place = _of_setting(setting) if setting else _of_environment(environment)
    if place is None or place.count == 1:
        return None
    if not 0 <= place.index < place.count:
        raise UserError(
            f"a run of {place.count} processes has those from 0 to {place.count - 1}, and this is"
            f" to be {place.index}; give each its own index"
        )
    if not re.fullmatch(r".+:[0-9]{1,5}", place.coordinator):
        raise UserError(
            f"the first process's address must be HOST:PORT, and is {place.coordinator!r}; give it"
            " as --config.distributed or JAX_COORDINATOR_ADDRESS has it"
        )
    return place


def _of_setting(setting: str) -> Place:
    parts = setting.split(",")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts[1:]) or parts[1] == "0":
        raise UserError(f"distributed must be {_FORM}, or {OFF}, and is {setting!r}")
    return Place(parts[0], int(parts[1]), int(parts[2]))


def _of_environment(environment: Mapping[str, str]) -> Place | None:
    address = environment.get("JAX_COORDINATOR_ADDRESS", "")
    port = environment.get("JAX_COORDINATOR_PORT", "")
    if "JAX_NUM_PROCESSES" in environment:
        index = "JAX_PROCESS_ID"
        if index not in environment and "JOB_COMPLETION_INDEX" in environment:
            index = "JOB_COMPLETION_INDEX"  # Kubernetes sets it in each pod of an indexed Job
        return Place(
            _required(environment, "JAX_COORDINATOR_ADDRESS"),
            _number(environment, "JAX_NUM_PROCESSES"),
            _number(environment, index),
        )
    # Slurm sets the step's nodes for what srun starts, not for a batch file itself.
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
        count = _number(environment, "SLURM_NTASKS")
        return Place(
            address or _slurm_address(environment, port),
            count,
            _number(environment, "SLURM_PROCID"),
            None
            if environment.get("SLURM_STEP_NUM_NODES") == str(count)
            else _number(environment, "SLURM_LOCALID"),
        )
    if "OMPI_COMM_WORLD_SIZE" in environment:
        count = _number(environment, "OMPI_COMM_WORLD_SIZE")
        return Place(
            address or (_open_mpi_address(environment, port) if count > 1 else ""),
            count,
            _number(environment, "OMPI_COMM_WORLD_RANK"),
            None
            if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
            else _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        )
    if address:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set without JAX_NUM_PROCESSES and JAX_PROCESS_ID; set"
            " these, too, or none of them"
        )
    return None


def _slurm_address(environment: Mapping[str, str], port: str) -> str:
    """The first of the step's hosts, of `node3`, `a1,b2` or `node[003-010,12]`."""
    listed = environment["SLURM_STEP_NODELIST"]
    prefix, first = re.match(r"([^,\[]*)(?:\[([^,\-\]]*))?", listed).groups("")  # type: ignore[union-attr]
    return f"{prefix}{first}:{port or _port_of(_number(environment, 'SLURM_JOB_ID'))}"


def _open_mpi_address(environment: Mapping[str, str], port: str) -> str:
    """The host of mpirun, as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 has it."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if found is None:
        raise UserError(
            "this mpirun does not say on which host the first process is; set"
            " JAX_COORDINATOR_ADDRESS=HOST:PORT for all (mpirun -x JAX_COORDINATOR_ADDRESS=...)"
        )
    return f"{found[2] or found[3]}:{port or _port_of(int(found[1]) // 2**12)}"


def _port_of(job: int) -> int:
    """A port for a job, among the last 4,096."""
    return job % 2**12 + 2**16 - 2**12


def _required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(f"this process is to be one of several, and {name} is not set; set it, too")
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    value = _required(environment, name)
    if not value.isdecimal():
        raise UserError(f"{name} must be a number, and is {value!r}")
    return int(value)
