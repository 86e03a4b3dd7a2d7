"""What a text shares word for word with the training works.

Words are compared, not characters: without case, punctuation and line ends, so that a recital with
other commas is still one. The index is a suffix array of the training text's words, in files that
are mapped into memory; to look a text up reads a few pages of them.
"""

import dataclasses
import json
import re
import shlex
import shutil
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt32
from pydivsufsort import divsufsort

from gothic_jax.errors import UserError
from gothic_jax.machine import manifest
from gothic_jax.machine.files import UNSOUND, parse_json, sha256
from gothic_jax.text.lines import UNSPACED
from gothic_jax.text.works import PROCESSED, find_text, read_text, split_works, works_of

COPIED_WORDS = 8
"""So many words in a row count as copied: fewer are often shared by accident."""
MAX_NGRAM = 10
PASSAGE_WORDS = 150
"""The held-out works are measured in passages of about the length of a sample."""
BASELINE_PASSAGES = 200
# In scripts without spaces between words each character counts as one.
_LETTER = rf"(?![{UNSPACED}])\w"
_WORD = re.compile(rf"(?:{_LETTER})+(?:['\u2019](?:{_LETTER})+)*|(?=[{UNSPACED}])\w")
_WORK_END = 0
"""The id between two works: no span reaches over it."""


class Span(NamedTuple):
    """Words of a text that are in a training work, too."""

    start: int
    """Of the first word in the text measured, counted in words."""
    words: int
    work: str
    voice: str
    place: int
    """Of the first word in the work, counted in words."""


@dataclasses.dataclass(frozen=True)
class Novelty:
    """How much of a text is its own."""

    words: int
    longest: Span | None
    """The longest span shared with a training work; None where no word is shared."""
    spans: list[Span]
    """All maximal spans of COPIED_WORDS or more, in order."""
    copied: float
    """The share of words that lie in these, 0 to 1."""
    new_ngrams: list[float]
    """For n = 1, ..., MAX_NGRAM the share of the text's n-grams that are in no training work;
    shorter where the text has no n-grams of that length."""

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "words": self.words,
            "longest_copied_span": self.longest and self.longest._asdict(),
            "copied": self.copied,
            "new_ngrams": self.new_ngrams,
        }


def find_words(text: str, start: int = 0) -> list[re.Match[str]]:
    """The words of a text from a character on, and their positions."""
    return list(_WORD.finditer(text, start))


def is_complete(word: re.Match[str]) -> bool:
    """Whether a word of a text stays as it is, whatever text may follow."""
    rest = word.string[word.end() : word.end() + 2]
    return rest not in ("", "'", "\u2019")


def word_key(word: str) -> str:
    """What is compared of a word."""
    return word.casefold().replace("\u2019", "'")


class Index:
    """The words of a training text in the order of their suffixes."""

    def __init__(
        self,
        vocabulary: Sequence[str],
        words: UInt32[np.ndarray, " n"],
        suffixes: Int32[np.ndarray, " n"],
        works: Sequence[dict[str, Any]],
    ) -> None:
        """`works` holds `title`, `voice` and `start`, the index of its first word, in order."""
        self._ids = {word: index for index, word in enumerate(vocabulary, start=_WORK_END + 1)}
        self._words = words
        self._suffixes = suffixes
        self._works = works

    @cached_property
    def _starts(self) -> Int[np.ndarray, " work"]:
        return np.array([work["start"] for work in self._works])

    def measure(self, text: str, tick: Callable[[], object] = lambda: None) -> Novelty:
        """What `text` shares with the training works.

        `tick` is called for each word: what it raises ends the measuring.
        """
        keys = [word_key(match[0]) for match in find_words(text)]
        unknown = len(self._ids) + 1
        query = np.array([self._ids.get(key, unknown) for key in keys], np.uint32)
        n = len(query)
        lengths = np.zeros(n, np.int64)
        places = np.zeros(n, np.int64)
        for start in range(n):
            tick()
            lengths[start], places[start] = self._longest_match(query[start:])
        # A match is maximal unless the one before it already holds it.
        maximal = [i for i in range(n) if lengths[i] and (i == 0 or lengths[i - 1] <= lengths[i])]
        spans = [self._span(i, int(lengths[i]), int(places[i])) for i in maximal]
        longest = max(spans, key=lambda span: span.words, default=None)
        copied = [span for span in spans if span.words >= COPIED_WORDS]
        return Novelty(
            words=n,
            longest=longest,
            spans=copied,
            copied=float(_covered(copied, n).mean()) if n else 0.0,
            new_ngrams=[
                float((lengths[: n - size + 1] < size).mean())
                for size in range(1, min(MAX_NGRAM, n) + 1)
            ],
        )

    @cached_property
    def _big_endian(self) -> bytes:
        """The words, so that their bytes are in the order that they are in."""
        return self._words.astype(">u4").tobytes()

    def has(self, keys: Sequence[str]) -> bool:
        """Whether a training work has these words, given by their keys, one after the other."""
        ids = [self._ids.get(key, _WORK_END) for key in keys]
        if _WORK_END in ids:
            return False
        wanted = np.array(ids, ">u4").tobytes()
        words, size = self._big_endian, len(wanted)

        def words_at(place: int) -> bytes:
            return words[4 * place : 4 * place + size]

        # Bytes are compared in a twentieth of the time that arrays take.
        suffixes = self._suffixes.data
        rank = bisect_left(suffixes, wanted, key=words_at)
        return rank < len(suffixes) and words_at(suffixes[rank]) == wanted

    def _longest_match(self, query: UInt32[np.ndarray, " m"]) -> tuple[int, int]:
        """The length and the place of the longest beginning of `query` in the training text.

        By bisection: the suffixes next to the query's place in their order share most with it.
        """
        low, high = 0, len(self._suffixes)
        best = (0, 0)
        while low < high:
            middle = (low + high) // 2
            place = int(self._suffixes[middle])
            # A few words decide nearly always, however long the text is.
            shared, step = 0, 16
            while step and shared < len(query):
                part = query[shared : shared + step]
                there = self._words[place + shared : place + shared + len(part)]
                differ = np.flatnonzero(part[: len(there)] != there)
                step = 0 if differ.size or len(there) < len(part) else 2 * step
                shared += int(differ[0]) if differ.size else len(there)
            best = max(best, (shared, place))
            if shared == len(query):
                return best
            end = place + shared
            if end == len(self._words) or self._words[end] < query[shared]:
                low = middle + 1
            else:
                high = middle
        return best

    def _span(self, start: int, words: int, place: int) -> Span:
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        work = self._works[number]
        return Span(start, words, work["title"], work["voice"], place - work["start"])


