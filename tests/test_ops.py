"""The products of training and decoding, and their gradients, against NumPy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gothic_jax.model.ops import (
    matmul,
    matmul_first_transposed,
    matmul_transposed,
    streamed_product,
    written_swapped,
    written_transposed,
)

SHAPES = [(6, 4, 8), (5, 3, 7), (1, 1, 1), (2, 3, 6, 4, 8)]
"""(batch axes..., m, k, n), even and odd."""


def random(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape)


def operands(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A [m, k], B [k, n] and a gradient of their product [m, n]."""
    *batch, m, k, n = shape
    return random(0, *batch, m, k), random(1, *batch, k, n), random(2, *batch, m, n)


def transposed(x: jax.Array) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_their_gradients_are_the_textbook_ones(shape: tuple[int, ...]) -> None:
    a, b, gradient = operands(shape)

    @jax.jit
    def products(a: jax.Array, b: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        product, pull = jax.vjp(lambda a, b: matmul(a, b, jnp.float32), a, b)
        other, pull_other = jax.vjp(
            lambda a, b: matmul_transposed(a, b, jnp.float32), a, b.swapaxes(-1, -2)
        )
        return product, *pull(gradient), other, *pull_other(gradient)

    product, to_a, to_b, other, other_to_a, other_to_b = products(a, b, gradient)
    for ours, expected in (
        (product, np.asarray(a) @ np.asarray(b)),
        (to_a, np.asarray(gradient) @ transposed(b)),
        (to_b, transposed(a) @ np.asarray(gradient)),
        (other, product),
        (other_to_a, to_a),
        (other_to_b, transposed(to_b)),
        (matmul_first_transposed(a, gradient), to_b),
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("product", [matmul, matmul_transposed])
def test_bf16_products_sum_in_f32_and_leave_an_f32_weights_gradient_unrounded(
    product: Callable[..., jax.Array],
) -> None:
    ones = jnp.ones((258, 2), jnp.bfloat16)  # 258 has no bf16 of its own: 256, then 260

    def loss(weight: jax.Array) -> jax.Array:
        return product(ones, weight, jnp.bfloat16).sum()

    assert product(ones, jnp.eye(2), jnp.bfloat16).dtype == jnp.float32
    np.testing.assert_array_equal(jax.grad(loss)(jnp.eye(2)), np.full((2, 2), 258.0))
    assert jax.grad(loss)(jnp.eye(2, dtype=jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_streamed_product_is_the_product_with_the_transpose(rows: int, dtype: jnp.dtype) -> None:
    x, w = random(0, rows, 16).astype(dtype), random(1, 48, 16).astype(dtype)
    ours = jax.jit(streamed_product)(x, w)
    assert ours.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [4, 5])
def test_written_transposes_are_transposes(m: int) -> None:
    x = random(0, 2, m, 3, 5)
    np.testing.assert_array_equal(written_transposed(x[0]), np.swapaxes(x[0], -1, -2))
    np.testing.assert_array_equal(written_swapped(x), np.swapaxes(x, -2, -3))
