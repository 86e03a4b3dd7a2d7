"""The works of the manifest, and the processed files with a report."""

import csv
import json
import os
import signal
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from itertools import repeat
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from gothic_jax.errors import UserError
from gothic_jax.machine.files import write_all_atomically
from gothic_jax.text.cleaning import Correction, clean, words
from gothic_jax.text.download import Item, is_url
from gothic_jax.text.own import OwnFile
from gothic_jax.text.repeats import MAX_OVERLAP, NGRAM, Overlap, Repeats, Text
from gothic_jax.text.works import SPLITS, join_works
from gothic_jax.text.works import Work as VoicedText

MIXED, LIBRARY, EVERYTHING = "mixed", "library", "all"
"""Files of several voices: those asked for by name, the library's, and both together."""

BYTES_A_PROCESS = 4_000_000
"""What a process cleans in some seconds: for less, starting one more does not pay."""


@dataclass(frozen=True)
class Work:
    """One row of a manifest."""

    voice: str
    author: str  # "" where the voice says it
    file: str  # VOICE/NAME.txt or library/AUTHOR/NAME.txt, below data/raw and in a mirror
    title: str
    form: str
    split: str
    bytes: int
    sha256: str
    url: str
    begin: str  # markers, see cleaning.keep_ranges
    end: str


def load_manifest() -> list[Work]:
    """Every work of Wilde and Lovecraft, in the order of works.csv."""
    return _load("works.csv")


def load_library() -> list[Work]:
    """Every work of the wider library, in the order of library.csv."""
    return _load("library.csv")


@cache
def load_corrections() -> dict[str, list[Correction]]:
    """The passages of each file that are not its author's, from corrections.csv."""
    corrections: dict[str, list[Correction]] = {}
    for row in _rows("corrections.csv"):
        corrections.setdefault(row["file"], []).append(Correction(row["text"], row["instead"]))
    return corrections


def _rows(name: str) -> list[dict[str, Any]]:
    text = resources.files("gothic_jax.text").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _load(name: str) -> list[Work]:
    rows = _rows(name)
    names = [field.name for field in fields(Work)]
    return [
        Work(**{name: row.get(name, "") for name in names} | {"bytes": int(row["bytes"])})
        for row in rows
    ]


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
    corrections = load_corrections().get(work.file, ())
    body, dropped = clean((raw / work.file).read_bytes(), work.begin, work.end, corrections)
    return Text(work.voice, work.file, work.title, work.split, body, dropped)


def read_works(works: Sequence[Work], raw: Path) -> list[Text]:
    """The works of the manifest, as `read_work` reads them: many in several processes."""
    size = sum(work.bytes for work in works)
    processes = min(os.cpu_count() or 1, size // BYTES_A_PROCESS)
    if processes < 2:
        return [read_work(work, raw) for work in works]
    with ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool:
        # The processes begin with Ctrl-C blocked: it is this one that ends.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        texts = pool.map(read_work, works, repeat(raw))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return list(texts)


def _end_with_parent() -> None:
    """Ends this process with the one that started it, even if that is killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def files_of(text: Text, chosen: Collection[str], *, library: bool) -> list[str]:
    """The files that a text goes into, less their split: `chosen` are the voices asked for by
    name, and with `library` the whole library is written."""
    names = []
    if text.voice in chosen:
        names += [text.voice, MIXED]
    if library and text.file.startswith(f"{LIBRARY}/"):
        names.append(LIBRARY)
    return [*names, EVERYTHING] if library else names


def report(
    texts: Sequence[tuple[Text, Sequence[str]]],
    own: Sequence[OwnFile],
    repeats: Sequence[Repeats],
    overlaps: Sequence[Overlap],
) -> dict[str, Any]:
    """The content of report.json; with each text come its files, as `files_of` gives them."""
    works = [
        {
            "voice": text.voice,
            "files": list(files),
            "file": text.file,
            "title": text.title,
            "split": text.split,
            "words": len(words(text.body)),
            "bytes": len(text.body.encode()),
            "dropped_words": text.dropped,
        }
        for text, files in texts
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
        "own": [asdict(file) for file in own],
        "works": works,
    }


def _counts(works: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Works, words and bytes (of the bodies, in UTF-8) per file and split."""
    several = (MIXED, LIBRARY, EVERYTHING)
    names = dict.fromkeys(name for work in works for name in work["files"])
    order = [*(n for n in names if n not in several), *(n for n in several if n in names)]
    table: dict[str, dict[str, dict[str, int]]] = {name: {} for name in order}
    for work in works:
        for name in work["files"]:
            empty = {"works": 0, "words": 0, "bytes": 0}
            cell = table[name].setdefault(work["split"], empty)
            cell["works"] += 1
            cell["words"] += work["words"]
            cell["bytes"] += work["bytes"]
    return table


def write_corpus(
    folder: Path, texts: Sequence[tuple[Text, Sequence[str]]], contents: dict[str, object]
) -> None:
    """Writes each text into its files of its split, and the report: all of them or none.

    Removes the files of voices and splits that this corpus lacks. Raises UserError.
    """
    files: dict[str, list[str]] = {}
    for text, names in texts:
        work = join_works([VoicedText(text.voice, text.body)])
        for name in names:
            files.setdefault(f"{name}_{text.split}.txt", []).append(work)
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
