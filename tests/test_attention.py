import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gothic_jax.model.attention import (
    Implementation,
    KVBlocks,
    KVCache,
    blockwise_attention,
    cached_attention,
    causal_attention,
    choose,
    rotate,
    rotation,
)


def qkv(time: int, head_dim: int = 16) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), (2, time, 3, head_dim)) for i in range(3)]


def by_hand(query: jax.Array, key: jax.Array, value: jax.Array) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(q)
    for row, time, head in np.ndindex(q.shape[:3]):
        scores = k[row, : time + 1, head] @ q[row, time, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[row, time, head] = weights / weights.sum() @ v[row, : time + 1, head]
    return out


@pytest.mark.parametrize("implementation", ["xla", "xla-blocks"])
@pytest.mark.parametrize("time", [1, 9, 64, 150])
def test_causal_attention_is_the_formula(implementation: Implementation, time: int) -> None:
    inputs = qkv(time)
    np.testing.assert_allclose(
        causal_attention(*inputs, implementation=implementation), by_hand(*inputs), atol=1e-5
    )


def test_attention_by_blocks_has_the_gradients_of_the_plain_one() -> None:
    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=(1, 2, 3))
    def gradients(implementation: Implementation, *inputs: jax.Array) -> jax.Array:
        return (causal_attention(*inputs, implementation=implementation) ** 3).sum()

    plain, blocks = (gradients(name, *qkv(700)) for name in ("xla", "xla-blocks"))
    for one, other in zip(plain, blocks, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_cached_attention_sees_the_past_and_itself_but_no_stale_entries() -> None:
    query, key, value = qkv(9)
    own = KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2))
    stale = KVCache(*(jnp.full((2, 3, 20, 16), 100.0),) * 2)  # left over from another text
    past = stale.write(KVCache(*(part[:, :, :4] for part in own)), 0)
    # The rest is added in two pieces, the second one after the first.
    recent = KVCache(*(part[:, :, :6] for part in stale)).write(
        KVCache(*(part[:, :, 4:] for part in own)), 0
    )
    pieces = [
        cached_attention(query[:, 4:6], past, 4, recent, 0),
        cached_attention(query[:, 6:], past, 4, recent, 2),
    ]
    context = jnp.concatenate(pieces, axis=1)
    np.testing.assert_allclose(context, by_hand(query, key, value)[:, 4:], atol=1e-5)


def test_blockwise_attention_is_the_formula_for_each_row_and_reads_no_block_without_need() -> None:
    query, key, value = qkv(12)
    own = KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2))
    recent = KVCache(*(jnp.full((2, 3, 4, 16), 100.0),) * 2)

    def attended(starts: tuple[int, int]) -> np.ndarray:
        """The second token behind so many of each row, in blocks of 4 positions."""
        latest = recent
        for row, start in enumerate(starts):
            latest = KVCache(
                *(
                    old.at[row, :, :2].set(new[row, :, start : start + 2])
                    for old, new in zip(latest, own, strict=True)
                )
            )
        # Nobody needs the third block, which would make everything that reads it no number.
        blocks = [KVCache(*(part[:, :, first : first + 4] for part in own)) for first in (0, 4)]
        blocks.append(KVCache(*(jnp.full((2, 3, 4, 16), jnp.nan),) * 2))
        asked = jnp.stack([query[row, start + 1] for row, start in enumerate(starts)])[:, None]
        past = KVBlocks(tuple(blocks))
        return np.asarray(jax.jit(blockwise_attention)(asked, past, jnp.array(starts), latest, 1))

    expected = by_hand(query, key, value)
    for starts in ((0, 3), (2, 8), (7, 4)):
        for row, start in enumerate(starts):
            np.testing.assert_allclose(
                attended(starts)[row, 0], expected[row, start + 1], atol=1e-5
            )
    # The first row, beside one that needs the second block and one that does not.
    np.testing.assert_array_equal(attended((3, 0))[0], attended((3, 8))[0])


def test_rotated_products_depend_on_the_distance_alone() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))

    def product(first: int, second: int) -> float:
        rotated = rotate(x, rotation(jnp.array([first, second]), x.shape[-1]))
        return float(rotated[0, 0, 0] @ rotated[0, 1, 0])

    assert product(3, 7) == pytest.approx(product(103, 107), rel=1e-4)
    assert product(3, 7) != pytest.approx(product(3, 9), rel=1e-2)


def test_xla_is_chosen_on_a_cpu_with_the_reason() -> None:
    name, reason = choose(jax.devices("cpu")[0], 64, jnp.bfloat16)
    assert name == "xla-blocks"
    assert "GPU" in reason


@pytest.mark.gpu
def test_cudnn_is_chosen_compiled_and_equal_to_xla() -> None:
    assert choose(jax.devices()[0], 64, jnp.bfloat16)[0] == "cudnn"
    inputs = [x.astype(jnp.bfloat16) for x in qkv(128, 64)]

    def outputs(implementation: Implementation) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def loss(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = causal_attention(*inputs, implementation=implementation)
            return (out.astype(jnp.float32) ** 2).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
        return out, gradients

    compiled = jax.jit(lambda *x: outputs_of("cudnn", *x)).lower(*inputs).compile()
    assert "__cudnn$fmha" in compiled.as_text()
    for ours, theirs in zip(
        jax.tree.leaves(outputs("cudnn")), jax.tree.leaves(outputs("xla")), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=3e-2, rtol=3e-2
        )


def outputs_of(implementation: Implementation, *inputs: jax.Array) -> jax.Array:
    return causal_attention(*inputs, implementation=implementation)