def _covered(spans: Sequence[Span], words: int) -> Bool[np.ndarray, " n"]:
    """Which of so many words lie in one of the spans."""
    inside = np.zeros(words, bool)
    for span in spans:
        inside[span.start : span.start + span.words] = True
    return inside


def _titles(path: Path, voices: Sequence[str]) -> list[str]:
    """The titles of a text's works as gothic-data's report has them, or their numbers."""
    numbers = [f"work {number}" for number in range(1, len(voices) + 1)]
    try:
        works = parse_json((path.parent / "report.json").read_bytes())["works"]
        split = path.stem.rpartition("_")[2]
        known = [work for work in works if work["split"] == split and work["voice"] in voices]
        if [work["voice"] for work in known] == list(voices):
            return [str(work["title"]) for work in known]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a text of the user's own
    return numbers


def _folder(path: Path, digest: str) -> Path:
    return path.parent / ".novelty" / f"{path.stem}.{digest[:16]}"


def build(path: Path, held_out: str | None) -> Path:
    """Writes the index of a training text beside it, with the figures of a held-out text.

    Returns its folder. Raises UserError where the training text is missing or empty.
    """
    text = read_text(path)
    works = works_of(path, text)
    titles = _titles(path, [work.voice for work in works])
    keys = [[word_key(match[0]) for match in find_words(work.text)] for work in works]
    vocabulary = sorted({key for work_keys in keys for key in work_keys})
    ids = {word: index for index, word in enumerate(vocabulary, start=_WORK_END + 1)}
    table: list[dict[str, Any]] = []
    words: list[int] = []
    for work, title, work_keys in zip(works, titles, keys, strict=True):
        table.append({"title": title, "voice": work.voice, "start": len(words)})
        words += [ids[key] for key in work_keys]
        words.append(_WORK_END)
    array = np.array(words, np.uint32)
    suffixes = np.asarray(divsufsort(array), np.int32)
    index = Index(vocabulary, array, suffixes, table)
    baseline = None if held_out is None else human_baseline(index, held_out)
    folder = _folder(path, sha256(text.encode()))
    content = {"vocabulary": vocabulary, "works": table, "baseline": baseline}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, value in (("words", array), ("suffixes", suffixes)):
            np.save(folder / f"{name}.npy", value)
        (folder / "index.json").write_text(json.dumps(content), encoding="utf-8")
        with ThreadPoolExecutor(manifest.HASHERS) as hashers:
            manifest.write(folder, {}, hashers)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    # Indexes of earlier texts of this name stay: models that read those may still be asked.
    return folder


def held_out_passages(text: str) -> list[str]:
    """A text in passages of PASSAGE_WORDS; the rest of each work is left out."""
    works = split_works(text)
    return [passage for work in works for passage in cut_passages(work.text, PASSAGE_WORDS)]


