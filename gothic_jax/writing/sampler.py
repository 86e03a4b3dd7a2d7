"""Writing with a KV cache: jitted prefill and decoding, and the filters of the next token."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from gothic_jax.machine.device import default_device
from gothic_jax.model.attention import KVCache
from gothic_jax.model.blending import weighted_sum
from gothic_jax.model.gpt import GPT, Params, empty_caches, graph, streamed_params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.writing.settings import Sampling

PREFILL_CHUNK = 64
"""Prompt tokens a call; a prompt is padded to a multiple, so all prompts share a program."""
PREFILL_ROWS = 512
"""Tokens of all streams in such a call: many streams take shorter chunks, and less padding."""
CACHE_POSITIONS = 1024
"""Positions of all streams in the shortest caches: attention reads whole caches."""
DECODE_CHUNK = 16
"""Tokens written a call: few enough to read along, enough to hide the calls' own cost."""


class Filter(NamedTuple):
    """`Sampling` as arrays, so that other numbers need no new program; of all texts, or of each."""

    temperature: Float[Array, "*text"]
    top_k: Int[Array, "*text"]
    top_p: Float[Array, "*text"]


class _Manner(NamedTuple):
    """How the tokens of a call are drawn."""

    seed: UInt32[Array, ""]
    settings: Filter
    weights: Float[Array, " voice"]


