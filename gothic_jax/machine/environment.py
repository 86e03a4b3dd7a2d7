"""What a run's figures may depend on besides its settings and texts, and what of it has changed.

On one machine, with the same versions, threads and devices, a run gives the same numbers bit for
bit. A checkpoint therefore records these facts, and whoever opens it is warned if they differ.
"""

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import jax

from gothic_jax import __version__

PACKAGES = (
    "gothic-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "grain",
    "numpy",
)  # fmt: skip
WRITING = ("gothic-jax", "jax", "jaxlib", "tokenizers")
"""What a text with a given seed depends on besides the device, which is often another one."""


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of packages; this one's own is that of its files, installed or not."""
    return {name: __version__ if name == "gothic-jax" else metadata.version(name) for name in names}


@functools.cache
def facts() -> dict[str, str]:
    """The facts of this process by name: versions, commit, processor, threads, devices, flags."""
    devices, processes = jax.devices(), jax.process_count()
    together = f" in {processes} processes" if processes > 1 else ""
    return versions(PACKAGES) | {
        "python": platform.python_version(),
        "commit": _commit(),
        "threads": str(len(os.sched_getaffinity(0))),
        "devices": f"{len(devices)} x {devices[0].device_kind}{together}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def differences(
    before: Mapping[str, str], now: Mapping[str, str], names: Iterable[str] | None = None
) -> list[str]:
    """The facts, or those named, that are not what they were: `jax 0.9.0 -> 0.10.2`."""
    chosen = sorted(before.keys() | now.keys()) if names is None else names
    return [
        f"{name} {before.get(name) or 'none'} -> {now.get(name) or 'none'}"
        for name in chosen
        if before.get(name) != now.get(name)
    ]


def warn_of_other_versions(name: str, before: Mapping[str, str]) -> None:
    """Warns on stderr where what a text depends on differs from when `name` was made."""
    if changed := differences(before, versions(WRITING), WRITING):
        print(
            f"warning: {name} was made with other versions ({'; '.join(changed)}): figures and the"
            " text of a seed may differ",
            file=sys.stderr,
        )


def _commit() -> str:
    """The git commit of this package, "+" if its files were changed; "" outside a clone."""
    package = Path(__file__).parent.parent
    if not (package.parent / ".git").exists():
        return ""  # installed, or within another project's clone
    command = ["git", "-C", str(package), "status", "--porcelain=v2", "--branch", "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    lines = done.stdout.splitlines()
    commit = next(line.split()[-1] for line in lines if line.startswith("# branch.oid"))
    return commit[:12] + ("" if all(line.startswith("#") for line in lines) else "+")
