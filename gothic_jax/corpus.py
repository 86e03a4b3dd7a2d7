"""`gothic-data`: the texts of each voice, fetched, cleaned, split and checked for leaks."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gothic_jax.cleaning import clean, clean_plain, words
from gothic_jax.cli import ArgumentParser, command
from gothic_jax.download import Item, fetch, is_url
from gothic_jax.errors import UserError
from gothic_jax.files import sha256
from gothic_jax.texts import RESERVED_VOICES, VOICE_NAME, join_works
from gothic_jax.texts import Work as VoicedText

SPLITS = ("train", "val", "test")
MIXED = "mixed"

NGRAM = 13  # words; shorter runs are as likely an idiom as a repeat
MAX_OVERLAP = 0.02  # share of a held-out work's n-grams that may stand in train
HELD_OUT_SHARE = 0.05  # of one's own texts, for val and for test each


@dataclass(frozen=True)
class Work:
    """One row of the manifest."""

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


@dataclass(frozen=True)
class Text:
    """A clean work in its split."""

    voice: str
    file: str
    title: str
    split: str
    body: str


@dataclass(frozen=True)
class Repeats:
    """What was dropped from one work, since it stands in an earlier one."""

    file: str
    paragraphs: int
    words: int


@dataclass(frozen=True)
class Overlap:
    """How much of a held-out work stands in train too."""

    voice: str
    file: str
    title: str
    split: str
    sequences: int  # of NGRAM words
    in_train: int
    share: float
    leak: bool
    passages: list[str]  # the words of each run of sequences that stands in train


@dataclass(frozen=True)
class Own:
    """One --add: a voice from the user's own files."""

    voice: str
    pattern: str


@command("gothic-data")
def main(argv: Sequence[str]) -> None:
    """The command."""
    args = _parser().parse_args(argv)
    manifest = load_manifest()
    splits = _chosen(args.splits, SPLITS, "split", "--splits")
    known = tuple(dict.fromkeys(work.voice for work in manifest))
    voices = () if args.voices == "none" else _chosen(args.voices, known, "voice", "--voices")
    own = [parse_add(text) for text in args.add]
    _check_voices(voices, own)

    works = [work for work in manifest if work.voice in voices and work.split in splits]
    texts = [text for each in own for text in own_texts(each) if text.split in splits]
    raw = args.data_dir / "raw"
    fetch(items(works, args.mirror, raw), args.jobs)
    texts = [read_work(work, raw) for work in works] + texts
    if not texts:
        raise UserError(f"--splits {args.splits} leaves no texts; name more splits or voices")

    repeats: list[Repeats] = []
    if not args.keep_duplicates:
        texts, repeats = drop_repeats(texts)
    overlaps = find_overlaps(texts)
    if not args.allow_leaks:
        _refuse_leaks(overlaps)
    write_corpus(args.data_dir / "processed", texts, report(texts, repeats, overlaps))
    _print_summary(texts, repeats, overlaps)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="gothic-data",
        description="Fetches the texts of each voice, cleans them and writes one file per voice "
        "and split to DATA_DIR/processed, with a report.",
    )
    add = parser.add_argument
    add("--mirror", metavar="DIR_OR_URL", help="take the texts from here, as VOICE/NAME.txt")
    add("--splits", default=",".join(SPLITS), help="leave out the splits that are not named")
    add("--voices", default="wilde,lovecraft", help="voices of the manifest, or `none`")
    add(
        "--add",
        metavar="NAME=GLOB",
        action="append",
        default=[],
        help="one more voice, from your own text files (may be given several times)",
    )
    add("--data-dir", type=Path, default=Path("data"), help="holds raw/ and processed/")
    add("--jobs", type=positive_int, default=8, help="downloads at once")
    add("--keep-duplicates", action="store_true", help="keep paragraphs that stand in two works")
    add("--allow-leaks", action="store_true", help="go on where held-out works stand in train")
    return parser


