"""Causal attention: cuDNN's fused kernel where it runs, XLA elsewhere, chosen once."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["cudnn", "xla"]


def causal_attention(
    query: Float[Array, "batch time head head_dim"],
    key: Float[Array, "batch time head head_dim"],
    value: Float[Array, "batch time head head_dim"],
    *,
    implementation: Implementation,
) -> Float[Array, "batch time head head_dim"]:
    """Softmax(Q K^T / sqrt(head_dim)) V in which no position sees a later one; softmax in f32."""
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


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
    """The implementation for a device, and why: ("cudnn" or "xla", reason).

    cuDNN is proved by compiling and running a small forward and backward pass, since it
    refuses some devices, types and head sizes only then.
    """
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
