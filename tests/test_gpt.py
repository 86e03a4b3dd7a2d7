"""The model against Hugging Face's figures, its own formulas, and causality."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.weights import CONFIG, reference_tokens, reference_weights

from gothic_jax.errors import UserError
from gothic_jax.model.gpt import (
    GPT,
    Params,
    empty_caches,
    flops_per_token,
    graph,
    init_params,
    parameter_count,
    streamed_params,
)
from gothic_jax.model.ops import _row_sums_by_product, _row_sums_by_scatter, token_losses
from gothic_jax.model.shape import ModelConfig
from tests.common import TINY

REFERENCE = Path(__file__).parent / "reference"
ARCHITECTURES = ["gemma", "gpt2"]


def reference_config(architecture: str) -> ModelConfig:
    return ModelConfig(architecture=architecture, dropout=0.0, **CONFIG)


def merge(config: ModelConfig, params: Params) -> GPT:
    return nnx.merge(graph(config, jnp.float32), params)


def from_gpt2(weights: dict[str, np.ndarray]) -> Params:
    """Our tree, given the tensors of a GPT2LMHeadModel."""

    def norm(name: str) -> Params:
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def linear(name: str) -> Params:
        return {"kernel": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    blocks = {}
    for layer in range(CONFIG["n_layer"]):
        block = f"transformer.h.{layer}"
        blocks[layer] = {
            "attention_norm": norm(f"{block}.ln_1"),
            "attention": {
                "qkv": linear(f"{block}.attn.c_attn"),
                "out": linear(f"{block}.attn.c_proj"),
            },
            "mlp_norm": norm(f"{block}.ln_2"),
            "mlp": {"up": linear(f"{block}.mlp.c_fc"), "down": linear(f"{block}.mlp.c_proj")},
        }
    return {
        "token_embedding": weights["transformer.wte.weight"],
        "position_embedding": weights["transformer.wpe.weight"],
        "blocks": blocks,
        "final_norm": norm("transformer.ln_f"),
    }


def from_gemma(weights: dict[str, np.ndarray], norm_offset: float = 1.0) -> Params:
    """Our tree, given the tensors of a GemmaForCausalLM, whose norms are stored less 1."""

    def norm(name: str) -> Params:
        return {"scale": norm_offset + weights[f"{name}.weight"]}

    def linear(*names: str) -> Params:
        return {"kernel": np.concatenate([weights[f"{name}.weight"].T for name in names], axis=1)}

    blocks = {}
    for layer in range(CONFIG["n_layer"]):
        block = f"model.layers.{layer}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        blocks[layer] = {
            "attention_norm": norm(f"{block}.input_layernorm"),
            "attention": {
                "qkv": linear(*(f"{attention}.{name}_proj" for name in "qkv")),
                "out": linear(f"{attention}.o_proj"),
            },
            "mlp_norm": norm(f"{block}.post_attention_layernorm"),
            "mlp": {
                "up": linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                "down": linear(f"{mlp}.down_proj"),
            },
        }
    return {
        "token_embedding": weights["model.embed_tokens.weight"],
        "blocks": blocks,
        "final_norm": norm("model.norm"),
    }


def reference_params(architecture: str) -> Params:
    weights = reference_weights(architecture)
    params = from_gpt2(weights) if architecture == "gpt2" else from_gemma(weights)
    return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_loss_equal_transformers(architecture: str) -> None:
    figures = np.load(REFERENCE / f"{architecture}.npz")
    tokens = jnp.asarray(reference_tokens())
    logits = merge(reference_config(architecture), reference_params(architecture))(tokens)
    # 1e-4 would let GPT-2's epsilon pass in Gemma's norm.
    np.testing.assert_allclose(logits, figures["logits"], rtol=0, atol=1e-5)
    loss = token_losses(logits[:, :-1], tokens[:, 1:]).mean()
    np.testing.assert_allclose(loss, figures["loss"], rtol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_transformers(architecture: str) -> None:
    figures = np.load(REFERENCE / f"{architecture}.npz")
    tokens = jnp.asarray(reference_tokens())

    def loss(params: Params) -> jax.Array:
        logits = merge(reference_config(architecture), params)(tokens)
        return token_losses(logits[:, :-1], tokens[:, 1:]).mean()

    gradient = jax.jit(jax.grad(loss))(reference_params(architecture))
    expected = dict(zip(figures["grad_norm_names"], figures["grad_norms"], strict=True))
    # The norms of Transformers' tensors, laid out as weights, go through the same conversion:
    # where we have fused several, theirs are added in squares.
    squares = {name: np.full((1, 1), norm**2) for name, norm in expected.items()}
    convert = from_gpt2 if architecture == "gpt2" else lambda w: from_gemma(w, norm_offset=0.0)
    ours = jax.tree.map(lambda leaf: np.sqrt(np.square(leaf).sum()), gradient)
    theirs = jax.tree.map(lambda leaf: np.sqrt(leaf.sum()), convert(squares))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for path, norm in jax.tree_util.tree_leaves_with_path(ours):
        want = next(w for p, w in jax.tree_util.tree_leaves_with_path(theirs) if p == path)
        np.testing.assert_allclose(norm, want, rtol=2e-5, err_msg=str(path))


def test_parameter_counts_are_those_documented() -> None:
    def count(architecture: str) -> int:
        config = ModelConfig(architecture=architecture)
        return parameter_count(jax.eval_shape(lambda: init_params(config, 0)))

    assert count("gemma") == 4096 * 512 + 8 * (4 * 512**2 + 3 * 4 * 512**2 + 2 * 512) + 512
    assert round(count("gemma") / 1e6, 1) == 35.7
    assert round(count("gpt2") / 1e6, 1) == 27.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("n_embd", [128, 512])
def test_a_new_model_knows_nothing_and_claims_nothing(architecture: str, n_embd: int) -> None:
    config = ModelConfig(architecture=architecture, n_layer=2, n_embd=n_embd)
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, config.vocab_size)
    logits = merge(config, init_params(config, 0))(tokens[:, :-1])
    loss = token_losses(logits, tokens[:, 1:]).mean()
    assert float(loss) == pytest.approx(np.log(config.vocab_size), rel=0.03)


def test_flops_of_the_gpt2_shape_are_the_derived_4_48_tflop() -> None:
    config = ModelConfig(architecture="gpt2")
    params = jax.eval_shape(lambda: init_params(config, 0))
    np.testing.assert_allclose(24_576 * flops_per_token(config, params), 4.49e12, rtol=0.005)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_position_depends_on_a_later_one(architecture: str) -> None:
    config = reference_config(architecture)
    params = reference_params(architecture)
    tokens = reference_tokens()[:1]
    seen = 10
    changed = tokens.copy()
    changed[:, seen + 1 :] = (changed[:, seen + 1 :] + 1) % config.vocab_size
    before, after = (
        np.asarray(merge(config, params)(jnp.asarray(row))) for row in (tokens, changed)
    )
    np.testing.assert_array_equal(before[:, : seen + 1], after[:, : seen + 1])
    assert not np.allclose(before[:, seen + 1 :], after[:, seen + 1 :])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pieces", [[24], [1] * 24, [7, 1, 16]])
def test_cached_forward_equals_the_full_one(architecture: str, pieces: list[int]) -> None:
    config = reference_config(architecture)
    params = reference_params(architecture)
    model = merge(config, params)
    decoder = nnx.merge(
        graph(config, jnp.float32, streamed=True), streamed_params(params, jnp.float32)
    )
    extend = nnx.jit(type(decoder).extend)
    tokens = jnp.asarray(reference_tokens())
    caches = empty_caches(config, len(tokens), config.block_size, jnp.float32)
    logits, start = [], 0
    for piece in pieces:
        recent = empty_caches(config, len(tokens), piece, jnp.float32)
        part = tokens[:, start : start + piece]
        hidden, recent = extend(decoder, part, caches, jnp.array(start), recent, jnp.array(0))
        caches = [cache.write(new, start) for cache, new in zip(caches, recent, strict=True)]
        flat = decoder.logits(hidden.reshape(-1, config.n_embd))
        logits.append(flat.reshape(len(tokens), piece, -1))
        start += piece
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), model(tokens), atol=2e-6)


def test_embedding_gradient_sums_the_rows_of_a_repeated_token() -> None:
    tokens = jnp.array([3, 0, 3, 3, 5])
    gradient = jax.random.normal(jax.random.key(0), (5, 4))
    expected = np.zeros((7, 4), np.float32)
    for token, row in zip(np.asarray(tokens), np.asarray(gradient), strict=True):
        expected[token] += row
    for sums in (_row_sums_by_scatter, _row_sums_by_product):
        np.testing.assert_allclose(sums(gradient, tokens, 7), expected, atol=1e-6)


def test_dropout_drops_only_with_a_key_and_the_same_for_the_same_key() -> None:
    params = init_params(TINY, 0)
    tokens = jnp.arange(8)[None]
    plain, once, again, other = (
        np.asarray(merge(TINY, params)(tokens, dropout_key=key))
        for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    )
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, plain)
    assert not np.allclose(once, other)


def test_bf16_computes_close_to_f32_and_returns_f32() -> None:
    config = reference_config("gemma")
    params = reference_params("gemma")
    tokens = jnp.asarray(reference_tokens())
    exact = merge(config, params)(tokens)
    rounded = nnx.merge(graph(config, jnp.bfloat16), params)(tokens)
    assert rounded.dtype == jnp.float32
    assert not np.array_equal(rounded, exact)
    np.testing.assert_allclose(rounded, exact, atol=0.1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "llama"}, "gemma, gpt2"),
        ({"n_embd": 30, "n_head": 4}, "multiple"),
        ({"n_embd": 6, "n_head": 2}, "even"),
    ],
)
def test_impossible_shapes_are_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ModelConfig(**change).validate()  # type: ignore[arg-type]
