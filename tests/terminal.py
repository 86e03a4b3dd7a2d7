"""A real pseudo-terminal with a command in it."""

import errno
import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

# The command's session gets the terminal, as in a terminal's window.
START = (
    "import fcntl, os, sys, termios;"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Terminal:
    """A Python program at a terminal of its own."""

    def __init__(self, arguments: list[str], cwd: Path, **environment: str) -> None:
        """The arguments are Python's. `environment` is added to one with TERM=xterm and colours."""
        dropped = ("XLA_FLAGS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES")
        plain = {name: value for name, value in os.environ.items() if name not in dropped}
        plain |= {"TERM": "xterm", "GLIBC_TUNABLES": ""}
        self._screen, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            cwd=cwd,
            env=plain | environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._unread = ""

    def read(self) -> Iterator[str]:
        """What appears on the screen, piece by piece, until the command has ended."""
        if self._unread:
            unread, self._unread = self._unread, ""
            yield unread
        while True:
            try:
                piece = os.read(self._screen, 4096)
            except OSError as error:
                if error.errno != errno.EIO:  # which means that no process has it open any more
                    raise
                return
            yield piece.decode("utf-8", "replace")

    def read_until(self, part: str) -> str:
        """What appears up to and with `part`; what came after it is read next."""
        seen = ""
        for piece in self.read():
            seen += piece
            if part in seen:
                before, _, self._unread = seen.partition(part)
                return before + part
        raise AssertionError(f"{part!r} never came:\n{seen}")

    def type(self, keys: str) -> None:
        """What a person types or pastes; a newline is the Enter key."""
        os.write(self._screen, keys.encode())

    def resize(self, columns: int) -> None:
        """Gives the window so many columns, and tells the command."""
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Closes the window."""
        os.close(self._screen)
