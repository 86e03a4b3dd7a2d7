"""The cache of compiled programs: used by default, bounded, and harmless when broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gothic_jax.machine.compiled import delete_broken

PROGRAM = """
import time, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from gothic_jax.machine import compiled
compiled.MAX_BYTES = {limit}
compiled.cache_compiled_programs()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
for n in range({programs}):
    jax.jit(lambda x: jnp.sin(x) * (n + 2) @ x.T)(jnp.ones((9, 9))).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def run(home: Path, *, programs: int = 1, limit: int = 2**28, **environment: str) -> int:
    """Runs some programs in a new process; how many came from the cache."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(programs=programs, limit=limit)],
        env=clean | {"XDG_CACHE_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def entries(home: Path) -> list[Path]:
    return sorted(home.glob("gothic_jax/compiled-*/*-cache"))


def test_the_second_process_compiles_nothing_again(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    made = len(entries(tmp_path))
    assert made > 0
    assert run(tmp_path) == made
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == 0


def test_a_user_without_a_home_compiles_without_a_cache(tmp_path: Path) -> None:
    # Neither in the environment nor in the list of users.
    nobody = "import os, pwd; os.environ.pop('HOME'); pwd.getpwuid = {}.__getitem__\n"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    program = nobody + PROGRAM.format(programs=1, limit=2**28)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "no time of use"])
def test_a_broken_entry_is_compiled_again_and_replaced(tmp_path: Path, damage: str) -> None:
    run(tmp_path)
    made = len(entries(tmp_path))
    broken = entries(tmp_path)[0]
    content = broken.read_bytes()
    if damage == "cut":
        broken.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        broken.write_bytes(b"")
    elif damage == "flipped":
        broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        broken.with_name(re.sub("-cache$", "-atime", broken.name)).unlink()
    assert run(tmp_path) == made - 1  # and no warning: they are errors there
    assert run(tmp_path) == made


def test_its_size_is_bounded(tmp_path: Path) -> None:
    run(tmp_path)
    limit = 3 * sum(path.stat().st_size for path in entries(tmp_path))
    run(tmp_path, programs=12, limit=limit)
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= limit
    assert run(tmp_path, programs=12) > 0


def test_a_cache_folder_that_cannot_be_made_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert run(file) == 0


def test_only_new_entries_are_looked_at(tmp_path: Path) -> None:
    old = tmp_path / "old-cache"
    old.write_bytes(b"broken")
    (tmp_path / "old-atime").touch()
    os.utime(old, ns=(1, 1))
    (tmp_path / ".checked").touch()
    delete_broken(tmp_path)
    assert old.exists()
