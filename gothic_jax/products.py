"""Matrix products of the training step: narrow operands, f32 sums, fast gradients.

JAX's own gradient of a product lets the operands' types and axes fall as they come. Three
things are settled here instead, each of which some backend is several times slower without:

- Operands are of the compute type in all three products, sums in f32. A f32 gradient times a
  bf16 weight would be a f32 product on every backend.
- A weight's gradient leaves its sum in f32 and is never rounded to the compute type.
- On a CPU, XLA hands a product to its library of kernels (which for bf16 has AMX and AVX-512
  ones) only where the left operand's last axis is summed over. The gradient of the right
  operand sums over the first one, so that its left operand is transposed beforehand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
    """A^T B in f32, of operands of one type: the shape of gradients. Has no gradient itself."""
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: _dot(written_transposed(a), b, -1, -2),
        default=lambda a, b: _dot(a, b, -2, -2),
    )


FEW_ROWS = 64
"""Up to here a CPU streams a matrix from the left faster than it multiplies rows by it."""


def streamed_product(x: Float[Array, "n k"], w: Float[Array, "m k"]) -> Float[Array, "n m"]:
    """X W^T in f32 for a few rows and a large matrix, which is read once: decoding. No gradient.

    On a CPU the matrix stands on the left, where XLA's library reads it as it lies; on the right
    it would be packed anew for each call, which only many rows are worth. The library takes no
    product of a single column.
    """

    def on_cpu(x: Array, w: Array) -> Array:
        if len(x) > FEW_ROWS:
            return _dot(x, w, -1, -1)
        columns = jnp.concatenate([x, x]) if len(x) == 1 and x.dtype != jnp.float32 else x
        return written_transposed(_dot(w, columns, -1, -1))[: len(x)]

    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=lambda x, w: _dot(x, w, -1, -1))


def written_transposed(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch n m"]:
    """The transpose, as an array of its own.

    XLA folds a plain transpose into the product that reads it, which is then none that its
    library takes. It does not see through a split axis.
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
