"""The files of launch/: the batch file in a Slurm of this test's own, the JobSet by a schema."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gothic_jax.checkpoints import checkpoint
from gothic_jax.machine.hosts import Place, find_place
from tests.common import Workplace

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Slurm of one node, this machine; gives the environment that its commands need."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch", "srun"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{program} is not here: apt-get install slurmctld slurmd slurm-client")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs only as root")
    folder = tmp_path / "slurm"
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""
    )
    environment = os.environ | {
        "SLURM_CONF": str(configuration),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    munged = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in
              ("pid-file", "log-file", "seed-file")]  # fmt: skip
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock",
         f"--key-file={key}", *munged],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]  # fmt: skip
    started = []
    try:
        for daemon in daemons:
            log = (folder / f"{daemon[0]}.out").open("w")
            started.append(subprocess.Popen(daemon, env=environment, stdout=log, stderr=log))
            log.close()
            while daemon[0] == "munged" and not (folder / "munge.sock").exists():
                assert started[0].poll() is None, (folder / "munged.out").read_text()
                time.sleep(0.05)
        asked = ["sinfo", "--noheader", "--format=%T"]
        for _ in range(300):
            state = subprocess.run(asked, env=environment, capture_output=True, text=True)
            if state.stdout.strip() == "idle":
                break
            time.sleep(0.1)
        else:
            raise AssertionError("".join(log.read_text() for log in folder.glob("*.out")))
        yield environment
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            daemon.wait(30)


@pytest.mark.long
def test_the_batch_file_trains_in_two_tasks(workplace: Workplace, slurm: dict[str, str]) -> None:
    program = workplace.root / "gothic-train"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gothic_jax.commands.train "$@"\n')
    program.chmod(0o755)
    environment = {name: value for name, value in slurm.items() if name != "XLA_FLAGS"}
    environment |= {"GOTHIC_TRAIN": str(program), "GLIBC_TUNABLES": ""}
    environment["PYTHONPATH"] = str(LAUNCH.parent)
    output = workplace.root / "job.out"
    place = ["--nodes=1", "--ntasks-per-node=2", "--wait", f"--output={output}"]
    job = ["sbatch", *place, str(LAUNCH / "slurm.sbatch"), *workplace.arguments()]
    done = subprocess.run(job, env=environment, cwd=workplace.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + output.read_text()
    assert "0: device: 2 x cpu in 2 processes" in output.read_text()
    assert checkpoint.locate(f"{workplace.out_dir}/latest").iteration == 6


def jobset() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not here")
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_each_pod_of_the_jobset_finds_its_place() -> None:
    whole = jobset()
    (group,) = whole["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    # Kubernetes takes this from the pod's annotation.
    annotation = "batch.kubernetes.io/job-completion-index"
    source = container["env"][-1]["valueFrom"]["fieldRef"]["fieldPath"]
    assert re.fullmatch(r"metadata\.annotations\['(.*)'\]", source)[1] == annotation
    # JobSet's name of a pod: that of the set, of the group, of the job in it, of the pod in that.
    names = whole["metadata"]["name"], group["name"], whole["spec"]["network"]["subdomain"]
    first = "{}-{}-0-0.{}".format(*names)
    for index in range(job["parallelism"]):
        environment["JAX_PROCESS_ID"] = str(index)
        place = find_place("", environment)
        assert place == Place(f"{first}:7000", job["parallelism"], index)


def test_the_job_within_the_jobset_is_as_kubernetes_takes_it() -> None:
    reason = "kubernetes-validate is not here: pip install kubernetes-validate"
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=reason)
    whole = jobset()
    template = whole["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}} | template
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
