"""What a run shows while it trains, at a real terminal and without one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gothic_jax.checkpoints import checkpoint
from tests.common import Workplace, process, run, wait_for
from tests.terminal import Terminal

LONG = {"max_iters": 100_000, "eval_interval": 100_000, "save_minutes": 0}


def train_at_terminal(workplace: Workplace, *extra: str, **settings: object) -> Terminal:
    arguments = ["-m", "gothic_jax.train", *workplace.arguments(*extra, **settings)]
    return Terminal(arguments, workplace.root)


def test_a_terminal_gets_a_progress_bar(workplace: Workplace) -> None:
    terminal = train_at_terminal(workplace)
    seen = "".join(terminal.read())
    terminal.close()
    assert terminal.process.wait() == 0, seen
    assert "\x1b[" in seen
    assert "6/6" in seen


@pytest.mark.parametrize("name", ["TERM", pytest.param("NO_COLOR", marks=pytest.mark.long)])
def test_a_terminal_without_escape_codes_gets_the_plain_lines(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arguments = ["-m", "gothic_jax.train", *workplace.arguments()]
    terminal = Terminal(arguments, workplace.root, **{name: "dumb"})
    seen = "".join(terminal.read())
    terminal.close()
    assert terminal.process.wait() == 0, seen
    assert re.findall(r"^(\d)/6  loss ", seen, re.MULTILINE) == ["1", "2", "3", "4", "5", "6"]
    assert "\x1b" not in seen


@pytest.mark.long
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_closed_terminal_saves_and_stops(workplace: Workplace, term: str) -> None:
    arguments = ["-m", "gothic_jax.train", *workplace.arguments(**LONG)]
    terminal = Terminal(arguments, workplace.root, TERM=term)
    terminal.read_until("loss")
    terminal.close()
    # The shell sends its own signal besides the kernel's.
    terminal.process.send_signal(signal.SIGHUP)
    # A shell shows both as 129; the second signal may come after the end of all work.
    assert terminal.process.wait() in (129, -signal.SIGHUP)
    (stopped_at,) = checkpoint.iterations(workplace.out_dir)
    again = run("train", ["--resume", "--out-dir", str(workplace.out_dir),
                          f"--max-iters={stopped_at + 2}"], workplace.root)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert f"resuming at iteration {stopped_at}" in again.stdout


def test_a_hangup_of_a_run_without_a_terminal_saves_and_stops(workplace: Workplace) -> None:
    arguments = workplace.arguments(**LONG)
    with process("train", arguments, workplace.root, PYTHONUNBUFFERED="1") as started:
        wait_for("1/100000", started)
        started.send_signal(signal.SIGHUP)
        out, error = started.communicate()
    assert started.returncode == 129, error
    (stopped_at,) = checkpoint.iterations(workplace.out_dir)
    assert f"stopped at iteration {stopped_at}" in out


@pytest.mark.long
def test_a_run_started_with_nohup_outlives_its_terminal(workplace: Workplace) -> None:
    arguments = [sys.executable, "-m", "gothic_jax.train", *workplace.arguments()]
    program = f"import os; os.execvp('nohup', ['nohup', *{arguments!r}])"
    terminal = Terminal(["-c", program], workplace.root)
    log = workplace.root / "nohup.out"
    while "model:" not in (log.read_text() if log.exists() else ""):
        assert terminal.process.poll() is None
    terminal.close()
    assert terminal.process.wait() == 0, log.read_text()
    assert "6/6  loss" in log.read_text()


def test_a_run_goes_on_when_the_reader_of_its_lines_leaves(workplace: Workplace) -> None:
    """As with `| tee log` when tee is killed."""
    with process("train", workplace.arguments(), workplace.root, PYTHONUNBUFFERED="1") as started:
        wait_for("compiled", started)
        assert started.stdout is not None
        started.stdout.close()
        assert started.stderr is not None
        error = started.stderr.read()
    assert error == ""
    assert started.returncode == 0
    assert checkpoint.iterations(workplace.out_dir)[-1] == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_run_goes_on_when_its_lines_cannot_be_written(workplace: Workplace) -> None:
    """stdout fails from the first iteration on: what comes before is still refused."""
    program = """
import os, sys
from gothic_jax.commands import train
from gothic_jax.training import loop
go = loop.Loop.go
def fail_and_go(self):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return go(self)
loop.Loop.go = fail_and_go
sys.exit(train.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *workplace.arguments()],
        env=os.environ | {"GLIBC_TUNABLES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert checkpoint.iterations(workplace.out_dir)[-1] == 6
    assert "Traceback" not in done.stderr
