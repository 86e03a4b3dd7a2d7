"""Endless random windows of a token text, as Grain batches."""

from collections.abc import Mapping

import grain.python as grain
import numpy as np
from jaxtyping import Int

from gothic_jax.model.ops import NOTHING
from gothic_jax.text.tokens import TokenText


def training_batches(
    text: TokenText,
    *,
    shape: tuple[int, ...],
    block_size: int,
    voice_dropout: float,
    voice_weights: Mapping[str, float] | None = None,
    seed: int,
    rows: slice = slice(None),
) -> grain.MapDataset:
    """An endless Grain dataset; element i is the batch of iteration i, [*shape, block_size + 1].

    Of the last axis of `shape`, only `rows` are read: a process's part of the batch of all.

    A window lies within one work. Its first token is the opener of the work's voice or, with
    probability `voice_dropout`, `<|any|>`; the rest is the work's, then NOTHING. Works are drawn by
    `TokenText.shares`, and places within a work uniformly. A place within half a window of the
    work's ends gives its first or last window: so the first and last words are read half as often
    as the rest, and those one window further in up to 1.5 times. The same seed and index give the
    same batch, whatever came before.

    Raises UserError where the weights name other voices than the text has.
    """
    shares, lengths = text.shares(voice_weights), text.lengths
    latest_start = np.maximum(lengths - block_size, 0)
    offsets = np.arange(block_size)

    def crop(_: int, rng: np.random.Generator) -> Int[np.ndarray, "*shape time"]:
        # Drawn for all rows, whichever are read, so that the parts make up the same batch.
        works = rng.choice(len(shares), size=shape, p=shares)
        places, openers = rng.random(shape)[..., rows], rng.random(shape)[..., rows]
        work = works[..., rows]
        middle = (places * lengths[work]).astype(np.int64)
        start = np.clip(middle - block_size // 2, 0, latest_start[work])[..., None] + offsets
        place = (text.ends - lengths)[work][..., None] + start
        inside = start < lengths[work][..., None]
        opener = np.where(openers < voice_dropout, text.any_voice, text.openers[work])
        body = np.where(inside, text.tokens[np.where(inside, place, 0)].astype(np.int32), NOTHING)
        return np.concatenate([opener[..., None].astype(np.int32), body], axis=-1)

    return grain.MapDataset.range(2**31).seed(seed).random_map(crop)


def batch_iterator(batches: grain.MapDataset, first: int) -> grain.DatasetIterator:
    """Batches from index `first` on, made ahead of time in a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": first})
    return iterator
