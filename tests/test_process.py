import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from gothic_jax.process import use_huge_pages
use_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


@pytest.mark.parametrize("already", [None, "glibc.malloc.arena_max=1"])
def test_a_process_starts_anew_once_with_huge_pages_and_keeps_a_users_own_choice(
    already: str | None,
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if already is not None:
        environment["GLIBC_TUNABLES"] = already
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "two words"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on_request = switch.exists() and "[madvise]" in switch.read_text()
    expected = already or ("glibc.malloc.hugetlb=1" if on_request else None)
    assert process.communicate(timeout=60)[0] == f"{process.pid} {expected} two words\n"
