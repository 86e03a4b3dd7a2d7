"""Text that occurs more than once: paragraphs repeated in train, held-out text that is in train."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gothic_jax.errors import UserError
from gothic_jax.text.cleaning import words

NGRAM = 13  # words; a shorter match is as likely an idiom as a repeat
MAX_OVERLAP = 0.02  # share of a held-out work's n-grams that may occur in train


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
    """How much was dropped from one work because an earlier work has it."""

    file: str
    paragraphs: int
    words: int


@dataclass(frozen=True)
class Overlap:
    """How much of a held-out work also occurs in train."""

    voice: str
    file: str
    title: str
    split: str
    sequences: int  # of NGRAM words
    in_train: int
    share: float
    leak: bool
    passages: list[str]  # the words of each run of sequences that occur in train


def drop_repeats(texts: Sequence[Text]) -> tuple[list[Text], list[Repeats]]:
    """Drops from works of train the paragraphs that an earlier work of train already has.

    A paragraph of NGRAM words or more is a repeat if at least half of its NGRAM-word sequences
    occur in earlier works, so that one changed word does not hide it. Between two dropped
    paragraphs, headings and shorter paragraphs that occur in an earlier work are dropped too, if
    nothing else is left there. Returns the remaining texts, and what was dropped from each work.
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
        repeated = [
            earlier.holds(t) or (len(t) < NGRAM and p.isupper())
            for p, t in zip(paragraphs, tokens, strict=True)
        ]
        drop = _passages(tokens, repeated)
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
    """The sequences and short paragraphs of earlier works, as hashes: a million tuples of words
    would take too much memory."""

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


def _passages(tokens: Sequence[list[str]], repeated: Sequence[bool]) -> list[bool]:
    """Whether each paragraph is dropped: the long ones that are repeated, and runs of short
    repeated ones between two of those."""
    long = [i for i, paragraph in enumerate(tokens) if len(paragraph) >= NGRAM]
    drop = [repeated[i] and len(paragraph) >= NGRAM for i, paragraph in enumerate(tokens)]
    if not any(drop):
        return drop
    for left, right in pairwise([-1, *long, len(tokens)]):
        edges_go = (left < 0 or drop[left]) and (right == len(tokens) or drop[right])
        if edges_go and all(repeated[left + 1 : right]):
            drop[left + 1 : right] = [True] * (right - left - 1)
    return drop


def find_overlaps(texts: Sequence[Text]) -> list[Overlap]:
    """For each held-out work, its NGRAM-word sequences that also occur in train."""
    held_out = [(text, words(text.body)) for text in texts if text.split != "train"]
    wanted = {gram for _, tokens in held_out for gram in _ngrams(tokens)}
    found: set[tuple[str, ...]] = set()
    for text in texts:
        if text.split == "train":
            found.update(gram for gram in _ngrams(words(text.body)) if gram in wanted)
    return [_overlap(text, tokens, found) for text, tokens in held_out]


def refuse_leaks(overlaps: Iterable[Overlap]) -> None:
    """Raises UserError if a held-out work shares too much with train."""
    leaks = [f"{o.file} ({o.split}, {o.share:.1%})" for o in overlaps if o.leak]
    if leaks:
        raise UserError(
            f"more than {MAX_OVERLAP:.0%} of the {NGRAM}-word sequences of held-out works occur in"
            f" train: {', '.join(leaks)}; remove these works, or go on with --allow-leaks"
        )


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
    """The ranges of words that consecutive sequences cover together."""
    runs: list[tuple[int, int]] = []
    for i in hits:
        start = runs.pop()[0] if runs and runs[-1][1] == i + NGRAM - 1 else i
        runs.append((start, i + NGRAM))
    return runs
