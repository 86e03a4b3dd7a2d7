import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gothic_jax.errors import UserError
from gothic_jax.machine.process import Interrupted, StopSignal, exclusive

PROGRAM = """
import os, sys
from gothic_jax.machine.process import use_huge_pages
use_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


@pytest.mark.parametrize("already", [None, "glibc.malloc.arena_max=1"])
def test_a_process_starts_again_once_with_huge_pages_and_keeps_a_users_own_choice(
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


def test_a_folder_is_locked_by_one_process_and_left_as_it_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with exclusive(folder):
        with pytest.raises(UserError, match=f"PID {os.getpid()}"), exclusive(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()
    with exclusive(folder):
        (folder / "1").mkdir()
    with exclusive(folder):
        pass
    assert (folder / "1").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_interrupts_only_what_may_be_interrupted(number: int) -> None:
    with StopSignal().watched() as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number
        # The next one ends the process at once.
        assert signal.getsignal(number) is signal.SIG_DFL
        with pytest.raises(Interrupted), stop.interrupts():
            raise AssertionError("this must not be reached")

    def signalled_at_work() -> None:
        with stop.interrupts():
            os.kill(os.getpid(), number)
            raise AssertionError("this must not be reached")

    with StopSignal().watched() as stop, pytest.raises(Interrupted):
        signalled_at_work()
    assert stop.received == number


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGINT])
def test_a_repeated_hangup_changes_nothing(first: int) -> None:
    """In a process of its own: a hangup closes the terminal for the whole process."""
    program = f"""
import os, signal
from gothic_jax.machine.process import StopSignal
with StopSignal().watched() as stop:
    for number in ({int(first)}, signal.SIGHUP, signal.SIGHUP):
        os.kill(os.getpid(), number)
    print(stop.received)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{int(first)}\n")
    assert done.stderr.count("saving and stopping") == 1
