"""JAX's cache of compiled programs, in the user's cache folder: a program compiles only once.

`JAX_ENABLE_COMPILATION_CACHE=false` turns it off. Where `JAX_COMPILATION_CACHE_DIR` names a
folder, the cache is there and JAX's own settings apply.
"""

import os
import platform
import time
import zlib
from pathlib import Path

import filelock
import jax

from gothic_jax.machine.files import sha256

MAX_BYTES = 2**28
"""The least recently used programs are deleted beyond this size."""
_ENTRY, _USED, _CHECKED = "-cache", "-atime", ".checked"


def cache_compiled_programs() -> None:
    """Lets this process take compiled programs from the cache, and add its own.

    Does nothing where the folder cannot be written, or the user has no home.
    """
    enabled: bool = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined, unused-ignore]
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not enabled:
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        delete_broken(folder)
    except (OSError, RuntimeError):  # Path.home raises the latter
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # JAX's default leaves out what compiles within a second, which here is most programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cache_folder() -> Path:
    """The folder of this kind of machine: a program of another one may use what this CPU lacks."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    kind = sha256(f"{platform.machine()} {features}".encode())[:16]
    return base / "gothic_jax" / f"compiled-{kind}"


def delete_broken(folder: Path) -> None:
    """Deletes entries that a killed process has written by half. Raises OSError.

    JAX writes them in place, and would warn of such an entry, and compile, at every later start.
    Only what came after the last check is looked at.
    """
    try:
        # No other process writes while this one holds JAX's own lock.
        with filelock.FileLock(folder / ".lockfile", timeout=0):
            checked = folder / _CHECKED
            since = checked.stat().st_mtime_ns if checked.exists() else 0
            now = time.time_ns()
            for entry in folder.glob(f"*{_ENTRY}"):
                if entry.stat().st_mtime_ns >= since and not _is_whole(entry):
                    entry.unlink()
            checked.touch()
            os.utime(checked, ns=(now, now))
    except filelock.Timeout:
        return  # it writes an entry just now; the next start checks it


def _is_whole(entry: Path) -> bool:
    if not entry.with_name(f"{entry.name.removesuffix(_ENTRY)}{_USED}").exists():
        return False
    content = entry.read_bytes()
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        return True  # Zstandard, where that is installed: JAX checks it
    stream = zlib.decompressobj()
    try:
        stream.decompress(content)
    except zlib.error:
        return False
    return stream.eof
