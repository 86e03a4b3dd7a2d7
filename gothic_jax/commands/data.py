"""`gothic-data`: downloads the texts of each voice, cleans and splits them, checks for leaks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.machine.process import catch_interrupts
from gothic_jax.text.typography import MODES, PLAIN
from gothic_jax.text.voices import RESERVED_VOICES, VOICE_NAME
from gothic_jax.text.works import SPLITS

if TYPE_CHECKING:
    from gothic_jax.text.corpus import Work
    from gothic_jax.text.own import OwnFile


@command("gothic-data")
def main(argv: Sequence[str]) -> None:
    """Writes the texts of each voice and split, and a report about them."""
    args = _parser().parse_args(argv)
    # Slow imports, for which --help and mistyped options should not wait.
    from gothic_jax.text import corpus, own, repeats
    from gothic_jax.text.download import fetch

    catch_interrupts()  # the progress bar has hidden the cursor, and shows it again

    manifest = corpus.load_manifest()
    library = corpus.load_library()
    if args.list:
        _print_list(manifest, library)
        return
    splits = _chosen(args.splits, SPLITS, "split", "--splits")
    known = tuple(dict.fromkeys(work.voice for work in (*manifest, *library)))
    voices = () if args.voices == "none" else _chosen(args.voices, known, "voice", "--voices")
    added = args.add or []
    taken = (*voices, *(work.voice for work in library if args.library))
    _check_voices(taken, added)
    chosen = (*voices, *(voice for voice, _ in added))

    wanted = [work for work in (*manifest, *library) if work.voice in voices]
    wanted += [work for work in library if args.library and work.voice not in voices]
    works = [work for work in wanted if work.split in splits]
    texts, files = [], []
    reading = own.Reading(args.encoding, args.typography, args.column)
    for voice, pattern in added:
        more, read = own.read_all(voice, pattern, reading)
        texts += more
        files += read
    raw = args.data_dir / "raw"
    fetch(corpus.items(works, args.mirror, raw), args.jobs)
    texts = corpus.read_works(works, raw) + [text for text in texts if text.split in splits]
    if not texts:
        raise UserError(f"--splits {args.splits} leaves no texts; name more splits or voices")

    dropped: list[repeats.Repeats] = []
    if not args.keep_duplicates:
        texts, dropped = repeats.drop_repeats(texts)
    overlaps = repeats.find_overlaps(texts)
    if not args.allow_leaks:
        repeats.refuse_leaks(overlaps)
    placed = [(text, corpus.files_of(text, chosen, library=args.library)) for text in texts]
    report = corpus.report(placed, files, dropped, overlaps)
    corpus.write_corpus(args.data_dir / "processed", placed, report)
    for line in map(_done_to, files):
        if line:
            print(line)
    _print_summary(report)


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="gothic-data",
        description="Downloads the texts of each voice, cleans them and writes one file per voice "
        "and split to DATA_DIR/processed, with a report.",
    )
    add = parser.add_argument
    add("--mirror", metavar="DIR_OR_URL", help="take the texts from here, as VOICE/NAME.txt")
    add("--splits", default="train,val,test", help="splits to write, separated by commas")
    add("--voices", default="wilde,lovecraft", help="voices to download, or `none`")
    add(
        "--library",
        action="store_true",
        help="download 249 works of the period, too: writes library_*.txt, and all_*.txt with "
        "everything",
    )
    add("--list", action="store_true", help="list the voices and their works, and do nothing else")
    add(
        "--add",
        metavar="NAME=GLOB",
        action="append",
        type=parse_add,
        help="one more voice, from your own files (text, Markdown, HTML, EPUB, JSONL, CSV) or a "
        "folder of them (may be given several times)",
    )
    add("--column", default="", help="of your own CSV files: the one that holds the texts")
    add("--encoding", type=_encoding, help="of your own files, where it is not detected")
    add(
        "--typography",
        choices=MODES,
        default=PLAIN,
        help="of your own files: straight quotes, one form of dashes and dots; or all as it is",
    )
    add("--data-dir", type=Path, default=Path("data"), help="folder of raw/ and processed/")
    add("--jobs", type=positive_int, default=8, help="parallel downloads")
    add("--keep-duplicates", action="store_true", help="keep paragraphs that occur in two works")
    add("--allow-leaks", action="store_true", help="do not stop if held-out text occurs in train")
    return parser


def _encoding(name: str) -> str:
    from gothic_jax.text.encodings import known

    if not known(name):
        raise UserError(f"--encoding {name}: there is no such encoding; try cp1252, or utf-16")
    return name


def positive_int(text: str) -> int:
    """An int of 1 or more; raises ValueError, which argparse reports."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_add(text: str) -> tuple[str, str]:
    """The voice and the pattern of `NAME=GLOB`. Raises UserError."""
    voice, equals, pattern = text.partition("=")
    if not equals or not pattern or not VOICE_NAME.fullmatch(voice):
        raise UserError(
            f"--add {text}: write NAME=GLOB, such as poe='texts/poe/*.txt'; NAME consists of "
            "lower-case letters, digits, - and _"
        )
    if voice in RESERVED_VOICES:
        raise UserError(f"--add {text}: the name {voice} is reserved; choose another")
    return voice, pattern


