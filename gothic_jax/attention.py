"""Causal attention: cuDNN's fused kernel where it runs, XLA elsewhere, chosen once."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["cudnn", "xla", "xla-blocks"]
"""cuDNN's flash attention, XLA's plain one, or XLA by blocks of queries for a CPU."""


def causal_attention(
    query: Float[Array, "batch time head head_dim"],
    key: Float[Array, "batch time head head_dim"],
    value: Float[Array, "batch time head head_dim"],
    *,
    implementation: Implementation,
) -> Float[Array, "batch time head head_dim"]:
    """Softmax(Q K^T / sqrt(head_dim)) V in which no position sees a later one; softmax in f32."""
    if implementation == "xla-blocks":
        return _attention_by_blocks(query, key, value)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


def _attention_by_blocks(
    query: Float[Array, "batch time head head_dim"],
    key: Float[Array, "batch time head head_dim"],
    value: Float[Array, "batch time head head_dim"],
) -> Float[Array, "batch time head head_dim"]:
    """Attention of one block of queries after another, each to the keys that it can see.

    The keys that none of a block's queries may see are never multiplied: a little over half of
    the work is left. At most 8 blocks, since each is compiled on its own; of 64 queries or more,
    since smaller products run slower.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    time = query.shape[2]
    length = max(64, -(-time // 8))
    contexts = []
    for begin in range(0, time, length):
        end = min(begin + length, time)
        scores = jnp.einsum(
            "bhtd,bhsd->bhts",
            query[:, :, begin:end],
            key[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        visible = jnp.arange(end) <= jnp.arange(begin, end)[:, None]
        scores = jnp.where(visible, scores * query.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        contexts.append(jnp.einsum("bhts,bhsd->bhtd", weights, value[:, :, :end]))
    return jnp.concatenate(contexts, axis=2).swapaxes(1, 2)


def cached_attention(
    query: Float[Array, "batch time head head_dim"],
    key: Float[Array, "batch time head head_dim"],
    value: Float[Array, "batch time head head_dim"],
    keys: Float[Array, "batch head cache head_dim"],
    values: Float[Array, "batch head cache head_dim"],
    start: Int[Array, ""] | int,
) -> tuple[
    Float[Array, "batch time head head_dim"],
    Float[Array, "batch head cache head_dim"],
    Float[Array, "batch head cache head_dim"],
]:
    """Attention of positions start, start + 1, ... to the cache and to themselves, causally.

    Returns the context and the cache's keys and values with the new ones written at `start`.
    The cache lies head by head, so that each product streams through contiguous memory.
    """
    origin = (0, 0, start, 0)
    keys = jax.lax.dynamic_update_slice(keys, key.swapaxes(1, 2), origin)
    values = jax.lax.dynamic_update_slice(values, value.swapaxes(1, 2), origin)
    scores = jnp.einsum("bthd,bhsd->bhts", query, keys, preferred_element_type=jnp.float32)
    visible = jnp.arange(keys.shape[2]) <= start + jnp.arange(query.shape[1])[:, None]
    scores = jnp.where(visible, scores * query.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bhts,bhsd->bthd", weights, values), keys, values


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
