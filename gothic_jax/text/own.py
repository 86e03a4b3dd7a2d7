"""One's own texts: found, decoded, freed of what is not theirs, and split.

What happens to a file is counted, so that it can be said: nothing of it is changed in silence.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gothic_jax.errors import UserError
from gothic_jax.machine.files import sha256
from gothic_jax.text import gutenberg, lines, typography
from gothic_jax.text.cleaning import words
from gothic_jax.text.encodings import decode
from gothic_jax.text.repeats import Text
from gothic_jax.text.works import SPLITS, shield

HELD_OUT_SHARE = 0.05
"""Of one's own texts, for val and for test each."""
LONG = 1000
"""Characters. Shorter texts are not cut between words."""
# Where a single file may be cut: between paragraphs, else lines, sentences, words, characters.
_JOINTS = (
    re.compile(r"\n\n+"),
    re.compile(r"\n+"),
    re.compile(r"(?<=[.!?])\s+|(?<=[。！？])"),  # noqa: RUF001
    re.compile(r"\s+"),
    re.compile(f"(?<=[{lines.UNSPACED}])(?=[{lines.UNSPACED}])"),
)


@dataclass(frozen=True)
class OwnFile:
    """A file of one's own as it was read, and what was done to it."""

    path: str
    voice: str
    encoding: str
    gutenberg_words: int
    """Words of Project Gutenberg's headers and licences, which were left out."""
    changes: dict[str, int]
    """Of the typography, by kind."""


def read_all(
    voice: str, pattern: str, encoding: str | None, mode: str
) -> tuple[list[Text], list[OwnFile]]:
    """The files that match a pattern, clean and split: by file, or a single one by position.

    `encoding` None is detected; `mode` is one of `typography.MODES`. Raises UserError where
    nothing matches, or a file is not text.
    """
    paths = _matches(pattern)
    read = {path: _read(path, voice, encoding, mode) for path in paths}
    bodies = {path: body for path, (body, _) in read.items()}
    files = [file for _, file in read.values()]
    if len(paths) == 1:
        return _split_by_position(voice, paths[0], bodies[paths[0]]), files
    # The order must depend on what the files are, not on where they are.
    order = sorted(paths, key=lambda p: (sha256(bodies[p].encode()), p.name))
    held_out = max(1, round(len(order) * HELD_OUT_SHARE))
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:held_out], "val"))
    if len(order) > 2:
        splits.update(dict.fromkeys(order[held_out : 2 * held_out], "test"))
    return [_text(voice, path, splits[path], bodies[path]) for path in paths], files


def clean_own(raw: bytes, encoding: str | None = None, mode: str = typography.PLAIN) -> str:
    """The text of one's own file, as `read_all` reads it; raises ValueError if it is not text."""
    return _clean(raw, encoding, mode)[0]


def _clean(raw: bytes, encoding: str | None, mode: str) -> tuple[str, str, int, dict[str, int]]:
    decoded = decode(raw, encoding)
    text = lines.unify(decoded.text)
    own = gutenberg.strip(text, outside=True)
    left_out = len(words(text)) - len(words(own)) if own != text else 0
    body = lines.unwrap(own)
    changes: dict[str, int] = {}
    if mode == typography.PLAIN:
        body, counted = typography.plain(body)
        changes.update(counted)
    shielded, markers = shield(body.strip("\n"))
    if markers:
        changes["lines that would mark a voice"] = markers
    return shielded, decoded.encoding, left_out, changes


def _read(path: Path, voice: str, encoding: str | None, mode: str) -> tuple[str, OwnFile]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; check its permissions, or leave it out"
        ) from error
    try:
        body, read_as, left_out, changes = _clean(raw, encoding, mode)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not body.strip():
        raise UserError(f"{path} contains no text; leave it out of the pattern")
    return body, OwnFile(str(path), voice, read_as, left_out, changes)


def _matches(pattern: str) -> list[Path]:
    """The text files that match, sorted. What exists is taken as it is, and so is the longest
    existing folder that a pattern starts with: names may contain brackets."""
    try:
        path = Path(pattern).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.suffix.lower() == ".txt" and p.is_file()]
            if not found:
                raise UserError(f"--add: there is no .txt file in {pattern}; name the files")
        else:
            folder = next(parent for parent in path.parents if parent.is_dir())
            found = [p for p in folder.glob(str(path.relative_to(folder))) if p.is_file()]
    except (ValueError, RuntimeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--add: {pattern} cannot be searched ({reason}); check the path"
        ) from error
    if not found:
        cure = "write [[] for [ in a name" if "[" in pattern else "quote the pattern"
        raise UserError(f"--add: no file matches {pattern}; {cure}, and check the path")
    kept = sorted(_without_skipped(found))
    if not kept:
        raise UserError(f"--add: the files of {pattern} are hidden or empty; name others")
    return kept


def _without_skipped(paths: Iterable[Path]) -> Iterator[Path]:
    """Those that are neither hidden, such as `._x.txt` of a Macintosh, nor empty."""
    for path in paths:
        if path.name.startswith("."):
            print(f"skipped {path}: a hidden file", file=sys.stderr)
        elif path.stat().st_size == 0:
            print(f"skipped {path}: an empty file", file=sys.stderr)
        else:
            yield path


def _text(voice: str, path: Path, split: str, body: str) -> Text:
    return Text(voice, f"{voice}/{path.name}", path.stem, split, body)


def _split_by_position(voice: str, path: Path, body: str) -> list[Text]:
    places = _cuts(body)
    if not places:
        print(
            f"warning: {path} is too short to hold out a part of it for validation;"
            " add more text, or give several files",
            file=sys.stderr,
        )
    bounds = pairwise([0, *places, len(body)])
    parts = [body[start:stop].rstrip() for start, stop in bounds]
    return [_text(voice, path, split, part) for split, part in zip(SPLITS, parts, strict=False)]


def _cuts(body: str) -> list[int]:
    """Where val and test begin: at the first kind of joint that parts the text finely enough."""
    for joint in _JOINTS if len(body) >= LONG else _JOINTS[:3]:
        places = [match.end() for match in joint.finditer(body)]
        longest = max(stop - start for start, stop in pairwise([0, *places, len(body)]))
        if len(places) >= 2 and 10 * longest <= 9 * len(body):
            return _nearest(places, len(body))
    # Few paragraphs, of which one is most of the text.
    return [match.end() for match in _JOINTS[0].finditer(body)][-2:]


def _nearest(places: Sequence[int], length: int) -> list[int]:
    """The places nearest to 90% and 95% of the length, one after the other."""
    test = min(places[1:], key=lambda place: abs(place - (1 - HELD_OUT_SHARE) * length))
    before = [place for place in places if place < test]
    return [min(before, key=lambda place: abs(place - (1 - 2 * HELD_OUT_SHARE) * length)), test]