def _chosen(text: str, known: Sequence[str], noun: str, flag: str) -> tuple[str, ...]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        few = len(known) <= len(SPLITS)
        cure = f"choose among {', '.join(known)}" if few else "`gothic-data --list` lists them"
        raise UserError(
            f"{flag} {text}: unknown {noun} {', '.join(unknown) or '(none named)'}; {cure}"
        )
    return tuple(name for name in known if name in chosen)


def _check_voices(voices: Sequence[str], added: Sequence[tuple[str, str]]) -> None:
    seen = set(voices)
    for voice, pattern in added:
        if voice in seen:
            raise UserError(
                f"--add {voice}={pattern}: the voice {voice} exists already; choose another name "
                "(or leave that voice out with --voices)"
            )
        seen.add(voice)
    if not seen:
        raise UserError("--voices none leaves no texts; add your own with --add NAME=GLOB")


def _done_to(file: "OwnFile") -> str:
    """What was done to a file of one's own, in words; nothing if it is as it was."""
    parts = []
    if file.encoding != "utf-8":
        parts.append(f"read as {file.encoding}")
    if file.documents > 1:
        parts.append(f"has {file.documents:,} documents")
    if file.gutenberg_words:
        parts.append(
            f"left out {file.gutenberg_words:,} words of Project Gutenberg's headers and licences"
        )
    if file.changes:
        changes = ", ".join(f"{count:,} {kind}" for kind, count in file.changes.items())
        parts.append(f"changed {changes} (--typography keep leaves them)")
    return f"{file.path}: {'; '.join(parts)}." if parts else ""


def _print_list(manifest: "Sequence[Work]", library: "Sequence[Work]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("voice", "author", box=None)
    for unit in ("works", "KB"):
        table.add_column(unit, justify="right")
    works: dict[str, list[Work]] = {}
    for work in (*manifest, *library):
        works.setdefault(work.voice, []).append(work)
    for voice, own in works.items():
        authors = {work.author for work in own}
        author = own[0].author if len(authors) == 1 else f"{len(authors)} authors"
        table.add_row(voice, author, str(len(own)), f"{sum(w.bytes for w in own) // 1000:,}")
    Console(highlight=False).print(table)


def _print_summary(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("voice", "split", box=None)
    for unit in ("works", "words", "bytes"):
        table.add_column(unit, justify="right")
    for voice, splits in report["counts"].items():
        for split in SPLITS:
            if split in splits:
                table.add_row(voice, split, *(f"{n:,}" for n in splits[split].values()))
    console = Console(highlight=False)
    console.print(table)
    dropped, overlap = report["duplicates"], report["overlap"]
    console.print(
        f"Dropped {dropped['paragraphs']:,} repeated paragraphs of train "
        f"({dropped['words']:,} words)."
    )
    console.print(
        f"{overlap['in_train']:,} of {overlap['sequences']:,} held-out "
        f"{overlap['ngram_words']}-word sequences occur in train."
    )
    for work in overlap["works"]:
        if work["in_train"]:
            console.print(f"  {work['share']:.2%} of {work['file']}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
