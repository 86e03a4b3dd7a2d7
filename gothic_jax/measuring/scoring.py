"""How well a model predicts a text: losses of tokens, scores of voices.

Each text token is predicted exactly once, from as much of its own work as the window holds.
Special tokens are context: they count neither as predictions nor as bytes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Integer

from gothic_jax.errors import UserError
from gothic_jax.machine.device import put, read_by_all
from gothic_jax.model.attention import Implementation, choose
from gothic_jax.model.gpt import Params, graph
from gothic_jax.model.ops import token_losses
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import ALL


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a text: total nats over so many tokens and bytes of it."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, float]:
        """All of it, for JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


class Windows(NamedTuple):
    """A text cut for evaluation; row by row what goes in, what shall come out, what counts."""

    inputs: Int[np.ndarray, "window block"]
    targets: Int[np.ndarray, "window block"]
    counts: Bool[np.ndarray, "window block"]


def cut_windows(
    works: Iterable[tuple[Integer[np.ndarray, " n"], int]], block_size: int, stride: int
) -> Windows:
    """Windows of `block_size` that together predict each token of some works once.

    A work is its tokens and its opener, which opens each of its windows, as in training. A window
    starts `stride` tokens after the one before it in the work and predicts only what that one
    did not: with a stride below `block_size`, the first tokens of a window are mere context.
    """
    if not 1 <= stride <= block_size:
        raise UserError(f"--stride must be between 1 and the block size {block_size}, not {stride}")
    rows: list[tuple[np.ndarray, int, int]] = []  # the window's tokens, its opener, first to count
    for body, opener in works:
        done = 0
        for start in range(0, len(body), stride):
            window = body[start : start + block_size]
            if start + len(window) > done:
                rows.append((window, opener, done - start))
                done = start + len(window)
    shape = (len(rows), block_size)
    windows = Windows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for row, (tokens, opener, first) in enumerate(rows):
        windows.inputs[row, 0] = opener
        windows.inputs[row, 1 : len(tokens)] = tokens[:-1]
        windows.targets[row, : len(tokens)] = tokens
        windows.counts[row, first : len(tokens)] = True
    return windows


LossFunction = Callable[
    [Params, Int[np.ndarray, "batch block"], Int[np.ndarray, "batch block"]], Array
]


def loss_function(
    config: ModelConfig,
    compute_dtype: str,
    attention: Implementation,
    sharding: jax.sharding.Sharding | None = None,
) -> LossFunction:
    """Jitted (params, inputs, targets) -> nats of each target, [batch, block].

    The batch is laid out by `sharding`; by default it goes to the default device.
    """

    @partial(jax.jit, out_shardings=read_by_all(sharding))
    def jitted(params: Params, inputs: Array, targets: Array) -> Array:
        model = nnx.merge(graph(config, jnp.dtype(compute_dtype)), params)
        return token_losses(model(inputs, attention=attention), targets)

    def losses(params: Params, inputs: np.ndarray, targets: np.ndarray) -> Array:
        return jitted(params, *put((inputs, targets), sharding))

    return losses


def losses_on(device: jax.Device, config: ModelConfig, compute_dtype: str) -> LossFunction:
    """The loss function of a model on one device, with the attention that suits it."""
    attention, _ = choose(device, config.head_dim, jnp.dtype(compute_dtype))
    return loss_function(config, compute_dtype, attention)


class Evaluator:
    """A text cut into windows once, to be scored whenever the model has learned."""

    def __init__(
        self,
        works: Iterable[tuple[Integer[np.ndarray, " n"], int]],
        tokenizer: Tokenizer,
        *,
        block_size: int,
        stride: int | None = None,
        batch_size: int,
    ) -> None:
        """`works` are tokens and openers, as `cut_windows` takes them."""
        stride = block_size if stride is None else stride
        self._windows = cut_windows(works, block_size, stride)
        if not self._windows.counts.any():
            raise UserError("the text to evaluate holds no tokens; give a longer one")
        self._tokenizer = tokenizer
        openers = set(self._windows.inputs[:, 0].tolist())
        self.voices = {v: opener for v, opener in tokenizer.voices.items() if opener in openers}
        """Of the text, with their openers."""
        self._batch_size = fitting_batch(batch_size, len(self._windows.inputs))

    def __call__(self, losses: LossFunction, params: Params) -> dict[str, Score]:
        """The score of `all` tokens, and of each voice in the text if it names any.

        Rows are summed in f64 on the host, so that the result does not depend on the batches.
        """
        inputs, targets, counts = self._windows
        batches = batches_of(len(inputs), self._batch_size)
        pending = [(rows, losses(params, inputs[rows], targets[rows])) for rows in batches]
        nats = np.zeros(len(inputs), np.float64)
        for rows, batch in pending:
            nats[rows] = np.sum(np.asarray(batch, np.float64), axis=1, where=counts[rows])
        tokens = counts.sum(axis=1)
        n_bytes = np.sum(self._tokenizer.byte_lengths[targets], axis=1, where=counts)

        def score(rows: Bool[np.ndarray, " window"]) -> Score:
            return Score(float(nats[rows].sum()), int(tokens[rows].sum()), int(n_bytes[rows].sum()))

        scores = {ALL: score(np.ones(len(inputs), bool))}
        for name, opener in self.voices.items():
            scores[name] = score(inputs[:, 0] == opener)
        return scores


def fitting_batch(batch_size: int, rows: int) -> int:
    """The size of batches for so many rows: few rows need not be padded to a whole batch.

    It can be divided over all devices if `batch_size` can.
    """
    devices = jax.device_count()
    return min(batch_size, -(-rows // devices) * devices)


def batches_of(rows: int, size: int) -> Iterator[Int[np.ndarray, " batch"]]:
    """Indices of so many rows in arrays of one length, so that one program serves.

    The last repeats row 0: what is computed of it is written twice with the same value, which
    changes nothing.
    """
    for start in range(0, rows, size):
        indices = np.arange(start, start + size)
        yield np.where(indices < rows, indices, 0)