def positive_int(text: str) -> int:
    """An int of 1 or more, else ValueError (which argparse tells the user)."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _chosen(text: str, known: Sequence[str], noun: str, flag: str) -> tuple[str, ...]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise UserError(
            f"{flag} {text}: unknown {noun} {', '.join(unknown) or '(none named)'}; "
            f"choose among {', '.join(known)}"
        )
    return tuple(name for name in known if name in chosen)


def parse_add(text: str) -> Own:
    """The voice and pattern of `NAME=GLOB`. Raises UserError."""
    voice, equals, pattern = text.partition("=")
    if not equals or not pattern or not VOICE_NAME.fullmatch(voice):
        raise UserError(
            f"--add {text}: write NAME=GLOB, such as poe='texts/poe/*.txt', the name in "
            "lower-case letters, digits, - and _"
        )
    if voice in RESERVED_VOICES:
        raise UserError(f"--add {text}: the name {voice} is reserved; choose another")
    return Own(voice, pattern)


def _check_voices(voices: Sequence[str], own: Sequence[Own]) -> None:
    seen = set(voices)
    for each in own:
        if each.voice in seen:
            raise UserError(
                f"--add {each.voice}={each.pattern}: there is a voice {each.voice} already; "
                "choose another name (or leave that voice out with --voices)"
            )
        seen.add(each.voice)
    if not seen:
        raise UserError("--voices none leaves no texts; add your own with --add NAME=GLOB")


def load_manifest() -> list[Work]:
    """Every work, in the manifest's order."""
    text = resources.files("gothic_jax").joinpath("works.csv").read_text(encoding="utf-8")
    return [_work(row) for row in csv.DictReader(text.splitlines())]


def _work(row: dict[str, str]) -> Work:
    return Work(
        voice=row["voice"],
        file=row["file"],
        title=row["title"],
        form=row["form"],
        split=row["split"],
        bytes=int(row["bytes"]),
        sha256=row["sha256"],
        url=row["url"],
        begin=row["begin"],
        end=row["end"],
    )


def items(works: Iterable[Work], mirror: str | None, raw: Path) -> list[Item]:
    """What to fetch for these works, from their addresses or a mirror. Raises UserError."""
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
    """A work of the manifest, clean."""
    body = clean((raw / work.file).read_bytes(), work.begin, work.end)
    return Text(work.voice, work.file, work.title, work.split, body)


def own_texts(own: Own) -> list[Text]:
    """One's own files, clean and split: by file, or a single file by position.

    Raises UserError where the pattern matches nothing or a file is empty or no text.
    """
    paths = _matches(own.pattern)
    bodies = {path: _read_own(path) for path in paths}
    if len(paths) == 1:
        return _split_by_position(own.voice, paths[0], bodies[paths[0]])
    # The order must not hang on where the files lie, only on what they are.
    order = sorted(paths, key=lambda p: (sha256(bodies[p].encode()), p.name))
    held_out = max(1, round(len(order) * HELD_OUT_SHARE))
    splits = dict.fromkeys(order, "train")
    splits.update(dict.fromkeys(order[:held_out], "val"))
    if len(order) > 2:
        splits.update(dict.fromkeys(order[held_out : 2 * held_out], "test"))
    return [_own_text(own.voice, path, splits[path], bodies[path]) for path in paths]


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    root = Path(path.anchor)
    try:
        found = sorted(p for p in root.glob(str(path.relative_to(root))) if p.is_file())
    except (ValueError, NotImplementedError, IndexError) as error:
        raise UserError(f"--add: {pattern} is no pattern of files ({error})") from error
    if path.is_dir():
        raise UserError(f"--add: {pattern} is a folder; write '{pattern}/*.txt'")
    if not found:
        raise UserError(f"--add: no file matches {pattern}; quote the pattern and check the path")
    return found


