"""The texts of each voice: the manifest, one's own files, and the processed files with a report."""

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gothic_jax.errors import UserError
from gothic_jax.machine.files import sha256, write_all_atomically
from gothic_jax.text.cleaning import clean, clean_plain, words
from gothic_jax.text.download import Item, is_url
from gothic_jax.text.repeats import MAX_OVERLAP, NGRAM, Overlap, Repeats, Text
from gothic_jax.text.works import Work as VoicedText
from gothic_jax.text.works import join_works

SPLITS = ("train", "val", "test")
MIXED = "mixed"

HELD_OUT_SHARE = 0.05  # of one's own texts, for val and for test each


@dataclass(frozen=True)
class Work:
    """One row of the manifest, works.csv."""

    voice: str
    file: str  # VOICE/NAME.txt, below data/raw and in a mirror
    title: str
    form: str
    split: str
    bytes: int
    sha256: str
    url: str
    begin: str  # markers, see cleaning.keep_ranges
    end: str


def load_manifest() -> list[Work]:
    """Every work, in the manifest's order."""
    text = resources.files("gothic_jax.text").joinpath("works.csv").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
    return [Work(**row | {"bytes": int(row["bytes"])}) for row in rows]


def items(works: Iterable[Work], mirror: str | None, raw: Path) -> list[Item]:
    """The downloads of these works, from their own addresses or a mirror. Raises UserError."""
    if mirror is not None and not is_url(mirror) and not Path(mirror).is_dir():
        raise UserError(f"--mirror {mirror}: no such folder; name one that holds VOICE/NAME.txt")
    return [_item(work, mirror, raw) for work in works]


def _item(work: Work, mirror: str | None, raw: Path) -> Item:
    source = work.url if mirror is None else f"{mirror.rstrip('/')}/{work.file}"
    cure = "check the network" if mirror is None else "complete the mirror"
    if work.split == "test":
        cure = f"it is a test work: leave those out with --splits train,val, or {cure}"
    return Item(source, raw / work.file, work.bytes, work.sha256, cure)


def read_work(work: Work, raw: Path) -> Text:
    """A work of the manifest, read from `raw` and cleaned."""
    body = clean((raw / work.file).read_bytes(), work.begin, work.end)
    return Text(work.voice, work.file, work.title, work.split, body)


def own_texts(voice: str, pattern: str) -> list[Text]:
    """One's own files, cleaned and split: by file, or a single file by position.

    Raises UserError if the pattern matches nothing, or a file is empty or not text.
    """
    paths = _matches(pattern)
    bodies = {path: _read_own(path) for path in paths}
    if len(paths) == 1:
        return _split_by_position(voice, paths[0], bodies[paths[0]])
    # The order must depend on what the files are, not on where they are.
    order = sorted(paths, key=lambda p: (sha256(bodies[p].encode()), p.name))
    held_out = max(1, round(len(order) * HELD_OUT_SHARE))
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:held_out], "val"))
    if len(order) > 2:
        splits.update(dict.fromkeys(order[held_out : 2 * held_out], "test"))
    return [_own_text(voice, path, splits[path], bodies[path]) for path in paths]


def _matches(pattern: str) -> list[Path]:
    """The files that match, sorted. A file that exists is taken as it is, and so is the longest
    existing folder that a pattern starts with: names may contain brackets."""
    try:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"--add: {pattern} is a folder; write '{path}/*.txt'")
        if path.is_file():
            return [path]
        folder = next(parent for parent in path.parents if parent.is_dir())
        found = sorted(p for p in folder.glob(str(path.relative_to(folder))) if p.is_file())
    except (ValueError, RuntimeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--add: {pattern} cannot be searched ({reason}); check the path"
        ) from error
    if not found:
        cure = "write [[] for [ in a name" if "[" in pattern else "quote the pattern"
        raise UserError(f"--add: no file matches {pattern}; {cure}, and check the path")
    return found


def _read_own(path: Path) -> str:
    try:
        body = clean_plain(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not plain text: {error}; save it as UTF-8 text") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; check its permissions, or leave it out"
        ) from error
    if not body:
        raise UserError(f"{path} contains no text; leave it out of the pattern")
    return body


