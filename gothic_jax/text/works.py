"""The format of text files: works one after another, each with its voice.

A work begins with a line `<|voice|>` and ends with a line `<|endoftext|>`. A file without such
lines is one work in no voice.
"""

import functools
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gothic_jax.errors import UserError
from gothic_jax.text.encodings import decode
from gothic_jax.text.voices import MARKER, voice_token

PROCESSED = Path("data/processed")
"""Where gothic-data puts texts, and where a bare name is looked up."""
END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val", "test")
_MARKER_LINE = re.compile(rf"^{MARKER.pattern}$", re.MULTILINE)


class Work(NamedTuple):
    """A work of a text file: its voice ("" where the file names none) and its text."""

    voice: str
    text: str


def read_text(path: Path) -> str:
    """The file's text with \\n line ends; raises UserError where it is missing or not text.

    Reports on stderr an encoding other than UTF-8.
    """
    try:
        text, encoding = decode(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there; check its name, or let `gothic-data` make the texts"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if encoding != "utf-8":
        _report_once(f"{path} is read as {encoding}")
    if "\r" in text:  # to replace each line end by itself takes longer than to read the file
        text = re.sub("\r*\n|\r", "\n", text)
    if not text.strip():
        raise UserError(f"{path} is empty; `gothic-data` makes the texts")
    return text


@functools.cache
def _report_once(message: str) -> None:
    print(message, file=sys.stderr)


def join_works(works: Iterable[Work]) -> str:
    """The text file of some works that all have a voice."""
    return "".join(f"{voice_token(voice)}\n{text}\n{END_OF_TEXT}\n" for voice, text in works)


def shield(text: str) -> tuple[str, int]:
    """The text, where a line that would be a marker begins with a blank; and how many there are."""
    return _MARKER_LINE.subn(r" \g<0>", text)


def split_works(text: str) -> list[Work]:
    """The works of a text, in order; text before the first marker is a work of no voice."""
    works = []
    voice, start = "", 0

    def close(end: int) -> None:
        body = text[start:end].strip("\n")
        if body.strip():
            works.append(Work(voice, body))

    for marker in _MARKER_LINE.finditer(text):
        close(marker.start())
        voice, start = ("" if marker[0] == END_OF_TEXT else marker[1]), marker.end()
    close(len(text))
    return works


def works_of(path: Path, text: str) -> list[Work]:
    """The works of the text of a file; raises UserError where there are none."""
    if works := split_works(text):
        return works
    raise UserError(f"{path} has no text between its markers; `gothic-data` makes texts")


def find_text(name: str, data_dir: Path) -> Path:
    """The path of a text: a bare file name is looked up in `data_dir` first. Raises UserError."""
    path = Path(name)
    if path.name != name:
        return path
    try:
        return path if path.exists() and not (data_dir / name).exists() else data_dir / name
    except OSError as error:  # no permission, or a name beyond all length
        raise UserError(f"{name[:80]} cannot be read: {error.strerror}") from error
