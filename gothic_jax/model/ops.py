"""Operations with gradients of their own: products, embedding, GELU and token losses.

JAX derives a correct gradient for each of them, which some backend runs several times slower.

Matrix products (operands in the compute type, sums in f32):

- Operands are of the compute type in all three products. JAX's own gradient would multiply an
  f32 gradient by a bf16 weight, which is an f32 product on every backend.
- A weight's gradient keeps its f32 sum and is never rounded to the compute type.
- On a CPU, XLA hands a product to its library of kernels (which for bf16 has AMX and AVX-512
  ones) only if it sums over the last axis of the left operand. The gradient of the right operand
  sums over the first axis, so its left operand is transposed beforehand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

NOTHING = -1
"""In place of a token: fills a window whose work is shorter, and is not predicted."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    a: Float[Array, "*batch m k"], b: Float[Array, "*batch k n"], dtype: Any
) -> Float[Array, "*batch m n"]:
    """A B, of operands cast to `dtype`, in f32."""
    return _dot(a.astype(dtype), b.astype(dtype), -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_transposed(
    a: Float[Array, "*batch m k"], b: Float[Array, "*batch n k"], dtype: Any
) -> Float[Array, "*batch m n"]:
    """A B^T, of operands cast to `dtype`, in f32."""
    return _dot(a.astype(dtype), b.astype(dtype), -1, -1)


def _save(a: Array, b: Array, dtype: Any) -> Any:
    # The empty arrays carry the types that the gradients must have.
    return a.astype(dtype), b.astype(dtype), jnp.zeros(0, a.dtype), jnp.zeros(0, b.dtype)


def _matmul_forward(a: Array, b: Array, dtype: Any) -> tuple[Array, Any]:
    return matmul(a, b, dtype), _save(a, b, dtype)


def _matmul_backward(dtype: Any, saved: Any, gradient: Array) -> tuple[Array, Array]:
    a, b, like_a, like_b = saved
    gradient = gradient.astype(dtype)
    # dA = G B^T, dB = A^T G
    return (
        _dot(gradient, b, -1, -1).astype(like_a.dtype),
        matmul_first_transposed(a, gradient).astype(like_b.dtype),
    )


def _matmul_transposed_forward(a: Array, b: Array, dtype: Any) -> tuple[Array, Any]:
    return matmul_transposed(a, b, dtype), _save(a, b, dtype)


def _matmul_transposed_backward(dtype: Any, saved: Any, gradient: Array) -> tuple[Array, Array]:
    a, b, like_a, like_b = saved
    gradient = gradient.astype(dtype)
    # dA = G B, dB = G^T A
    return (
        _dot(gradient, b, -1, -2).astype(like_a.dtype),
        matmul_first_transposed(gradient, a).astype(like_b.dtype),
    )


matmul.defvjp(_matmul_forward, _matmul_backward)
matmul_transposed.defvjp(_matmul_transposed_forward, _matmul_transposed_backward)


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    batch = tuple(range(a.ndim - 2))
    contracted = ((a.ndim + axis_of_a,), (b.ndim + axis_of_b,))
    return jax.lax.dot_general(
        a, b, (contracted, (batch, batch)), preferred_element_type=jnp.float32
    )


def matmul_first_transposed(
    a: Float[Array, "*batch k m"], b: Float[Array, "*batch k n"]
) -> Float[Array, "*batch m n"]:
    """A^T B in f32, of operands of one type, as gradients need it. Has no gradient itself."""

    def on_cpu(a: Array, b: Array) -> Array:
        # The narrower operand is transposed, and then the result, which is smaller than the wider.
        if a.shape[-1] > b.shape[-1]:
            return written_transposed(_dot(written_transposed(b), a, -1, -2))
        return _dot(written_transposed(a), b, -1, -2)

    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=lambda a, b: _dot(a, b, -2, -2))


FEW_ROWS = 64
"""Up to this many rows, a CPU is faster with the matrix as the left operand."""