def _own_text(voice: str, path: Path, split: str, body: str) -> Text:
    return Text(voice, f"{voice}/{path.name}", path.stem, split, body)


def _split_by_position(voice: str, path: Path, body: str) -> list[Text]:
    paragraphs = body.split("\n\n")
    if len(paragraphs) < 2:
        print(
            f"warning: {path} is a single paragraph, so nothing is held out for validation;"
            " separate its paragraphs with blank lines, or give several files",
            file=sys.stderr,
        )
    val = _cut(paragraphs, 1 - 2 * HELD_OUT_SHARE, 1, len(paragraphs) - 2)
    test = _cut(paragraphs, 1 - HELD_OUT_SHARE, val + 1, len(paragraphs) - 1)
    parts = (paragraphs[:val], paragraphs[val:test], paragraphs[test:])
    return [
        _own_text(voice, path, split, "\n\n".join(part))
        for split, part in zip(SPLITS, parts, strict=True)
        if part
    ]


def _cut(paragraphs: Sequence[str], share: float, least: int, most: int) -> int:
    """The number of paragraphs that hold about this share of the text, within bounds."""
    target = share * sum(map(len, paragraphs))
    length = 0
    for i, paragraph in enumerate(paragraphs):
        if length + len(paragraph) / 2 >= target:
            return max(least, min(i, most))
        length += len(paragraph)
    return max(least, most)


def report(
    texts: Sequence[Text], repeats: Sequence[Repeats], overlaps: Sequence[Overlap]
) -> dict[str, Any]:
    """The content of report.json."""
    works = [
        {
            "voice": text.voice,
            "file": text.file,
            "title": text.title,
            "split": text.split,
            "words": len(words(text.body)),
            "bytes": len(text.body.encode()),
        }
        for text in texts
    ]
    return {
        "counts": _counts(works),
        "duplicates": {
            "paragraphs": sum(r.paragraphs for r in repeats),
            "words": sum(r.words for r in repeats),
            "works": [asdict(r) for r in repeats],
        },
        "overlap": {
            "ngram_words": NGRAM,
            "limit": MAX_OVERLAP,
            "sequences": sum(o.sequences for o in overlaps),
            "in_train": sum(o.in_train for o in overlaps),
            "leaks": [o.file for o in overlaps if o.leak],
            "works": [asdict(o) for o in overlaps],
        },
        "works": works,
    }


def _counts(works: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Works, words and bytes (of the bodies, in UTF-8) per voice and split, and of all mixed."""
    voices = dict.fromkeys(work["voice"] for work in works)
    table: dict[str, dict[str, dict[str, int]]] = {voice: {} for voice in (*voices, MIXED)}
    for work in works:
        for voice in (work["voice"], MIXED):
            empty = {"works": 0, "words": 0, "bytes": 0}
            cell = table[voice].setdefault(work["split"], empty)
            cell["works"] += 1
            cell["words"] += work["words"]
            cell["bytes"] += work["bytes"]
    return table


def write_corpus(folder: Path, texts: Sequence[Text], contents: dict[str, object]) -> None:
    """Writes a file per voice and split, the mixed ones and the report: all of them or none.

    Removes the files of voices and splits that this corpus lacks. Raises UserError.
    """
    files: dict[str, list[str]] = {}
    for text in texts:
        work = join_works([VoicedText(text.voice, text.body)])
        for voice in (text.voice, MIXED):
            files.setdefault(f"{voice}_{text.split}.txt", []).append(work)
    outputs = {name: "".join(works).encode() for name, works in files.items()}
    outputs["report.json"] = (json.dumps(contents, ensure_ascii=False, indent=1) + "\n").encode()
    try:
        write_all_atomically(folder, outputs)
        for split in SPLITS:
            for path in folder.glob(f"*_{split}.txt"):
                if path.name not in outputs:
                    path.unlink()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; check its permissions and the disk's "
            "free space, or name another --data-dir"
        ) from error
