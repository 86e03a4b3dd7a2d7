"""Many texts in one jitted step, each at its own place: the device's part of continuous batching.

A slot is a row of the caches. A text has one for each voice of its blend; all advance together by a
chunk. Shapes never change, so that a text's tokens do not depend on what the other slots hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gothic_jax.machine.device import default_device
from gothic_jax.model.attention import KVBlocks, KVCache
from gothic_jax.model.gpt import Params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.writing.sampler import (
    DECODE_CHUNK,
    PREFILL_CHUNK,
    Filter,
    Sampler,
    candidates_for,
    draw,
    draw_from,
)
from gothic_jax.writing.settings import Sampling

SHORT_CHUNK = 16
"""Prompt tokens of a call that reads the end of a prompt, or a short one."""
MAX_BLOCKS = 8
"""Of a slot's cache: each is compiled on its own."""
MAX_VOICES = 8
"""In the blend of a text, `any` included."""
MAX_LIKELIEST = 20
"""Likeliest tokens that a text may ask for at each place; as many as OpenAI's endpoint gives."""


class Texts(NamedTuple):
    """How the tokens of each text are drawn; a text has the number of its first slot.

    NumPy arrays on the host, JAX's in the program.
    """

    seed: UInt32[Any, " slot"]
    sample: Int[Any, " slot"]
    """Which of a seed's texts it is; from 0 on."""
    written: Int[Any, " slot"]
    """Tokens drawn for it so far."""
    temperature: Float[Any, " slot"]
    top_k: Int[Any, " slot"]
    top_p: Float[Any, " slot"]
    from_all: Bool[Any, " slot"]
    """Whether its top-k needs all of the vocabulary."""
    voices: Int[Any, "slot voice"]
    """The slots whose distributions are blended; any, with weight 0, where there are fewer."""
    weights: Float[Any, "slot voice"]
    banned: Bool[Any, "slot vocab"]
    """Tokens that must not be the next one."""


class Drawn(NamedTuple):
    """What a chunk has brought, by text; log-probabilities are the unfiltered blend's."""

    tokens: Int[Any, "slot chunk"]
    log_probabilities: Float[Any, "slot chunk"]
    likeliest: Int[Any, "slot chunk likeliest"]
    likeliest_log_probabilities: Float[Any, "slot chunk likeliest"]


