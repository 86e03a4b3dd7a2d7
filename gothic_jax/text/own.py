"""One's own texts: found, decoded, freed of what is not theirs, and split.

What happens to a file is counted, so that it can be said: nothing of it is changed in silence.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from gothic_jax.errors import UserError
from gothic_jax.machine.files import sha256
from gothic_jax.text import forms, gutenberg, lines, typography
from gothic_jax.text.cleaning import words
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
    documents: int
    gutenberg_words: int
    """Words of Project Gutenberg's headers and licences, which were left out."""
    changes: dict[str, int]
    """Of the typography, by kind."""


@dataclass(frozen=True)
class Reading:
    """How one's own files are to be read."""

    encoding: str | None = None
    """None: detected."""
    typography: str = typography.PLAIN
    """One of `typography.MODES`."""
    column: str = ""
    """Of CSV files."""


def read_all(voice: str, pattern: str, reading: Reading) -> tuple[list[Text], list[OwnFile]]:
    """The documents of the files that match a pattern, clean and split; a single one by position.

    Raises UserError where nothing matches, or a file is not text.
    """
    paths = _matches(pattern)
    read = {path: _read(path, voice, reading) for path in paths}
    files = [file for _, file in read.values()]
    works = [work for path, (bodies, _) in read.items() for work in _named(path, bodies)]
    if len(works) == 1:
        return _split_by_position(voice, paths[0], works[0].body), files
    # The order must depend on what the documents are, not on where they are.
    order = sorted(works, key=lambda work: (sha256(work.body.encode()), work.name))
    held_out = max(1, round(len(order) * HELD_OUT_SHARE))
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:held_out], "val"))
    if len(order) > 2:
        splits.update(dict.fromkeys(order[held_out : 2 * held_out], "test"))
    return [
        Text(voice, f"{voice}/{work.name}", work.title, splits[work], work.body) for work in works
    ], files


class _Document(NamedTuple):
    name: str
    title: str
    body: str


def _named(path: Path, bodies: Sequence[str]) -> list[_Document]:
    if len(bodies) == 1:
        return [_Document(path.name, path.stem, bodies[0])]
    return [
        _Document(f"{path.name}#{number}", f"{path.stem} {number}", body)
        for number, body in enumerate(bodies, 1)
    ]


def clean_own(text: str, mode: str = typography.PLAIN) -> tuple[str, int, dict[str, int]]:
    """A document's text as it is trained on; words of Gutenberg's left out; changes by kind."""
    text = lines.unify(text)
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
    return shielded, left_out, changes


def _read(path: Path, voice: str, reading: Reading) -> tuple[list[str], OwnFile]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; check its permissions, or leave it out"
        ) from error
    try:
        documents, encoding = forms.documents(path, raw, reading.encoding, reading.column)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    bodies, left_out = [], 0
    changes: Counter[str] = Counter()
    for document in documents:
        body, gutenbergs, changed = clean_own(document, reading.typography)
        left_out += gutenbergs
        changes.update(changed)
        if body.strip():
            bodies.append(body)
    if not bodies:
        raise UserError(f"{path} contains no text; leave it out of the pattern")
    return bodies, OwnFile(str(path), voice, encoding, len(bodies), left_out, dict(changes))


def _matches(pattern: str) -> list[Path]:
    """The text files that match, sorted. What exists is taken as it is, and so is the longest
    existing folder that a pattern starts with: names may contain brackets."""
    try:
        path = Path(pattern).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.suffix.lower() in forms.READ and p.is_file()]
            if not found:
                raise UserError(
                    f"--add: {pattern} holds no file of {', '.join(forms.READ)}; name the files"
                )
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
    return [
        Text(voice, f"{voice}/{path.name}", path.stem, split, part)
        for split, part in zip(SPLITS, parts, strict=False)
    ]


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
