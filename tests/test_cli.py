"""What every command does with its streams, its arguments and Ctrl-C."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gothic_jax.commands import index
from gothic_jax.errors import UserError
from gothic_jax.machine.files import write_atomically
from tests.common import Workplace, process
from tests.terminal import Terminal

ECHO = """
from gothic_jax.commands.cli import command
from gothic_jax.errors import UserError

@command("echo")
def main(argv):
    line = input()
    try:
        line.encode()
    except UnicodeEncodeError:
        raise UserError("not valid Unicode")
    print(line)

raise SystemExit(main())
"""


@pytest.mark.parametrize(
    ("given", "code", "error"),
    [(b"a caf\xc3\xa9\n", 0, ""), (b"a caf\xe9\n", 2, "echo: error: not valid Unicode\n")],
)
def test_input_in_another_encoding_is_reported_in_one_line(
    given: bytes, code: int, error: str
) -> None:
    """Python's own default in most locales is a traceback from input()."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-c", ECHO], input=given, capture_output=True, env=environment
    )
    assert (done.returncode, done.stderr.decode()) == (code, error)


@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_is_not_a_file_to_write(name: str) -> None:
    with pytest.raises(UserError, match="name a file"):
        write_atomically(Path(name), b"")


def in_shell(redirections: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a shell starts it with redirections; other output is captured."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh",
         sys.executable, "-m", f"gothic_jax.commands.{module}", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )  # fmt: skip


def tokenize(workplace: Workplace, output: Path) -> list[str]:
    text = str(workplace.root / "mixed_train.txt")
    return ["--files", text, "--output", str(output), "--vocab-size", "320"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_command_does_its_work_without_streams(workplace: Workplace, closed: str) -> None:
    expected, output = workplace.root / "expected.json", workplace.root / "new.json"
    plain = in_shell("", "tokenize", *tokenize(workplace, expected))
    done = in_shell(closed, "tokenize", *tokenize(workplace, output))
    assert done.returncode == plain.returncode == 0, done.stderr + plain.stderr
    assert "Traceback" not in done.stderr
    # No printed line was written into the file by way of a reused descriptor.
    assert output.read_bytes() == expected.read_bytes()
    if ">&-" not in closed:
        assert done.stdout == plain.stdout.replace("expected.json", "new.json")


def test_a_user_error_without_streams_keeps_its_exit_code(tmp_path: Path) -> None:
    done = in_shell("<&- >&- 2>&-", "tokenize", "--files", str(tmp_path / "missing.txt"))
    assert done.returncode == 2


def test_a_process_started_again_for_huge_pages_has_its_streams(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from gothic_jax.commands.cli import command
from gothic_jax.machine.process import use_huge_pages

@command("work", before=use_huge_pages)
def main(argv):
    print("worked", input() if argv[1:] else "")
    with open(argv[0], "w") as file:
        assert file.fileno() > 2
        os.system("echo a child; echo a child >&2")
        file.write("done")

sys.exit(main())
"""
    for number, redirections in enumerate(["<&-", ">&- 2>&-", "<&- >&- 2>&-"]):
        output = tmp_path / str(number)
        subprocess.run(
            ["sh", "-c", f'exec "$@" {redirections}', "sh",
             sys.executable, "-c", program, str(output)],
            env={name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"},
            stdin=subprocess.DEVNULL, capture_output=True, check=True,
        )  # fmt: skip
        assert output.read_text() == "done"


def test_a_conversation_without_stdin_ends_as_at_the_end_of_input(
    trained_once: Workplace,
) -> None:
    arguments = ["--checkpoint", str(trained_once.out_dir), "--interactive"]
    done = in_shell("<&-", "chat", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n> ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("what", ["work", "help"])
def test_a_full_disk_behind_stdout_is_reported_in_one_line(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, what: str, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    arguments = tokenize(workplace, workplace.root / "new.json") if what == "work" else ["--help"]
    done = in_shell(">/dev/full", "tokenize", *arguments)
    assert done.returncode == 2
    assert done.stderr == (
        "gothic-tokenize: error: stdout cannot be written: No space left on device\n"
    )
    assert in_shell(">/dev/full 2>&1", "tokenize", *arguments).returncode == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_a_command_quietly(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "gothic_jax.commands.tokenize", "--help"],
        stdout=write, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_no_escape_codes_where_they_are_not_wanted(
    workplace: Workplace, environment: dict[str, str]
) -> None:
    assert workplace.train(max_iters=1) == 0
    assert index.main(["--file", str(workplace.root / "mixed_train.txt")]) == 0
    # The model of six iterations copies nothing of its own accord.
    program = """
import sys
from gothic_jax.commands import chat
from gothic_jax.writing.sample import Ending, Piece
from gothic_jax.writing.writer import Writer
copied = Piece("There are doors beneath the harbour that no tide", Ending.LENGTH)
Writer.write = lambda *_: [copied]
sys.exit(chat.main())
"""
    arguments = ["--checkpoint", str(workplace.out_dir), "--novelty"]
    terminal = Terminal(["-c", program, *arguments], workplace.root, **environment)
    seen = "".join(terminal.read())
    terminal.close()
    assert terminal.process.wait() == 0, seen
    assert "[[" in seen
    assert "\x1b" not in seen


@pytest.mark.parametrize("module", ["data", "tokenize", "train", "chat", "evaluate", "index"])
def test_help_shows_the_defaults_of_values_and_not_of_switches(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"gothic_jax.commands.{module}").main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: gothic-")
    assert "(default: " in text
    assert "(default: False)" not in text


def sigint_is_caught(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1)
    return False


@pytest.mark.parametrize(
    "seconds",
    [0.1, 0.7, *(pytest.param(at, marks=pytest.mark.long) for at in (0.0, 0.02, 0.3, 1.5))],
)
@pytest.mark.parametrize("module", ["train", "chat"])
def test_ctrl_c_ends_a_command_at_any_moment_without_a_traceback(
    trained_once: Workplace, tmp_path: Path, module: str, seconds: float
) -> None:
    """From when Python has started and handed over to the command."""
    if module == "train":
        arguments = trained_once.arguments(out_dir=tmp_path / "run", max_iters=100_000)
    else:
        arguments = ["--checkpoint", str(trained_once.out_dir), "--max-tokens", "1000000"]
    with process(module, arguments, trained_once.root) as started:
        while not sigint_is_caught(started.pid):  # Python's own handler
            assert started.poll() is None
        while sigint_is_caught(started.pid):
            assert started.poll() is None, "Python's handler was in place until the end"
        time.sleep(seconds)
        started.send_signal(signal.SIGINT)
        _, error = started.communicate()
    assert started.returncode in (-signal.SIGINT, 130), error
    assert "Traceback" not in error


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As for `command &` in a script."""
    program = """
import os, signal
from gothic_jax.commands.cli import command
from gothic_jax.machine.process import StopSignal, catch_interrupts

@command("work")
def main(argv):
    os.kill(os.getpid(), signal.SIGINT)
    catch_interrupts()
    os.kill(os.getpid(), signal.SIGINT)
    with StopSignal().watched() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGHUP)
    print("worked", stop.received)

main()
"""
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", sys.executable, "-c", program],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("worked None\n", "")