class Slots:
    """The caches of so many slots, and the programs that fill them."""

    def __init__(self, sampler: Sampler, params: Params, slots: int) -> None:
        """`params` are those of training, f32; the sampler's model, layout and reading are used."""
        config = sampler.config
        self.config = config
        self.slots = slots
        self._sampler = sampler
        self._params = sampler.laid_out(params)
        self._caches = [
            KVBlocks(blocks)
            for blocks in zip(
                *(sampler.empty_caches(slots, length) for length in _block_lengths(config)),
                strict=True,
            )
        ]
        # Contexts are read here, and then put into their slot: a program that both read from the
        # caches and wrote to them would copy all of them.
        self._one = sampler.empty_caches(1, sum(_block_lengths(config)))
        self._last = np.zeros(slots, np.int32)
        self._start = np.zeros(slots, np.int32)
        self._text_of = np.arange(slots, dtype=np.int32)
        shape = (slots, min(slots, MAX_VOICES))
        self._texts = Texts(
            seed=np.zeros(slots, np.uint32),
            sample=np.zeros(slots, np.int32),
            written=np.zeros(slots, np.int32),
            temperature=np.zeros(slots, np.float32),
            top_k=np.ones(slots, np.int32),
            top_p=np.ones(slots, np.float32),
            from_all=np.zeros(slots, bool),
            voices=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
            banned=np.zeros((slots, config.vocab_size), bool),
        )
        self._put = jax.jit(_put_one, donate_argnums=(0,))
        self._advance = jax.jit(self._advance_chunk, donate_argnums=(1,))

    def occupy(
        self,
        slots: Sequence[int],
        weights: Sequence[float],
        sampling: Sampling,
        *,
        seed: int,
        sample: int,
    ) -> None:
        """Gives slots to a new text, one a voice: a seed's text number `sample`.

        At most MAX_VOICES, whose weights add up to 1.
        """
        text, texts, vocab_size = slots[0], self._texts, self.config.vocab_size
        texts.seed[text], texts.sample[text] = seed, sample
        texts.temperature[text], top_k, texts.top_p[text] = sampling
        texts.top_k[text] = min(top_k or vocab_size, vocab_size)
        texts.from_all[text] = candidates_for(top_k, vocab_size) > _few(vocab_size)
        texts.voices[text], texts.weights[text] = text, 0
        texts.voices[text, : len(slots)], texts.weights[text, : len(slots)] = slots, weights
        self._text_of[[*slots]] = text

    def read(self, slot: int, context: Int[np.ndarray, " time"]) -> None:
        """Reads a context of at most a block, its last token excepted, which `advance` reads."""
        length = len(context) - 1
        start = 0
        while start < length:
            few = length - start <= PREFILL_CHUNK - SHORT_CHUNK
            size = SHORT_CHUNK if few else PREFILL_CHUNK
            chunk = np.zeros((1, size), np.int32)
            part = context[start : min(start + size, length)]
            chunk[0, : len(part)] = part
            self._one = self._sampler.prefill(self._params, self._one, chunk, np.int32(start))
            start += size
        self._caches = self._put(self._caches, self._one, np.int32(slot))
        self.go_on(slot, int(context[-1]), length)

    def go_on(self, slot: int, last: int, position: int) -> None:
        """Makes `last`, at a position of what has been read or drawn, the last token."""
        self._last[slot], self._start[slot] = last, position

    def free(self, slots: Sequence[int]) -> None:
        """Takes slots from their text."""
        self._text_of[[*slots]] = slots
        for slot in slots:
            self._texts.weights[slot], self._texts.from_all[slot] = 0, False
            self.go_on(slot, 0, 0)

    def advance(self, written: Mapping[int, int], banned: Mapping[int, Sequence[int]]) -> Drawn:
        """DECODE_CHUNK tokens for each text, after so many tokens `written` of it.

        The first of them is none of those `banned`. Where each slot goes on from there is to be
        said by `go_on` or `read`: at a position below the block size.
        """
        self._texts.banned[:] = False
        for text, tokens in banned.items():
            self._texts.banned[text, tokens] = True
        for text, count in written.items():
            self._texts.written[text] = count
        self._caches, drawn = self._advance(
            self._params, self._caches, self._last, self._start, self._text_of, self._texts
        )
        return Drawn(*map(np.asarray, drawn))

    def _advance_chunk(
        self,
        params: Params,
        caches: list[KVBlocks],
        last: Int[Array, " slot"],
        start: Int[Array, " slot"],
        text_of: Int[Array, " slot"],
        texts: Texts,
    ) -> tuple[list[KVBlocks], Drawn]:
        model = self._sampler.model(params)
        keys = jax.vmap(lambda seed, sample: jax.random.fold_in(jax.random.key(seed), sample))(
            texts.seed, texts.sample
        )
        settings = Filter(texts.temperature, texts.top_k, texts.top_p)
        few = _few(self.config.vocab_size)
        banned = texts.banned.sum(axis=1)

        def step(carry: tuple[list[KVCache], Array], i: Array) -> tuple[Any, Drawn]:
            recent, last = carry
            hidden, recent = model.extend(last[:, None], caches, start, recent, i)
            logits = _blended(model.logits(hidden[:, 0]), texts.voices, texts.weights)
            allowed = jnp.where(texts.banned & (i == 0), -jnp.inf, logits)
            step_keys = jax.vmap(jax.random.fold_in)(keys, texts.written + i)
            # What is drawn in place of a banned token has random numbers of its own.
            again = jax.vmap(jax.random.fold_in)(step_keys, banned)
            step_keys = jnp.where((i == 0) & (banned > 0), again, step_keys)
            # All of them are returned: for a slice of them, XLA would sort the whole vocabulary.
            top, likeliest = jax.lax.top_k(allowed, few)
            token = draw_from(top, likeliest, step_keys, settings)
            token = jax.lax.cond(
                texts.from_all.any(),
                lambda: jnp.where(
                    texts.from_all, draw(allowed, step_keys, settings, logits.shape[1]), token
                ),
                lambda: token,
            )
            total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
            drawn = Drawn(token, (chosen - total)[:, 0], likeliest, top - total)
            return (recent, token[text_of]), drawn

        nothing = self._sampler.empty_caches(len(last), DECODE_CHUNK)
        (recent, _), drawn = jax.lax.scan(step, (nothing, last), jnp.arange(DECODE_CHUNK))
        caches = [_write_rows(cache, new, start) for cache, new in zip(caches, recent, strict=True)]
        return caches, Drawn(*(part.swapaxes(0, 1) for part in drawn))


