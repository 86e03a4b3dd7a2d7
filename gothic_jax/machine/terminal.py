"""The person's terminal: what may be written to it, text that is wrapped there, the editor."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gothic_jax.errors import UserError

_ESCAPE_CODE = re.compile("\x1b\\[[0-9;]*m")
# Other blanks, such as U+00A0, are there so that no line ends at them.
_PARTS = re.compile(r"[\n\r]|[ \t]+|[^ \t\n\r]+")


def styled(stream: Any) -> bool:
    """Whether escape codes (colours, a progress bar) may be written to a stream.

    Only to a terminal that understands them, and not if the user has set NO_COLOR.
    """
    return (
        stream.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        and not os.environ.get("NO_COLOR")
    )


def cells(text: str) -> int:
    """How many columns of a terminal a text without line ends and tabs takes."""
    from rich.cells import cell_len  # commands start faster without it

    return cell_len(_ESCAPE_CODE.sub("", text))


@contextlib.contextmanager
def wrapped(stream: Any) -> Iterator[Callable[[str], None]]:
    """Gives a function that writes text to a stream, piece by piece, from a line's beginning on.

    If the stream is a terminal, its lines are broken between words, in place of the blanks there,
    and a word is held back until it has ended or its line has. All is written when the block ends,
    however it does. Anything else than a terminal gets the text as it is.
    """
    if not stream.isatty():

        def write(text: str) -> None:
            stream.write(text)
            stream.flush()

        yield write
        return
    lines = _Lines(stream)
    try:
        yield lines.write
    finally:
        lines.finish()


class _Lines:
    """Text on a terminal; what is not yet there is `_blanks`, then `_word`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._column = 0
        self._is_empty = True
        """Whether the line has no word yet; one of no width is a word, too."""
        self._blanks = ""
        self._word = ""
        self._is_begun = False
        """Whether the beginning of the word is there, and only its end is held."""

    def write(self, text: str) -> None:
        for part in _PARTS.findall(text):
            if part in "\n\r":
                self._end_word()
                self._end_line(part)
            elif part[0] in " \t":
                self._end_word()
                self._blanks += part
            else:
                self._word += part
                # A word wider than a line begins one: nothing is gained by holding it longer.
                if not self._is_begun and not self._fits():
                    self._end_line("" if self._is_empty else "\n")
                if self._is_begun or (self._is_empty and not self._blanks):
                    self._release()
        self._stream.flush()

    def finish(self) -> None:
        self._end_word()
        self._stream.flush()

    def _fits(self) -> bool:
        return self._behind_blanks() + cells(self._word) <= _width()

    def _behind_blanks(self) -> int:
        """The column after the blanks, where a tab leads to the next multiple of 8."""
        return len((" " * self._column + self._blanks).expandtabs())

    def _release(self) -> None:
        """Writes what is held of a word and the blanks before it."""
        column, word = self._behind_blanks(), self._word
        self._stream.write(self._blanks + word)
        self._blanks, self._word, self._is_begun, self._is_empty = "", "", True, False
        width = _width()
        for character in _ESCAPE_CODE.sub("", word):
            size = cells(character)
            # Here the terminal itself has broken the word.
            column = size if column + size > width else column + size
        self._column = column

    def _end_word(self) -> None:
        if self._word:
            self._release()
        self._is_begun = False

    def _end_line(self, end: str) -> None:
        """Blanks at the end of a line are not written: they could begin another."""
        self._stream.write(end)
        self._column, self._is_empty, self._blanks = 0, True, ""


def _width() -> int:
    """The terminal's columns now: it may be resized while a text is written."""
    return shutil.get_terminal_size().columns


@contextlib.contextmanager
def edited(text: str) -> Iterator[str]:
    """Gives a text as a person saves it in $VISUAL, $EDITOR or vi.

    Raises UserError where that cannot be, also if the block raises one; what the editor has saved
    stays in a file then, which the error names.
    """
    command = _editor()
    path = _temporary(text)
    is_kept = False
    try:
        try:
            _run_editor([*command, str(path)])
            saved = path.read_bytes().decode().removeprefix("\ufeff")
            # Editors end a file with a line end.
            yield saved if text.endswith("\n") else saved.removesuffix("\n")
        except (OSError, UnicodeDecodeError, UserError) as error:
            worthless = (b"", text.encode().strip())
            is_kept = path.exists() and path.read_bytes().strip() not in worthless
            where = f"; what the editor saved is in {path}" if is_kept else ""
            raise UserError(f"the text stays as it was: {error}{where}") from error
    finally:
        if not is_kept:
            shutil.rmtree(path.parent, ignore_errors=True)


def _editor() -> list[str]:
    """The editor's command with its own arguments; raises UserError where there is none."""
    cure = "set VISUAL or EDITOR to the command of one, as in EDITOR=nano"
    chosen = os.environ.get("VISUAL", "").strip() or os.environ.get("EDITOR", "").strip() or "vi"
    try:
        command = shlex.split(chosen)
    except ValueError as error:
        raise UserError(f"{chosen!r} is no editor's command ({error}); {cure}") from error
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no editor {command[0]!r}; {cure}")
    return command


def _temporary(text: str) -> Path:
    """A file with the text in a folder of its own, where editors may put others beside it."""
    try:
        path = Path(tempfile.mkdtemp(prefix="gothic-")) / "text.txt"
        path.write_bytes(text.encode())
    except OSError as error:
        raise UserError(
            f"no copy for the editor can be written: {error}; set TMPDIR to a folder with room"
        ) from error
    return path


def _run_editor(command: list[str]) -> None:
    """Raises UserError where the editor fails, and OSError where it cannot be started."""
    sys.stdout.flush()
    # Ctrl-C is the editor's. A handler, unlike SIG_IGN, is not passed on to it.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)
    if code:
        raise UserError(f"{command[0]} failed with exit code {code}")
