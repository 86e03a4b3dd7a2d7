"""Text that occurs more than once: paragraphs repeated in train, held-out text that is in train."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Int32, UInt64

from gothic_jax.errors import UserError
from gothic_jax.text.cleaning import words

NGRAM = 13  # words; a shorter match is as likely an idiom as a repeat
MAX_OVERLAP = 0.02  # share of a held-out work's n-grams that may occur in train
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0


@dataclass(frozen=True)
class Text:
    """A clean work in its split."""

    voice: str
    file: str
    title: str
    split: str
    body: str
    dropped: dict[str, int] = field(default_factory=dict)
    """Words that cleaning has dropped, by rule."""


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
    train = [text for text in texts if text.split == "train"]
    ids = _WordIds()
    paragraphs = [text.body.split("\n\n") for text in train]
    tokens = [[ids.of(words(p)) for p in work] for work in paragraphs]
    keys = _keys(len(ids))
    repeated = _repeated([[_marks(t, keys) for t in work] for work in tokens])
    bodies: list[str] = []
    repeats: list[Repeats] = []
    for text, work, ts, again in zip(train, paragraphs, tokens, repeated, strict=True):
        seen = [
            r or (len(t) < NGRAM and p.isupper()) for p, t, r in zip(work, ts, again, strict=True)
        ]
        drop = _passages([len(t) for t in ts], seen)
        if any(drop):
            dropped = [len(t) for t, gone in zip(ts, drop, strict=True) if gone]
            count = sum(length >= NGRAM for length in dropped)
            repeats.append(Repeats(text.file, count, sum(dropped)))
        bodies.append("\n\n".join(p for p, gone in zip(work, drop, strict=True) if not gone))
    left = iter(bodies)
    kept = [replace(text, body=next(left)) if text.split == "train" else text for text in texts]
    return [text for text in kept if text.body], repeats


class _WordIds:
    """A number for each word."""

    def __init__(self) -> None:
        self._ids: defaultdict[str, int] = defaultdict()
        self._ids.default_factory = self._ids.__len__

    def __len__(self) -> int:
        return len(self._ids)

    def of(self, tokens: Sequence[str]) -> Int32[np.ndarray, " word"]:
        return np.fromiter(map(self._ids.__getitem__, tokens), np.int32, len(tokens))


def _keys(count: int) -> UInt64[np.ndarray, " id"]:
    """A random number for each word id, the same in every run."""
    return np.random.default_rng(0).integers(2**64, size=count, dtype=np.uint64)


def _hashes(
    tokens: Int32[np.ndarray, " word"], keys: UInt64[np.ndarray, " id"], length: int
) -> UInt64[np.ndarray, " sequence"]:
    """A polynomial hash, modulo 2**64, of each sequence of `length` words.

    Among 20 million sequences the chance of any collision is about 1e-5.
    """
    own = keys[tokens]
    count = max(0, len(own) - length + 1)
    total = np.zeros(count, np.uint64)
    for i in range(length):
        total = total * _BASE + own[i : i + count]
    return total


def _marks(
    paragraph: Int32[np.ndarray, " word"], keys: UInt64[np.ndarray, " id"]
) -> UInt64[np.ndarray, " mark"]:
    """The hashes that a paragraph is known by: of its sequences, or of the whole if it is short."""
    return _hashes(paragraph, keys, min(NGRAM, len(paragraph))) + np.uint64(len(paragraph) < NGRAM)


def _repeated(marks: Sequence[Sequence[UInt64[np.ndarray, "..."]]]) -> list[list[bool]]:
    """For each paragraph of each work: do earlier works have at least half of its marks?"""
    flat = [mark for work in marks for mark in work]
    if not flat:
        return []
    work_of = np.repeat(np.arange(len(marks)), [sum(map(len, work)) for work in marks])
    everything = np.concatenate(flat)
    _, first, inverse = np.unique(everything, return_index=True, return_inverse=True)
    earlier = work_of[first][inverse] < work_of
    ends = np.cumsum([len(mark) for mark in flat])
    hits = np.concatenate([[0], np.cumsum(earlier)])
    halves = iter(
        2 * (hits[end] - hits[end - len(mark)]) >= len(mark) > 0
        for end, mark in zip(ends, flat, strict=True)
    )
    return [[bool(next(halves)) for _ in work] for work in marks]


def _passages(lengths: Sequence[int], repeated: Sequence[bool]) -> list[bool]:
    """Whether each paragraph, of so many words, is dropped: the long ones that are repeated, and
    runs of short repeated ones between two of those."""
    long = [i for i, length in enumerate(lengths) if length >= NGRAM]
    drop = [repeated[i] and length >= NGRAM for i, length in enumerate(lengths)]
    if not any(drop):
        return drop
    for left, right in pairwise([-1, *long, len(lengths)]):
        edges_go = (left < 0 or drop[left]) and (right == len(lengths) or drop[right])
        if edges_go and all(repeated[left + 1 : right]):
            drop[left + 1 : right] = [True] * (right - left - 1)
    return drop


def find_overlaps(texts: Sequence[Text]) -> list[Overlap]:
    """For each held-out work, its NGRAM-word sequences that also occur in train."""
    ids = _WordIds()
    held_out = [(text, words(text.body)) for text in texts if text.split != "train"]
    tokens = [ids.of(ws) for _, ws in held_out]
    train = [ids.of(words(text.body)) for text in texts if text.split == "train"]
    keys = _keys(len(ids))
    sequences = [_hashes(t, keys, NGRAM) for t in tokens]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *sequences]))
    found = np.zeros(len(wanted), bool)
    for work in train:
        place = np.searchsorted(wanted, hashes := _hashes(work, keys, NGRAM))
        place = np.minimum(place, len(wanted) - 1)
        if len(wanted):
            found[place[wanted[place] == hashes]] = True
    return [
        _overlap(text, ws, np.flatnonzero(found[np.searchsorted(wanted, own)]).tolist())
        for (text, ws), own in zip(held_out, sequences, strict=True)
    ]


def refuse_leaks(overlaps: Iterable[Overlap]) -> None:
    """Raises UserError if a held-out work shares too much with train."""
    leaks = [f"{o.file} ({o.split}, {o.share:.1%})" for o in overlaps if o.leak]
    if leaks:
        raise UserError(
            f"more than {MAX_OVERLAP:.0%} of the {NGRAM}-word sequences of held-out works occur in"
            f" train: {', '.join(leaks)}; remove these works, or go on with --allow-leaks"
        )


def _overlap(text: Text, tokens: Sequence[str], hits: Sequence[int]) -> Overlap:
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
