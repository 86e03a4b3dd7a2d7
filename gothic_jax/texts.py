"""Text files: rows of works, each with its voice.

Each work opens with a line `<|voice|>` and closes with a line `<|endoftext|>`. A file without
such lines is one work of no voice.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gothic_jax.cli import UserError

END_OF_TEXT = "<|endoftext|>"
VOICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
RESERVED_VOICES = frozenset({"all", "any", "endoftext", "mixed", "none"})
"""Names that stand for something else: in file names, scores and commands."""
MARKER = re.compile(rf"<\|({VOICE_NAME.pattern})\|>")
"""A special token; its group is the name."""
_MARKER_LINE = re.compile(rf"^{MARKER.pattern}$", re.MULTILINE)


class Work(NamedTuple):
    """A work of a text file: its voice ("" where the file names none) and its text."""

    voice: str
    text: str


def voice_token(voice: str) -> str:
    """The special token of a voice."""
    return f"<|{voice}|>"


def read_text(path: Path) -> str:
    """The file's text with \\n line ends; raises UserError where it is missing or not text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is not there; `gothic-data` makes the texts") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); `gothic-data --add NAME=GLOB` converts"
            " texts"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path} is empty; `gothic-data` makes the texts")
    return text


def join_works(works: Iterable[Work]) -> str:
    """The text file of some works that all have a voice."""
    return "".join(f"{voice_token(voice)}\n{text}\n{END_OF_TEXT}\n" for voice, text in works)


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


def find_text(name: str, data_dir: Path) -> Path:
    """The path of a text: a bare file name is looked up in `data_dir` first."""
    path = Path(name)
    if path.name != name:
        return path
    return path if path.exists() and not (data_dir / name).exists() else data_dir / name