def human_baseline(index: Index, text: str) -> dict[str, Any]:
    """What passages of PASSAGE_WORDS of other works share with the training works: means, and the
    longest copied span's median and maximum, in words."""
    passages = held_out_passages(text)
    if not passages:
        raise UserError(f"the held-out text has no passage of {PASSAGE_WORDS} words; name another")
    step = -(-len(passages) // BASELINE_PASSAGES)
    measured = [index.measure(passage) for passage in passages[::step]]
    return {"passages": len(measured), "passage_words": PASSAGE_WORDS} | summarise(measured)


def cut_passages(text: str, words: int) -> list[str]:
    """The text in passages of so many words; a shorter rest is left out."""
    found = find_words(text)
    return [
        text[found[start].start() : found[start + words - 1].end()]
        for start in range(0, len(found) - words + 1, words)
    ]


def summarise(measured: Sequence[Novelty]) -> dict[str, Any]:
    """Means over some texts, and the longest copied span's median and maximum, in words.

    All texts must have MAX_NGRAM words or more.
    """
    longest = sorted(one.longest.words if one.longest else 0 for one in measured)
    return {
        "longest_median": longest[len(longest) // 2],
        "longest_max": longest[-1],
        "copied": float(np.mean([one.copied for one in measured])),
        "new_ngrams": np.mean([one.new_ngrams for one in measured], axis=0).tolist(),
    }


class Loaded(NamedTuple):
    """An index from its files."""

    words: Index
    baseline: dict[str, Any] | None
    """As `human_baseline` gives it; None where the index was built without a held-out text."""


def load(path: Path, digest: str) -> Loaded:
    """The index of the training text of this SHA-256, which lay at `path`.

    Raises UserError, which names the command that builds it, where it is missing or damaged.
    """
    folder = _folder(path, digest)
    cure = f"`{shlex.join(['gothic-index', '--file', str(path)])}` builds it"
    if not folder.exists():
        if not path.is_file():
            raise UserError(
                f"the training text {path} is not here, where the run's settings have it; name it"
                " where it is now with --train-file"
            )
        if sha256(read_text(path).encode()) != digest:
            raise UserError(
                f"{path} is not the text that the model was trained on; put that text back, or"
                " name it where it is now with --train-file"
            )
        raise UserError(f"there is no index of {path}; {cure}")
    try:
        manifest.verify(folder)
        content = parse_json((folder / "index.json").read_bytes())
        words, suffixes = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("words", "suffixes")
        )
        return Loaded(
            Index(content["vocabulary"], words, suffixes, content["works"]), content["baseline"]
        )
    except (OSError, UserError, *UNSOUND) as error:
        raise UserError(f"the index of {path} cannot be used ({error}); {cure} again") from error


def load_for(config: Mapping[str, Any], train_sha256: str, file: str | None = None) -> Loaded:
    """The index of the text that a run with these settings was trained on; as `load`.

    `file` is where that text is now, if not where the settings have it. Raises UserError, too,
    where nobody says what the model was trained on: its hash is then all zeros.
    """
    if not train_sha256.strip("0"):
        raise UserError(
            "nobody says what text this model of another program was trained on, so that nothing"
            " can be compared with it; leave out the options that compare"
        )
    folder = Path(config["data_dir"]) if file is None else PROCESSED
    return load(find_text(file or config["train_file"], folder), train_sha256)


def describe(novelty: Novelty, text: str, baseline: dict[str, Any] | None) -> list[str]:
    """The figures in lines, beside those of the held-out works."""
    lines = [f"{novelty.words:,} words"]
    if (span := novelty.longest) is not None:
        found = find_words(text)
        quoted = text[found[span.start].start() : found[span.start + span.words - 1].end()]
        shown = quoted if len(quoted) < 80 else f"{quoted[:60]} ... {quoted[-15:]}"
        lines.append(
            f"longest span of a training work: {span.words} words,"
            f' "{" ".join(shown.split())}", {span.work}{f" ({span.voice})" if span.voice else ""},'
            f" word {span.place + 1:,}"
        )
    lines.append(f"in copied spans of {COPIED_WORDS} words or more: {novelty.copied:.1%}")
    new = "  ".join(f"{share:.0%}" for share in novelty.new_ngrams)
    lines.append(f"new n-grams, n = 1 to {len(novelty.new_ngrams)}: {new}")
    if baseline is not None:
        new = "  ".join(f"{share:.0%}" for share in baseline["new_ngrams"])
        lines.append(
            f"held-out works, {baseline['passages']} passages of {baseline['passage_words']} words:"
            f" longest span {baseline['longest_median']}, at most {baseline['longest_max']};"
            f" copied {baseline['copied']:.1%}; new n-grams {new}"
        )
    return lines


def highlighted(novelty: Novelty, text: str, on: str, off: str) -> str:
    """The text with `on` and `off` around each run of copied words."""
    found = find_words(text)
    inside = _covered(novelty.spans, len(found) + 1)
    pieces, position = [], 0
    for begin, end in np.flatnonzero(np.diff(np.concatenate([[False], inside]))).reshape(-1, 2):
        first, last = found[begin].start(), found[end - 1].end()
        pieces += [text[position:first], on, text[first:last], off]
        position = last
    return "".join([*pieces, text[position:]])