def streamed_product(x: Float[Array, "n k"], w: Float[Array, "m k"]) -> Float[Array, "n m"]:
    """X W^T in f32 for a few rows and a large matrix, which is read once: decoding. No gradient.

    On a CPU the matrix is the left operand, which XLA's library reads in place; the right operand
    is packed again at each call, which pays only for many rows. The library does not take
    products with a single column.
    """

    def on_cpu(x: Array, w: Array) -> Array:
        if len(x) > FEW_ROWS:
            return _dot(x, w, -1, -1)
        columns = jnp.concatenate([x, x]) if len(x) == 1 and x.dtype != jnp.float32 else x
        return written_transposed(_dot(w, columns, -1, -1))[: len(x)]

    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=lambda x, w: _dot(x, w, -1, -1))


def written_transposed(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n m"]:
    """The transpose, as an array of its own.

    XLA folds a plain transpose into the product that reads it, and its library does not take such
    a product. It does not see through a split axis.
    """
    *batch, m, n = x.shape
    if m % 2:
        return x.swapaxes(-1, -2)
    return jnp.moveaxis(x.reshape(*batch, m // 2, 2, n), -1, -3).reshape(*batch, n, m)


def written_swapped(x: Float[Array, "*batch m n k"]) -> Float[Array, "*batch n m k"]:
    """Axes -3 and -2 swapped, likewise."""
    *batch, m, n, k = x.shape
    if m % 2:
        return x.swapaxes(-2, -3)
    return jnp.moveaxis(x.reshape(*batch, m // 2, 2, n, k), -2, -4).reshape(*batch, n, m, k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    table: Float[Array, "vocab embed"], tokens: Int[Array, " n"], dtype: Any
) -> Float[Array, "n embed"]:
    """Rows of `table`, in `dtype`. Its gradient is a scatter on a CPU, else a matrix product.

    XLA on a GPU turns a scatter-add with repeated rows into serial atomic updates. On a CPU the
    scatter is about 50 times faster than the product.
    """
    if table.dtype == jnp.bfloat16:
        # XLA on a CPU would make the whole table f32 to take bf16 rows from it; these are bits.
        bits = jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens]
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)
    return table[tokens].astype(dtype)


def _embed_forward(
    table: Float[Array, "vocab embed"], tokens: Int[Array, " n"], dtype: Any
) -> tuple[Float[Array, "n embed"], tuple[Array, int]]:
    return embed(table, tokens, dtype), (tokens, table.shape[0])


def _row_sums_by_scatter(
    gradient: Float[Array, "n embed"], tokens: Int[Array, " n"], vocab_size: int
) -> Float[Array, "vocab embed"]:
    zeros = jnp.zeros((vocab_size, gradient.shape[1]), jnp.float32)
    return zeros.at[tokens].add(gradient.astype(jnp.float32))


def _row_sums_by_product(
    gradient: Float[Array, "n embed"], tokens: Int[Array, " n"], vocab_size: int
) -> Float[Array, "vocab embed"]:
    one_hot = jax.nn.one_hot(tokens, vocab_size, dtype=gradient.dtype)
    return jnp.einsum("nv,ne->ve", one_hot, gradient, preferred_element_type=jnp.float32)


def _embed_backward(
    _: Any, saved: tuple[Array, int], gradient: Float[Array, "n embed"]
) -> tuple[Float[Array, "vocab embed"], None]:
    tokens, vocab_size = saved
    sums = jax.lax.platform_dependent(
        gradient,
        tokens,
        cpu=functools.partial(_row_sums_by_scatter, vocab_size=vocab_size),
        default=functools.partial(_row_sums_by_product, vocab_size=vocab_size),
    )
    return sums, None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU by tanh (arXiv 1606.08415), computed in f32.

    Its gradient starts from `x` again: a second tanh costs less than writing the first one, in
    f32 and as wide as the MLP, and reading it back.
    """
    return nnx.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    def in_f32(x: Array) -> Array:
        return nnx.gelu(x, approximate=True)

    slope = jax.vjp(in_f32, x.astype(jnp.float32))[1](gradient.astype(jnp.float32))[0]
    return (slope.astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def token_losses(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Cross-entropy in nats of each target: logsumexp(logits) less the target's logit."""
    return _token_losses_forward(logits, targets)[0]


def _token_losses_forward(logits: Array, targets: Array) -> tuple[Array, Any]:
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normaliser - target_logits, (logits, targets, normaliser)


def _token_losses_backward(saved: Any, gradient: Array) -> tuple[Array, None]:
    logits, targets, normaliser = saved
    probabilities = jnp.exp(logits - normaliser[..., None])
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    return (probabilities - is_target) * gradient[..., None], None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)
