"""What every command does with what it is given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gothic_jax.errors import UserError
from gothic_jax.machine.files import write_atomically

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
def test_input_in_another_encoding_is_told_in_one_line(given: bytes, code: int, error: str) -> None:
    """Python's own default in most locales is a traceback from input()."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-c", ECHO], input=given, capture_output=True, env=environment
    )
    assert (done.returncode, done.stderr.decode()) == (code, error)


@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_is_no_file_to_write(name: str) -> None:
    with pytest.raises(UserError, match="name a file"):
        write_atomically(Path(name), b"")
