"""The devices of this machine: which to use, how fast they can be, how much memory they use."""

import contextlib
import functools
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gothic_jax.errors import UserError

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 4080 SUPER": 104.4e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 matrix peak with f32 sums, by a part of the device's name; NVIDIA's data sheets
and architecture white papers. The longest name that fits counts."""


def select_device(name: str) -> jax.Device:
    """Makes `auto`, `cpu` or `cuda` the default device; raises UserError where it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, not {name}")
    try:
        device = jax.devices(None if name == "auto" else name)[0]
    except RuntimeError as error:
        raise UserError(
            f'--device {name}: JAX finds none; `pip install "jax[cuda12]"` on a machine with an'
            " NVIDIA GPU, or leave --device out"
        ) from error
    jax.config.update("jax_default_device", device)
    return device


def default_device() -> jax.Device:
    """What `select_device` chose; before that, JAX's own default."""
    # JAX before 0.12 does not declare the attribute to type checkers.
    chosen: jax.Device | None = jax.config.jax_default_device  # type: ignore[attr-defined, unused-ignore]
    return chosen or jax.devices()[0]


def peak_flops(device: jax.Device) -> float | None:
    """The device's bf16 peak in FLOP/s, or None where it is not known."""
    if "Laptop" in device.device_kind:
        return None  # other chips under the same names
    fits = [name for name in PEAK_BF16_FLOPS if name in device.device_kind]
    return PEAK_BF16_FLOPS[max(fits, key=len)] if fits else None


def memory_peak(device: jax.Device) -> int:
    """Peak bytes of the device's memory in use so far; on a CPU, of this process."""
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decoding_dtype(device: jax.Device) -> str:
    """The type of weights and activations in which a model writes fastest on a device.

    bfloat16, of which a token reads half as many bytes; float32 on a CPU without AMX, for which
    XLA has no fast product of one row in bfloat16 (docs/performance.md has both measured).
    """
    if device.platform == "cpu" and "amx_bf16" not in cpu_flags():
        return "float32"
    return "bfloat16"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; nothing where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def put(tree: Any, shardings: Any) -> Any:
    """As `jax.device_put`, also onto devices of other processes, which all put the same.

    `shardings` is a sharding for all arrays, a tree of one for each, or None.
    """
    if all(each.is_fully_addressable for each in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)

    def parts(leaf: Any, sharding: Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(parts, tree, jax.tree.broadcast(shardings, tree))


def read_by_all(sharding: Sharding | None) -> Sharding | None:
    """How to lay out what each process is to read of a result computed on these devices.

    None, which leaves it to the compiler, where one process has them all.
    """
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec())


def tree_bytes(tree: Any) -> int:
    """The bytes of all arrays in a tree, be they there or only described."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def refuse_beyond_memory(
    device: jax.Device, n_bytes: int, what: str, cure: str = "use a smaller model"
) -> None:
    """Raises UserError where `what` cannot fit into this machine's memory, before it is tried.

    Linux grants more memory than it has, and kills the process that then uses it. The memory of
    other devices than CPUs is their own, and their runtimes report when it is full.
    """
    if device.platform != "cpu":
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if n_bytes > memory:
        raise UserError(
            f"{what} needs {n_bytes / 2**30:,.1f} GiB of memory and this machine has"
            f" {memory / 2**30:,.1f}; {cure}"
        )


@contextlib.contextmanager
def out_of_memory_reported(cure: str) -> Iterator[None]:
    """Turns the runtime's out-of-memory error into a UserError that names the cure."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(f"the device is out of memory; {cure}") from error
        raise
