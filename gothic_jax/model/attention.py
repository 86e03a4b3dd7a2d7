"""Causal attention: cuDNN's fused kernel where it runs, XLA elsewhere, chosen once."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gothic_jax.model.ops import matmul, matmul_first_transposed, matmul_transposed, written_swapped
from gothic_jax.model.shape import ROPE_BASE

Implementation = Literal["cudnn", "xla", "xla-blocks"]
"""cuDNN's flash attention, XLA's plain one, or XLA by blocks of queries for a CPU."""


class Rotation(NamedTuple):
    """Cosine and sine of the angles by which positions turn queries and keys."""

    cos: Float[Array, "*rows time half"]
    sin: Float[Array, "*rows time half"]


def rotation(positions: Int[Array, "*rows time"], head_dim: int) -> Rotation:
    """The angles of rotary position embedding (arXiv 2104.09864), base ROPE_BASE.

    The positions are those of all rows, or row by row.
    """
    half = head_dim // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(
    x: Float[Array, "batch time head head_dim"], rotation: Rotation
) -> Float[Array, "batch time head head_dim"]:
    """`x` with its two halves, as pairs, turned by the angles; computed in f32."""
    cos, sin = (part[..., None, :] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def unrotated(
    x: Float[Array, "batch time head head_dim"], rotation: Rotation
) -> Float[Array, "batch time head head_dim"]:
    """`x`: where positions are learned, they are added to the embedding."""
    return x


def causal_attention(
    query: Float[Array, "batch time head head_dim"],
    key: Float[Array, "batch time head head_dim"],
    value: Float[Array, "batch time head head_dim"],
    *,
    implementation: Implementation,
) -> Float[Array, "batch time head head_dim"]:
    """Softmax(Q K^T / sqrt(head_dim)) V in which no position sees a later one; softmax in f32."""
    if implementation == "xla-blocks":
        heads_first = (written_swapped(x) for x in (query, key, value))
        return _attention_by_blocks(*heads_first).swapaxes(1, 2)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


Blocks = list[Float[Array, "batch head _ _"]]


@jax.custom_vjp
def _attention_by_blocks(
    query: Float[Array, "batch head time head_dim"],
    key: Float[Array, "batch head time head_dim"],
    value: Float[Array, "batch head time head_dim"],
) -> Float[Array, "batch head time head_dim"]:
    """Attention of one block of queries after another, each to the keys that it can see.

    The keys that none of a block's queries may see are never multiplied: a little over half of
    the work is left. Its gradient is written out since JAX's own would add up one padded array
    for each block, which on a CPU takes longer than the products.
    """
    return _attention_by_blocks_forward(query, key, value)[0]


def _block_edges(time: int) -> list[tuple[int, int]]:
    """At most 8 blocks, each compiled on its own; of 128 queries at least, as fewer run slower."""
    length = max(128, -(-time // 8))
    return [(begin, min(begin + length, time)) for begin in range(0, time, length)]


def _attention_by_blocks_forward(
    query: Float[Array, "batch head time head_dim"],
    key: Float[Array, "batch head time head_dim"],
    value: Float[Array, "batch head time head_dim"],
) -> tuple[Float[Array, "batch head time head_dim"], tuple[Array, Array, Array, Array, Blocks]]:
    dtype = query.dtype
    contexts, weights = [], []
    for begin, end in _block_edges(query.shape[2]):
        scores = matmul_transposed(query[:, :, begin:end], key[:, :, :end], dtype)
        visible = jnp.arange(end) <= jnp.arange(begin, end)[:, None]
        scores = jnp.where(visible, scores * query.shape[-1] ** -0.5, -jnp.inf)
        weights.append(jax.nn.softmax(scores, axis=-1).astype(dtype))
        contexts.append(matmul(weights[-1], value[:, :, :end], dtype).astype(dtype))
    context = jnp.concatenate(contexts, axis=2)
    return context, (query, key, value, context, weights)


def _attention_by_blocks_backward(
    saved: tuple[Array, Array, Array, Array, Blocks],
    gradient: Float[Array, "batch head time head_dim"],
) -> tuple[Array, Array, Array]:
    query, key, value, context, weights = saved
    dtype = query.dtype
    edges = _block_edges(query.shape[2])
    # Row by row, the sum of weights times their gradients (FlashAttention-2, arXiv 2307.08691).
    products = gradient.astype(jnp.float32) * context.astype(jnp.float32)
    row_sums = products.sum(axis=-1, keepdims=True)
    to_query, to_key, to_value = [], [], []
    for (begin, end), block in zip(edges, weights, strict=True):
        to_context = gradient[:, :, begin:end]
        to_block = matmul_transposed(to_context, value[:, :, :end], dtype)
        to_scores = block.astype(jnp.float32) * (to_block - row_sums[:, :, begin:end])
        to_scores = (to_scores * query.shape[-1] ** -0.5).astype(dtype)
        to_query.append(matmul(to_scores, key[:, :, :end], dtype).astype(dtype))
        to_key.append(matmul_first_transposed(to_scores, query[:, :, begin:end]))
        to_value.append(matmul_first_transposed(block, to_context))

    def total(parts: list[Array]) -> Array:
        """The sum of arrays that all begin at key 0; the later, the longer."""
        pieces = [
            sum((part[:, :, begin:end] for part in parts[i + 1 :]), parts[i][:, :, begin:end])
            for i, (begin, end) in enumerate(edges)
        ]
        return jnp.concatenate(pieces, axis=2).astype(dtype)

    return jnp.concatenate(to_query, axis=2), total(to_key), total(to_value)


_attention_by_blocks.defvjp(_attention_by_blocks_forward, _attention_by_blocks_backward)


class KVCache(NamedTuple):
    """The keys and values of one layer, position by position.

    They lie head by head, so that each product streams through contiguous memory.
    """

    keys: Float[Array, "batch head position head_dim"]
    values: Float[Array, "batch head position head_dim"]

    def write(self, other: "KVCache", start: Int[Array, ""] | int) -> "KVCache":
        """This cache with the positions of `other` in place of its own from `start` on."""
        origin = (0, 0, start, 0)
        return KVCache(
            *(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), origin)
                for old, new in zip(self, other, strict=True)
            )
        )


class KVBlocks(NamedTuple):
    """The keys and values of one layer, in blocks of so many positions each."""

    blocks: tuple[KVCache, ...]


def cached_attention(
    query: Float[Array, "batch time head head_dim"],
    past: KVCache,
    start: Int[Array, "*rows"] | int,
    recent: KVCache,
    offset: Int[Array, ""] | int,
) -> Float[Array, "batch time head head_dim"]:
    """Attention to the first `start` positions of `past`, then to `recent`, causally.

    `start` is one number for all rows, or one for each. The first query is at position `offset` of
    `recent`, which already holds all queries' own keys and values. The past is only read: a loop
    that writes some tokens carries the recent few positions along, not the whole cache, of which
    XLA would make copies.
    """
    time, dtype = query.shape[1], past.keys.dtype
    query = query.astype(dtype)
    start = jnp.reshape(start, (-1, 1, 1, 1))
    seen = jnp.arange(past.keys.shape[2]) < start
    own = jnp.arange(recent.keys.shape[2]) <= offset + jnp.arange(time)[:, None]
    rows = (len(start), 1, time)
    visible = jnp.concatenate(
        [jnp.broadcast_to(part, (*rows, part.shape[-1])) for part in (seen, own)], axis=-1
    )
    query = query.swapaxes(1, 2)
    scores = [_product(query, cache.keys, 3) for cache in (past, recent)]
    scores = jnp.concatenate(scores, axis=-1) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(dtype)
    to_past, to_recent = jnp.split(weights, [past.keys.shape[2]], axis=-1)
    context = _product(to_past, past.values, 2) + _product(to_recent, recent.values, 2)
    return context.swapaxes(1, 2)


_Softmax = tuple[
    Float[Array, "batch head time 1"],
    Float[Array, "batch head time 1"],
    Float[Array, "batch head time head_dim"],
]
"""Of the positions so far: the largest score, and the sums, less that score in the exponent, of the
weights and of the weighted values."""


def blockwise_attention(
    query: Float[Array, "batch time head head_dim"],
    past: KVBlocks,
    start: Int[Array, " batch"],
    recent: KVCache,
    offset: Int[Array, ""] | int,
) -> Float[Array, "batch time head head_dim"]:
    """As `cached_attention`, but blocks behind the longest `start` are not read.

    A row's result is the same, bit for bit, however many blocks other rows need: all shapes are
    fixed, and a block of which a row sees nothing leaves its highest score as it is and adds
    zeros (the running softmax of arXiv 1805.02867).
    """
    time, dtype = query.shape[1], recent.keys.dtype
    query = query.astype(dtype).swapaxes(1, 2)
    start = jnp.reshape(start, (-1, 1, 1, 1))
    length = past.blocks[0].keys.shape[2]

    def add(before: _Softmax, block: KVCache, visible: Bool[Array, "..."]) -> _Softmax:
        scores = _product(query, block.keys, 3) * query.shape[-1] ** -0.5
        scores = jnp.where(visible, scores, -jnp.inf)
        highest, total, context = before
        now = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        weights, kept = jnp.exp(scores - now), jnp.exp(highest - now)
        new = _product(weights.astype(dtype), block.values, 2)
        return now, total * kept + weights.sum(axis=-1, keepdims=True), context * kept + new

    def adding(block: KVCache, first: int) -> Callable[[_Softmax], _Softmax]:
        return lambda before: add(before, block, first + jnp.arange(length) < start)

    # Each row sees its own token among the recent ones, so that the highest score is finite.
    own = jnp.arange(recent.keys.shape[2]) <= offset + jnp.arange(time)[:, None]
    nothing = jnp.zeros_like(query, jnp.float32)
    state = add((nothing[..., :1] - jnp.inf, nothing[..., :1], nothing), recent, own)
    state = adding(past.blocks[0], 0)(state)
    for number, block in enumerate(past.blocks[1:], start=1):
        needed = start.max() > number * length
        state = jax.lax.cond(needed, adding(block, number * length), lambda same: same, state)
    _, total, context = state
    return (context / total).swapaxes(1, 2)


def _product(
    a: Float[Array, "batch head n _"], b: Float[Array, "batch head _ _"], axis_of_b: int
) -> Float[Array, "batch head n _"]:
    """Head by head, contracted over the last axis of `a`; in f32."""
    axes = (((3,), (axis_of_b,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def choose(device: jax.Device, head_dim: int, dtype: Any) -> tuple[Implementation, str]:
    """The implementation for a device, and why.

    cuDNN is proved by compiling and running a small forward and backward pass, since it
    refuses some devices, types and head sizes only then.
    """
    if device.platform == "cpu":
        return "xla-blocks", "cuDNN needs a GPU"
    if device.platform != "gpu":
        return "xla", f"cuDNN needs a GPU, this is {device.platform}"
    probe = jax.device_put(jnp.ones((1, 64, 2, head_dim), dtype), device)

    def loss(x: Array) -> Array:
        return causal_attention(x, x, x, implementation="cudnn").astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(loss))(probe).block_until_ready()
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        first_line = str(error).strip().partition("\n")[0]
        return "xla", f"cuDNN's flash attention failed here, training will be slower: {first_line}"
    return "cudnn", "fused flash attention"