def _read_own(path: Path) -> str:
    try:
        body = clean_plain(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no plain text: {error}; save it as UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend or leave it out") from error
    if not body:
        raise UserError(f"{path} holds no text; leave it out of the pattern")
    return body


def _own_text(voice: str, path: Path, split: str, body: str) -> Text:
    return Text(voice, f"{voice}/{path.name}", path.stem, split, body)


def _split_by_position(voice: str, path: Path, body: str) -> list[Text]:
    paragraphs = body.split("\n\n")
    if len(paragraphs) < 2:
        print(
            f"warning: {path} is one paragraph, of which nothing is held out to validate with;"
            " part its paragraphs by empty lines, or give several files",
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


def drop_repeats(texts: Sequence[Text]) -> tuple[list[Text], list[Repeats]]:
    """Drops paragraphs of train of NGRAM words or more that stand in an earlier work of train.

    Standing there means that at least half of their NGRAM-word sequences do, so that a printer's
    change of a word hides no repeat. Headings, and shorter paragraphs that stand in an earlier
    work, go where nothing else is left between two dropped ones. Returns what is left, and what
    was dropped from each work.
    """
    earlier = _Seen(set(), set())
    kept: list[Text] = []
    repeats: list[Repeats] = []
    for text in texts:
        if text.split != "train":
            kept.append(text)
            continue
        paragraphs = text.body.split("\n\n")
        tokens = [words(paragraph) for paragraph in paragraphs]
        stands = [
            earlier.holds(t) or (len(t) < NGRAM and p.isupper())
            for p, t in zip(paragraphs, tokens, strict=True)
        ]
        drop = _passages(tokens, stands)
        earlier.add(tokens)
        if any(drop):
            dropped = [t for t, gone in zip(tokens, drop, strict=True) if gone]
            count = sum(len(t) >= NGRAM for t in dropped)
            repeats.append(Repeats(text.file, count, sum(map(len, dropped))))
        body = "\n\n".join(p for p, gone in zip(paragraphs, drop, strict=True) if not gone)
        if body:
            kept.append(replace(text, body=body))
    return kept, repeats


@dataclass(frozen=True)
class _Seen:
    """The sequences and short paragraphs of earlier works (as hashes: a million tuples of words
    would fill the memory)."""

    sequences: set[int]
    short: set[int]

    def add(self, tokens: Iterable[list[str]]) -> None:
        for paragraph in tokens:
            self.sequences.update(map(hash, _ngrams(paragraph)))
            if len(paragraph) < NGRAM:
                self.short.add(hash(tuple(paragraph)))

    def holds(self, paragraph: list[str]) -> bool:
        if len(paragraph) < NGRAM:
            return hash(tuple(paragraph)) in self.short
        hits = [hash(gram) in self.sequences for gram in _ngrams(paragraph)]
        return 2 * sum(hits) >= len(hits)


def _passages(tokens: Sequence[list[str]], stands: Sequence[bool]) -> list[bool]:
    """Whether each paragraph is dropped: the long ones that stand in an earlier work, and runs
    of short ones between two of those."""
    long = [i for i, paragraph in enumerate(tokens) if len(paragraph) >= NGRAM]
    drop = [stands[i] and len(paragraph) >= NGRAM for i, paragraph in enumerate(tokens)]
    if not any(drop):
        return drop
    for left, right in pairwise([-1, *long, len(tokens)]):
        edges_go = (left < 0 or drop[left]) and (right == len(tokens) or drop[right])
        if edges_go and all(stands[left + 1 : right]):
            drop[left + 1 : right] = [True] * (right - left - 1)
    return drop


def find_overlaps(texts: Sequence[Text]) -> list[Overlap]:
    """For each held-out work, the NGRAM-word sequences that also stand in train."""
    held_out = [(text, words(text.body)) for text in texts if text.split != "train"]
    wanted = {gram for _, tokens in held_out for gram in _ngrams(tokens)}
    found: set[tuple[str, ...]] = set()
    for text in texts:
        if text.split == "train":
            found.update(gram for gram in _ngrams(words(text.body)) if gram in wanted)
    return [_overlap(text, tokens, found) for text, tokens in held_out]


def _ngrams(tokens: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[i:] for i in range(NGRAM)), strict=False)


def _overlap(text: Text, tokens: Sequence[str], found: set[tuple[str, ...]]) -> Overlap:
    hits = [i for i, gram in enumerate(_ngrams(tokens)) if gram in found]
    sequences = max(0, len(tokens) - NGRAM + 1)
    share = len(hits) / sequences if sequences else 0.0
    return Overlap(
        voice=text.voice,
        file=text.file,
        title=text.title,
        split=text.split,
        sequences=sequences,
        in_train=len(hits),
        share=round(share, 6),
        leak=share > MAX_OVERLAP,
        passages=[" ".join(tokens[start:stop]) for start, stop in _runs(hits)],
    )


def _runs(hits: Sequence[int]) -> list[tuple[int, int]]:
    """The word ranges that consecutive sequences cover together."""
    runs: list[tuple[int, int]] = []
    for i in hits:
        start = runs.pop()[0] if runs and runs[-1][1] == i + NGRAM - 1 else i
        runs.append((start, i + NGRAM))
    return runs


def _refuse_leaks(overlaps: Sequence[Overlap]) -> None:
    leaks = [f"{o.file} ({o.split}, {o.share:.1%})" for o in overlaps if o.leak]
    if leaks:
        raise UserError(
            f"held-out works stand in train by more than {MAX_OVERLAP:.0%} of their {NGRAM}-word "
            f"sequences: {', '.join(leaks)}; take them out, or go on with --allow-leaks"
        )


def counts(texts: Iterable[Text]) -> dict[str, dict[str, dict[str, int]]]:
    """Works, words and bytes (of the bodies, in UTF-8) per voice and split, and of all mixed."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for text in texts:
        size = {"works": 1, "words": len(words(text.body)), "bytes": len(text.body.encode())}
        for voice in (text.voice, MIXED):
            cell = table.setdefault(voice, {}).setdefault(text.split, dict.fromkeys(size, 0))
            for unit, n in size.items():
                cell[unit] += n
    if MIXED in table:
        table[MIXED] = table.pop(MIXED)  # last
    return table


def report(
    texts: Sequence[Text], repeats: Sequence[Repeats], overlaps: Sequence[Overlap]
) -> dict[str, object]:
    """What report.json says."""
    return {
        "counts": counts(texts),
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
        "works": [
            {
                "voice": text.voice,
                "file": text.file,
                "title": text.title,
                "split": text.split,
                "words": len(words(text.body)),
                "bytes": len(text.body.encode()),
            }
            for text in texts
        ],
    }


def write_corpus(folder: Path, texts: Sequence[Text], contents: dict[str, object]) -> None:
    """Writes a file per voice and split, the mixed ones and the report, all or none of them.

    Files of voices and splits that this corpus has not are removed. Raises UserError.
    """
    files: dict[str, list[str]] = {}
    for text in texts:
        work = join_works([VoicedText(text.voice, text.body)])
        for voice in (text.voice, MIXED):
            files.setdefault(f"{voice}_{text.split}.txt", []).append(work)
    outputs = {name: "".join(works).encode() for name, works in files.items()}
    outputs["report.json"] = (json.dumps(contents, ensure_ascii=False, indent=1) + "\n").encode()
    try:
        _replace_files(folder, outputs)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror}; "
            "mend its permissions, or name another --data-dir"
        ) from error


def _replace_files(folder: Path, outputs: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in outputs}
    try:
        for name, content in outputs.items():
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for split in SPLITS:
        for path in folder.glob(f"*_{split}.txt"):
            if path.name not in outputs:
                path.unlink()


def _print_summary(
    texts: Sequence[Text], repeats: Sequence[Repeats], overlaps: Sequence[Overlap]
) -> None:
    table = Table("voice", "split", box=None)
    for unit in ("works", "words", "bytes"):
        table.add_column(unit, justify="right")
    for voice, splits in counts(texts).items():
        for split in SPLITS:
            if split in splits:
                table.add_row(voice, split, *(f"{n:,}" for n in splits[split].values()))
    console = Console(highlight=False)
    console.print(table)
    paragraphs, dropped = sum(r.paragraphs for r in repeats), sum(r.words for r in repeats)
    console.print(f"Dropped {paragraphs:,} repeated paragraphs of train ({dropped:,} words).")
    shared, sequences = sum(o.in_train for o in overlaps), sum(o.sequences for o in overlaps)
    console.print(f"{shared:,} of {sequences:,} held-out {NGRAM}-word sequences stand in train.")
    for overlap in overlaps:
        if overlap.in_train:
            console.print(f"  {overlap.share:.2%} of {overlap.file}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