def _few(vocab_size: int) -> int:
    """Candidates that nearly all texts are drawn from."""
    return candidates_for(1, vocab_size)


def _blended(
    logits: Float[Array, "slot vocab"],
    voices: Int[Array, "slot voice"],
    weights: Float[Array, "slot voice"],
) -> Float[Array, "slot vocab"]:
    """As `sampler.blend_logits`, for each text of its own slots, in their order.

    One by one and not as a matrix product, whose order of summation would depend on the slots.
    """

    def blend() -> Float[Array, "slot vocab"]:
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        total = jnp.zeros_like(logits)
        for voice in range(voices.shape[1]):
            total += weights[:, voice, None] * log_probabilities[voices[:, voice]]
        # The weight of a single voice is 1, as that of all voices together.
        return jnp.where((weights != 0).sum(axis=1, keepdims=True) > 1, total, logits)

    several = (weights != 0).sum(axis=1) > 1
    return jax.lax.cond(several.any(), blend, lambda: logits)


def _block_lengths(config: ModelConfig) -> list[int]:
    """Positions of each block of a slot's cache; together they hold the model's block.

    On a CPU, where reading caches is most of the work of many slots, at most MAX_BLOCKS, of 64
    positions or more; elsewhere one, since a GPU waits for the host to choose what is skipped.
    """
    chunks = -(-config.block_size // PREFILL_CHUNK)
    blocks = min(chunks, MAX_BLOCKS) if default_device().platform == "cpu" else 1
    each = -(-chunks // blocks)
    return [each * PREFILL_CHUNK] * -(-chunks // each)


def _put_one(caches: list[KVBlocks], one: list[KVCache], slot: Int[Array, ""]) -> list[KVBlocks]:
    """The caches with those of one slot in their place."""

    def put(cache: KVBlocks, new: KVCache) -> KVBlocks:
        blocks, first = [], 0
        for block in cache.blocks:
            end = first + block.keys.shape[2]
            parts = (part[:, :, first:end] for part in new)
            blocks.append(
                KVCache(
                    *(
                        jax.lax.dynamic_update_slice_in_dim(old, part, slot, 0)
                        for old, part in zip(block, parts, strict=True)
                    )
                )
            )
            first = end
        return KVBlocks(tuple(blocks))

    return [put(cache, new) for cache, new in zip(caches, one, strict=True)]


def _write_rows(cache: KVBlocks, new: KVCache, start: Int[Array, " slot"]) -> KVBlocks:
    """The cache with `new` in place of each slot's own positions from its `start` on.

    What would lie behind the last block is left out.
    """
    length, count = cache.blocks[0].keys.shape[2], new.keys.shape[2]

    def write(slot: Array, cache: KVBlocks) -> KVBlocks:
        def written(old: Array, part: Array, begin: Array) -> Array:
            """The block with the part's positions from `begin` on that are within it."""
            # Read and written at one place, without which XLA would copy the block.
            place = (slot, 0, jnp.clip(begin, 0, length - count), 0)
            there = jax.lax.dynamic_slice(old, place, (1, *part.shape[1:]))
            which = place[2] - begin + jnp.arange(count)
            moved = part[slot][None, :, jnp.clip(which, 0, count - 1)].astype(old.dtype)
            within = ((which >= 0) & (which < count))[:, None]
            return jax.lax.dynamic_update_slice(old, jnp.where(within, moved, there), place)

        return KVBlocks(
            tuple(
                KVCache(
                    *(
                        written(old, part, start[slot] - number * length)
                        for old, part in zip(block, new, strict=True)
                    )
                )
                for number, block in enumerate(cache.blocks)
            )
        )

    return jax.lax.fori_loop(0, len(start), write, cache)
