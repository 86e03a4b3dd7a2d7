"""The overfit compass: how much better a model knows its training text than other works.

Where a run is too long for its text, the loss on training text goes on falling while that on
validation text rises, and the model begins to recite.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Integer

from gothic_jax.machine.device import put, read_by_all
from gothic_jax.measuring.scoring import (
    Evaluator,
    LossFunction,
    batches_of,
    cut_windows,
    fitting_batch,
)
from gothic_jax.model.attention import Implementation
from gothic_jax.model.gpt import Params, graph
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import TokenText
from gothic_jax.text.voices import ALL

PASSAGES = 64
"""So many passages of the training text a model may recite."""
RECITED_WORDS = 20
"""Who continues a passage word for word for so long knows it by heart."""
NO_WORSE = 0.005
"""Bits per byte: a smaller difference between two evaluations says nothing."""
MAX_DROPOUT = 0.4

HitFunction = Callable[
    [Params, Int[np.ndarray, "batch block"], Int[np.ndarray, "batch block"]], Array
]


class Reading(NamedTuple):
    """What the compass shows after one evaluation."""

    train_bits_per_byte: float
    """On as much training text of the same voices as there is validation text."""
    gap: float
    """Bits per byte by which the validation text is predicted worse than these."""
    recites: float
    """Share of PASSAGES training passages that are continued word for word from their middle, for
    RECITED_WORDS words or to the end of the window."""


def hit_function(
    config: ModelConfig,
    compute_dtype: str,
    attention: Implementation,
    sharding: jax.sharding.Sharding | None = None,
) -> HitFunction:
    """Jitted (params, inputs, targets) -> whether each target is the likeliest token."""

    @partial(jax.jit, out_shardings=read_by_all(sharding))
    def jitted(params: Params, inputs: Array, targets: Array) -> Array:
        model = nnx.merge(graph(config, jnp.dtype(compute_dtype)), params)
        return jnp.argmax(model(inputs, attention=attention), axis=-1) == targets

    def hits(params: Params, inputs: np.ndarray, targets: np.ndarray) -> Array:
        return jitted(params, *put((inputs, targets), sharding))

    return hits


class Compass:
    """Passages of a training text, chosen once, to be read whenever the model has learned."""

    def __init__(
        self,
        train: TokenText,
        held_out: TokenText,
        tokenizer: Tokenizer,
        *,
        block_size: int,
        batch_size: int,
    ) -> None:
        sample = similar_passages(train, held_out, block_size)
        self._evaluator = Evaluator(sample, tokenizer, block_size=block_size, batch_size=batch_size)
        chosen = [sample[number] for number in _spread(len(sample), PASSAGES)]
        self._windows = cut_windows(chosen, block_size, block_size)
        self._batch_size = fitting_batch(batch_size, len(chosen))
        # A model that chooses the likeliest token each time continues a passage word for word as
        # long as each of its tokens is the likeliest after those before it: one pass tells.
        counted = np.zeros(self._windows.inputs.shape, bool)
        for row, (tokens, _) in enumerate(chosen):
            half = len(tokens) // 2
            counted[row, half : half + _tokens_of_words(tokens[half:], tokenizer)] = True
        self._counted = counted

    def __call__(
        self, losses: LossFunction, hits: HitFunction, params: Params, val_bits_per_byte: float
    ) -> Reading:
        """The reading for a model with these parameters, and this score on the held-out text."""
        known = self._evaluator(losses, params)[ALL].bits_per_byte
        inputs, targets, _ = self._windows
        right = np.zeros(inputs.shape, bool)
        for rows in batches_of(len(inputs), self._batch_size):
            right[rows] = hits(params, inputs[rows], targets[rows])
        recited = np.all(right | ~self._counted, axis=1)
        return Reading(known, val_bits_per_byte - known, float(recited.mean()))


def similar_passages(
    train: TokenText, held_out: TokenText, block_size: int
) -> list[tuple[Integer[np.ndarray, " n"], int]]:
    """Passages of the training text of a window each, with their openers.

    Of each voice of the held-out text there is about as much text, spread evenly over the voice's
    training works, or over all where it has none; less where there is not so much.
    """
    pieces = [
        (body[start : start + block_size], opener)
        for body, opener in train.works()
        for start in range(0, max(len(body) - block_size, 0) + 1, block_size)
        if len(body)
    ]
    passages = []
    for opener in sorted(set(held_out.openers.tolist())):
        own = [piece for piece in pieces if piece[1] == opener] or pieces
        tokens = int(held_out.lengths[held_out.openers == opener].sum())
        passages += [own[number] for number in _spread(len(own), -(-tokens // block_size))]
    return passages


def _spread(available: int, wanted: int) -> Sequence[int]:
    """The indices of so many of those available, evenly spread; all where there are fewer."""
    count = min(available, wanted)
    return [number * available // count for number in range(count)]


def _tokens_of_words(tokens: Integer[np.ndarray, " n"], tokenizer: Tokenizer) -> int:
    """How many tokens make up the first RECITED_WORDS words; all where there are fewer words."""
    for count in range(RECITED_WORDS, len(tokens)):
        if len(tokenizer.decode(tokens[: count + 1]).split()) > RECITED_WORDS:
            return count
    return len(tokens)


def verdict(
    reading: Reading,
    *,
    best: int,
    best_bits_per_byte: float,
    done: int,
    bits_per_byte: float,
    dropout: float,
) -> str:
    """Whether a run was too long or too short, and which settings should do better.

    `best` is the iteration of the best evaluation, `done` that of the last one.
    """
    if best == done:
        return (
            f"validation was best at the end, iteration {done:,}: a longer run may do better, such"
            f" as --max-iters {2 * done}"
        )
    worse = bits_per_byte - best_bits_per_byte
    if worse < NO_WORSE:
        return (
            f"validation was best at iteration {best:,} of {done:,}, by {worse:.3f} bits/byte: the"
            " run is about as long as its text allows"
        )
    more = min(MAX_DROPOUT, round(dropout + 0.1, 2))
    cures = [f"--max-iters {best}, so that the learning rate has come down by then"]
    if more > dropout:
        cures.append(f"--config.model.dropout={more}")
    cures.append("more text, as gothic-data --library gives")
    return (
        f"validation was best at iteration {best:,}, and is {worse:.3f} bits/byte worse at"
        f" {done:,}: the run was too long for its text (gap {reading.gap:.2f}, recites"
        f" {reading.recites:.0%}). A new run should do better with {'; or '.join(cures)}"
    )