def filter_logits(
    logits: Float[Array, "batch candidate"],
    temperature: Float[Array, "*text"],
    top_k: Int[Array, "*text"],
    top_p: Float[Array, "*text"],
) -> Float[Array, "batch candidate"]:
    """Tempered logits, -inf where top-k or top-p leaves a token out.

    The candidates are in falling order, the settings those of all rows or of each. The order of
    the filters is that of Transformers: temperature, top-k, then top-p, which keeps the token that
    crosses p (arXiv 1904.09751).
    """
    temperature, top_k, top_p = (jnp.reshape(x, (-1, 1)) for x in (temperature, top_k, top_p))
    tempered = logits / jnp.maximum(temperature, 1e-6)
    rank = jnp.arange(logits.shape[-1])
    tempered = jnp.where(rank < top_k, tempered, -jnp.inf)
    probabilities = jax.nn.softmax(tempered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep: Bool[Array, "batch candidate"] = (before < top_p) | (rank == 0)
    return jnp.where(keep, tempered, -jnp.inf)


def blend_logits(
    logits: Float[Array, "row vocab"], weights: Float[Array, " voice"]
) -> Float[Array, "text vocab"]:
    """The logits of each text: `blending.weighted_sum` of its `weights.size` rows, one a voice."""
    if weights.size == 1:  # its weight is 1, as that of all voices together
        return logits
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    by_text = log_probabilities.reshape(-1, weights.size, logits.shape[1])
    return weighted_sum(by_text, weights)


def draw(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    settings: Filter,
    candidates: int,
) -> Int[Array, " batch"]:
    """One token a row, drawn with that row's key from its `candidates` likeliest."""
    return draw_from(*jax.lax.top_k(logits, candidates), keys, settings)


def draw_from(
    top: Float[Array, "batch candidate"],
    tokens: Int[Array, "batch candidate"],
    keys: Key[Array, " batch"],
    settings: Filter,
) -> Int[Array, " batch"]:
    """One token a row, drawn with that row's key, of these with their logits in falling order."""
    choice = jax.vmap(jax.random.categorical)(keys, filter_logits(top, *settings))
    choice = jnp.where(settings.temperature == 0, 0, choice)
    return jnp.take_along_axis(tokens, choice[:, None], axis=1)[:, 0]


def candidates_for(top_k: int, vocab_size: int) -> int:
    """The least power of two that holds top_k, from 64 on; the whole vocabulary where it is off.

    Only this number is compiled in, so that few values of top-k need a new program.
    """
    if not 0 < top_k < vocab_size:
        return vocab_size
    return min(max(64, 1 << (top_k - 1).bit_length()), vocab_size)


class Sampler:
    """A model ready to write. Its programs are compiled at first use and then kept.

    `dtype` is that of weights and activations: decoding takes as long as the weights take to
    stream through memory.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self._laid_out: tuple[Params, Params] | None = None
        self.prefill = jax.jit(self._prefill_chunk, donate_argnums=(1,))
        self._decode = jax.jit(self._decode_chunk, donate_argnums=(1,), static_argnums=(6,))

    def model(self, params: Params) -> GPT:
        """The model with parameters that have been laid out."""
        return nnx.merge(graph(self.config, self.dtype, streamed=True), params)

    def _prefill_chunk(
        self,
        params: Params,
        caches: list[KVCache],
        tokens: Int[Array, "batch chunk"],
        start: Int[Array, ""],
    ) -> list[KVCache]:
        """The caches, of which the first `start` positions are in use, with these tokens read."""
        model = self.model(params)
        recent = self.empty_caches(*tokens.shape)
        return _write(caches, model.extend(tokens, caches, start, recent, 0)[1], start)

    def _decode_chunk(
        self,
        params: Params,
        caches: list[KVCache],
        last: Int[Array, " row"],
        start: Int[Array, ""],
        written: Int[Array, ""],
        manner: _Manner,
        candidates: int,
    ) -> tuple[list[KVCache], Int[Array, " row"], Int[Array, "text chunk"]]:
        model = self.model(params)
        seed, settings, weights = manner
        voices = weights.size
        fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = fold_in(jax.random.key(seed), jnp.arange(len(last) // voices))

        def step(carry: tuple[list[KVCache], Array], i: Array) -> tuple[Any, Array]:
            recent, last = carry
            hidden, recent = model.extend(last[:, None], caches, start, recent, i)
            logits = blend_logits(model.logits(hidden[:, 0]), weights)
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, written + i)
            token = draw(logits, step_keys, settings, candidates)
            return (recent, jnp.repeat(token, voices)), token

        nothing = self.empty_caches(len(last), DECODE_CHUNK)
        (recent, last), tokens = jax.lax.scan(step, (nothing, last), jnp.arange(DECODE_CHUNK))
        return _write(caches, recent, start), last, tokens.T

    def _cache_length(self, past: int, batch: int) -> int:
        """The least of 128, 256, 512, ... or the block that holds the past, and a chunk more.

        Attention reads the whole cache. Each length is a program of its own, so that there are
        few, and what short texts need is all that they compile. Many streams, whose caches take
        longer to read than a program to compile, begin with 64 or 32.
        """
        block = -(-self.config.block_size // PREFILL_CHUNK) * PREFILL_CHUNK
        shortest = _halved(128, batch, CACHE_POSITIONS, least=32)
        return min(max(shortest, 1 << (max(past, 1) - 1).bit_length()), block) + DECODE_CHUNK

    def _grown(self, caches: list[KVCache], past: int) -> list[KVCache]:
        """The caches, longer if they have no room for a chunk after `past` positions."""
        batch, _, length, _ = caches[0].keys.shape
        more = self._cache_length(past, batch) - length
        if more <= 0:
            return caches
        padding = ((0, 0), (0, 0), (0, more), (0, 0))
        return [KVCache(*(jnp.pad(part, padding) for part in cache)) for cache in caches]

    def empty_caches(self, batch: int, length: int) -> list[KVCache]:
        """Caches of `length` positions for so many rows."""
        return empty_caches(self.config, batch, length, cache_dtype(self.dtype))

    def laid_out(self, params: Params) -> Params:
        """`params` laid out for decoding, once for as long as they stay the same."""
        if self._laid_out is None or self._laid_out[0] is not params:
            self._laid_out = params, streamed_params(params, self.dtype)
        return self._laid_out[1]

    def stream(
        self,
        params: Params,
        prompt: Int[np.ndarray, "row time"],
        *,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        weights: Sequence[float] = (1.0,),
    ) -> Iterator[Int[np.ndarray, "text chunk"]]:
        """Yields what is written, some tokens at a time, `max_tokens` a text in all.

        A text has a row for each of the `weights`, which add up to 1, one row after the other:
        prompts that differ in their openers, whose next-token distributions are blended.
        All prompts are of one length; the first token of each is its opener. Text i of a seed
        draws the same numbers however many texts there are. A prompt longer than the block
        keeps its opener and its last tokens. Past the block a window slides: the opener and the
        last half block are read again.
        """
        sampling.validate()
        block = self.config.block_size
        voices = len(weights)
        params = self.laid_out(params)
        put = _putter(params)
        settings = Filter(
            put(sampling.temperature, np.float32),
            put(min(sampling.top_k or self.config.vocab_size, self.config.vocab_size), np.int32),
            put(sampling.top_p, np.float32),
        )
        manner = _Manner(put(seed, np.uint32), settings, put(weights, np.float32))
        candidates = candidates_for(sampling.top_k, self.config.vocab_size)
        context = keep_window(prompt, block)
        written = 0
        while written < max_tokens:
            caches, position = self._read(params, context)
            last = put(context[:, -1], np.int32)
            pieces: list[np.ndarray] = []
            budget = min(block - position, max_tokens - written)
            unread = None
            for done in range(0, budget, DECODE_CHUNK):
                caches = self._grown(caches, position + done)
                caches, last, chunk = self._decode(
                    params,
                    caches,
                    last,
                    put(position + done, np.int32),
                    put(written + done, np.int32),
                    manner,
                    candidates,
                )
                # The device already works on this chunk while the one before it is read.
                if unread is not None:
                    pieces.append(np.asarray(unread))
                    yield pieces[-1]
                unread = chunk
            missing = budget - sum(piece.shape[1] for piece in pieces)
            pieces.append(np.asarray(unread)[:, :missing])
            yield pieces[-1]
            written += budget
            new = np.repeat(np.concatenate(pieces, axis=1), voices, axis=0)
            tail = np.concatenate([context, new], axis=1)
            context = keep_window(tail, max(block // 2, 1))

    def _read(
        self, params: Params, context: Int[np.ndarray, "batch time"]
    ) -> tuple[list[KVCache], int]:
        """Caches that hold all of the context but its last token, and how many that are."""
        batch, length = context.shape
        put = _putter(params)
        caches = self.empty_caches(batch, self._cache_length(length - 1, batch))
        caches = jax.device_put(caches, _place(params))
        size = _halved(PREFILL_CHUNK, batch, PREFILL_ROWS, least=8)
        padded = -(-(length - 1) // size) * size
        tokens = np.zeros((batch, padded), np.int32)
        tokens[:, : length - 1] = context[:, :-1]
        for start in range(0, padded, size):
            chunk = put(tokens[:, start : start + size], np.int32)
            caches = self.prefill(params, caches, chunk, put(start, np.int32))
        return caches, length - 1


def keep_window(
    tokens: Int[np.ndarray, "batch time"], length: int
) -> Int[np.ndarray, "batch kept"]:
    """The opener and the last tokens, `length` in all at most."""
    if tokens.shape[1] <= length:
        return tokens
    return np.concatenate([tokens[:, :1], tokens[:, tokens.shape[1] - length + 1 :]], axis=1)


def _place(params: Params) -> Sharding:
    """Where the parameters are, and therefore what a program gives back.

    All that goes into a program is put there: it is compiled again for an input that is bound to
    a device where before it was bound to none, as what came out of the first call would be.
    """
    return jax.tree.leaves(params)[0].sharding


def _putter(params: Params) -> Callable[[Any, Any], Array]:
    """Makes arrays of a type where the parameters are. `jnp.asarray` would compile a program."""
    place = _place(params)
    return lambda value, dtype: jax.device_put(np.asarray(value, dtype), place)


def _halved(length: int, batch: int, limit: int, *, least: int) -> int:
    """`length`, halved until `batch` of them stay within the limit, or it is the least."""
    while length > least and batch * length > limit:
        length //= 2
    return length


def cache_dtype(dtype: Any) -> Any:
    """f32 on a CPU, which has no fast product of one bf16 row and a bf16 matrix; else `dtype`."""
    return jnp.float32 if default_device().platform == "cpu" else dtype


def _write(caches: list[KVCache], recent: list[KVCache], start: Int[Array, ""]) -> list[KVCache]:
    return [cache.write(new, start) for cache, new in zip(caches, recent, strict=True)]
