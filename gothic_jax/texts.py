"""Text files: rows of works, each with its voice.

Each work opens with a line `<|voice|>` and closes with a line `<|endoftext|>`. A file without
such lines is one work of no voice.
"""

import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from gothic_jax.errors import UserError

PROCESSED = Path("data/processed")
"""Where gothic-data puts texts, and where a bare name is looked up."""
END_OF_TEXT = "<|endoftext|>"
ANY = "any"
"""No voice in particular: the voice of works that name none, and of blends that leave a rest."""
ALL = "all"
"""The name of all voices together, in scores."""
VOICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
RESERVED_VOICES = frozenset({ALL, ANY, "endoftext", "mixed", "none"})
"""Names with another meaning in file names, scores and commands."""
MARKER = re.compile(rf"<\|({VOICE_NAME.pattern})\|>")
"""A special token; its group is the name."""
MAX_WEIGHT = 100.0
"""Larger weights, of either sign, only make log-probabilities lose their last digits."""
_MARKER_LINE = re.compile(rf"^{MARKER.pattern}$", re.MULTILINE)


class Work(NamedTuple):
    """A work of a text file: its voice ("" where the file names none) and its text."""

    voice: str
    text: str


def voice_token(voice: str) -> str:
    """The special token of a voice."""
    return f"<|{voice}|>"


def parse_weights(text: str, *, name: str, known: Collection[str] = ()) -> dict[str, float]:
    """The weights of voices as `wilde=0.3,lovecraft=0.7` gives them, each at most MAX_WEIGHT.

    For the UserError where they are malformed or all 0, `name` is what the user gave them as, and
    `known` are the voices that there are, if that is known.
    """
    there_are = f"; the voices are {', '.join(known)}" if known else ""
    weights: dict[str, float] = {}
    for part in text.split(","):
        voice, _, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not VOICE_NAME.fullmatch(voice) or math.isnan(weight):
            raise UserError(
                f"{name} must be voices and their weights, as in wilde=0.3,lovecraft=0.7, and"
                f" {part.strip()!r} is none{there_are}"
            )
        if abs(weight) > MAX_WEIGHT:
            raise UserError(f"{name}: the weight of {voice} must be at most {MAX_WEIGHT:g}")
        if voice in weights:
            raise UserError(f"{name} names {voice} twice; once is enough")
        weights[voice] = weight
    if not any(weights.values()):
        raise UserError(f"{name} has no weight but 0; give one voice another{there_are}")
    return weights


def read_text(path: Path) -> str:
    """The file's text with \\n line ends; raises UserError where it is missing or not text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there; check its name, or let `gothic-data` make the texts"
        ) from None
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
