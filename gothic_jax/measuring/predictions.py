"""What a model expects next: the distribution of each token of a text, and the likeliest ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gothic_jax.errors import UserError
from gothic_jax.measuring.scoring import cut_windows
from gothic_jax.model.attention import choose
from gothic_jax.model.blending import weighted_sum
from gothic_jax.model.gpt import Params, graph
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import Blend, complete
from gothic_jax.text.works import END_OF_TEXT

DistributionFunction = Callable[[Params, Int[np.ndarray, "batch block"]], Array]


def distributions_on(
    device: jax.Device, config: ModelConfig, compute_dtype: str
) -> DistributionFunction:
    """Jitted (params, inputs) -> log-probabilities of the token after each one, on one device.

    They are [batch, block, vocab] in f32.
    """
    attention, _ = choose(device, config.head_dim, jnp.dtype(compute_dtype))

    @jax.jit
    def jitted(params: Params, inputs: Array) -> Array:
        model = nnx.merge(graph(config, jnp.dtype(compute_dtype)), params)
        return jax.nn.log_softmax(model(inputs, attention=attention), axis=-1)

    def distributions(params: Params, inputs: np.ndarray) -> Array:
        return jitted(params, jax.device_put(inputs))

    return distributions


class Prediction(NamedTuple):
    """A token that may come next."""

    text: str
    """`<|endoftext|>` for the token that ends a work. U+FFFD stands for bytes of the token that
    make no whole character."""
    probability: float
    """Of the distribution as it is: at temperature 1, with nothing filtered out."""


class Predictions:
    """A model ready to be asked what it expects."""

    def __init__(
        self,
        distributions: DistributionFunction,
        params: Params,
        tokenizer: Tokenizer,
        block_size: int,
    ) -> None:
        self._distributions = distributions
        self._params = params
        self._tokenizer = tokenizer
        self._block_size = block_size

    def log_probabilities(
        self,
        tokens: Int[np.ndarray, " time"],
        blend: Blend,
        tick: Callable[[], object] = lambda: None,
    ) -> Float[np.ndarray, "time vocab"]:
        """The distribution of each token of a text, given those before it; natural logarithms.

        `tokens` have no opener: the blend's voices open them. In a text longer than the block
        each token is predicted from half a window of the text before it, or all there is. `tick`
        is called for each window: what it raises ends the work. Raises UserError where the model
        does not know a voice.
        """
        weights = complete(blend, self._tokenizer.voices)
        works = [(tokens, self._tokenizer.any_voice)]
        windows = cut_windows(works, self._block_size, max(self._block_size // 2, 1))
        rows = [np.zeros((0, self._tokenizer.vocab_size), np.float32)]
        for window, counted in zip(windows.inputs, windows.counts, strict=True):
            tick()
            rows.append(blended(self._by_voice(window, counted, weights), weights))
        return np.concatenate(rows)

    def next_tokens(self, text: str, blends: Sequence[Blend], n: int) -> list[list[Prediction]]:
        """For each blend the n tokens that are the likeliest after a text, likeliest first.

        The text is read as it is, and may be empty; of one longer than the block the end is read.
        Tokens that open works are left out. Raises UserError where the text is not valid Unicode,
        or the model does not know a voice.
        """
        weights = [complete(blend, self._tokenizer.voices) for blend in blends]
        window, last = self._end_of(text)
        # A voice that several blends share is asked once.
        voices = dict.fromkeys(voice for each in weights for voice in each)
        by_voice = self._by_voice(window, np.array([last]), voices)
        return [self._likeliest(blended(by_voice, each)[0], n) for each in weights]

    def _end_of(self, text: str) -> tuple[Int[np.ndarray, " block"], int]:
        """The window that the next token is written after, and the last place in use there."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError("the text is not valid Unicode; leave out lone surrogates") from error
        tokens = self._tokenizer.encode(text)
        tokens = tokens[max(len(tokens) - self._block_size + 1, 0) :]
        window = np.zeros(self._block_size, np.int32)
        window[1 : len(tokens) + 1] = tokens
        return window, len(tokens)

    def _by_voice(
        self,
        window: Int[np.ndarray, " block"],
        wanted: Int[np.ndarray, " wanted"] | Bool[np.ndarray, " block"],
        voices: Iterable[str],
    ) -> dict[str, Float[np.ndarray, "time vocab"]]:
        """Each voice's log-probabilities after those places of a window that are wanted.

        One by one, so that one program serves any number of voices. A window may have anything
        behind the wanted places: no place sees what comes after it.
        """
        result = {}
        for voice in voices:
            opened = window[None].copy()
            opened[0, 0] = self._tokenizer.openers[voice]
            result[voice] = np.asarray(self._distributions(self._params, opened))[0, wanted]
        return result

    def _likeliest(
        self, log_probabilities: Float[np.ndarray, " vocab"], n: int
    ) -> list[Prediction]:
        possible = log_probabilities.copy()
        possible[[*self._tokenizer.openers.values()]] = -np.inf
        order = np.argsort(-possible, kind="stable")[: len(possible) - len(self._tokenizer.openers)]
        return [
            Prediction(self._text_of(token), float(np.exp(log_probabilities[token])))
            for token in order[:n].tolist()
        ]

    def _text_of(self, token: int) -> str:
        if token == self._tokenizer.end_of_text:
            return END_OF_TEXT
        return self._tokenizer.token_bytes[token].decode(errors="replace")


def blended(
    by_voice: Mapping[str, Float[np.ndarray, "time vocab"]], weights: Mapping[str, float]
) -> Float[np.ndarray, "time vocab"]:
    """The log-probabilities of a blend of voices, those with `weights`, from their own."""
    together = np.stack([by_voice[voice] for voice in weights], axis=1)
    summed = weighted_sum(together, np.array([*weights.values()], np.float32))
    # Below the largest, whose exponential is then 1: none overflows.
    below = summed - summed.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
