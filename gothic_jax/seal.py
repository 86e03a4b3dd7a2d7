"""What a run's figures may depend on besides its settings and texts, and how it has changed.

On one machine, with the same versions, threads and devices, a run gives the same numbers bit for
bit. A checkpoint therefore carries these facts, and who opens it hears which of them differ.
"""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = (
    "gothic-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "grain",
    "numpy",
)  # fmt: skip
WRITING = ("gothic-jax", "jax", "jaxlib", "tokenizers")
"""What a text with a given seed depends on besides the device, which is often another one."""


def environment() -> dict[str, str]:
    """The facts of this process by name: versions, commit, processor, threads, devices, flags."""
    facts = {name: metadata.version(name) for name in PACKAGES}
    devices = jax.local_devices()
    return facts | {
        "python": platform.python_version(),
        "commit": _commit(),
        "threads": str(len(os.sched_getaffinity(0))),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
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


def _commit() -> str:
    """The git commit of this package, "+" if its files were changed; "" outside a clone."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return ""  # installed somewhere within another project's clone
        changed = git("status", "--porcelain", "--", str(package))
        return git("rev-parse", "HEAD")[:12] + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
