"""Cached decoding against the plain forward pass, and the filters against their definitions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gothic_jax.errors import UserError
from gothic_jax.model.gpt import Params, graph, init_params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.writing.sampler import (
    DECODE_CHUNK,
    Sampler,
    Sampling,
    blend_logits,
    filter_logits,
    keep_window,
)
from tests.common import TINY

GREEDY = Sampling(temperature=0.0)


@functools.cache
def loud_params(config: ModelConfig) -> Params:
    """Weights that make the next token depend strongly on the context, as a trained model's."""

    def louder(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        factor = 40 if "kernel" in str(path[-1]) else 10
        return leaf * factor if leaf.ndim > 1 else leaf

    return jax.tree_util.tree_map_with_path(louder, init_params(config, 3))


@pytest.fixture(params=["gemma", "gpt2"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    shape = {"architecture": request.param, "block_size": 70, "n_layer": 2}
    return ModelConfig(**vars(TINY) | shape)


@functools.cache
def shared_sampler(config: ModelConfig) -> Sampler:
    return Sampler(config, dtype=jnp.float32)


def write(
    config: ModelConfig,
    prompt: list[list[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    sampler: Sampler | None = None,
) -> np.ndarray:
    chunks = (sampler or shared_sampler(config)).stream(
        loud_params(config),
        np.array(prompt, np.int32),
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
    )
    return np.concatenate(list(chunks), axis=1)


@functools.cache
def full_forward(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    return nnx.jit(nnx.merge(graph(config, jnp.float32), loud_params(config)))


def by_full_forward(config: ModelConfig, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy text by the whole forward pass at every step, sliding as the sampler documents."""
    forward = full_forward(config)
    block = config.block_size
    context = prompt if len(prompt) <= block else [prompt[0], *prompt[-(block - 1) :]]
    written: list[int] = []
    while len(written) < max_tokens:
        padded = np.zeros((1, block), np.int32)
        padded[0, : len(context)] = context
        logits = forward(jnp.asarray(padded))
        token = int(jnp.argmax(logits[0, len(context) - 1]))
        written.append(token)
        context = [*context, token]
        if len(context) > block:
            context = [context[0], *context[-(block // 2 - 1) :]]
    return written


@pytest.mark.parametrize("prompt_length", [1, 2, 64, 65, 66, 69, 70, 100])
def test_greedy_text_equals_the_full_forward_pass(config: ModelConfig, prompt_length: int) -> None:
    prompt = [1, *np.random.default_rng(0).integers(3, 320, prompt_length - 1).tolist()]
    expected = by_full_forward(config, prompt, 90)
    assert len(set(expected)) > 10
    assert write(config, [prompt], 90)[0].tolist() == expected


@pytest.mark.parametrize("prompt_length", [110, 129, 140])
@pytest.mark.long
def test_text_goes_on_the_same_where_its_caches_grow_longer(
    config: ModelConfig, prompt_length: int
) -> None:
    config = ModelConfig(**vars(config) | {"block_size": 300})
    prompt = [1, *np.random.default_rng(0).integers(3, 320, prompt_length - 1).tolist()]
    expected = by_full_forward(config, prompt, 150)  # past 128 and 256 positions
    assert write(config, [prompt], 150)[0].tolist() == expected


def test_a_top_k_beyond_the_vocabulary_draws_from_all() -> None:
    everything = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    np.testing.assert_array_equal(
        write(TINY, [[1, 5]], 20, everything._replace(top_k=3_000_000_000)),
        write(TINY, [[1, 5]], 20, everything),
    )


def test_exactly_as_many_tokens_as_asked(config: ModelConfig) -> None:
    for max_tokens in (1, DECODE_CHUNK, DECODE_CHUNK + 1, 80):
        assert write(config, [[1, 5]], max_tokens).shape == (1, max_tokens)


def test_rows_are_written_as_if_alone_and_differ_among_themselves(config: ModelConfig) -> None:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    batch = write(config, [[1, 5, 6]] * 3, 20, sampling, seed=7)
    alone = write(config, [[1, 5, 6]], 20, sampling, seed=7)
    np.testing.assert_array_equal(batch[0], alone[0])
    assert len({tuple(row) for row in batch}) == 3


def blended(
    config: ModelConfig, prompts: list[list[int]], weights: list[float], n: int, **how: Any
) -> np.ndarray:
    chunks = shared_sampler(config).stream(
        loud_params(config),
        np.array(prompts, np.int32),
        max_tokens=n,
        weights=weights,
        **{"sampling": GREEDY, "seed": 0} | how,
    )
    return np.concatenate(list(chunks), axis=1)


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.5, -0.5], [0.5, 0.75, -0.25]])
def test_a_blend_adds_up_weighted_log_probabilities(
    config: ModelConfig, weights: list[float]
) -> None:
    """By whole forward passes and NumPy, past the end of the window."""
    body = [7, 9, 11]
    contexts = [[opener, *body] for opener in range(1, 1 + len(weights))]
    start = [list(context) for context in contexts]
    expected = []
    for _ in range(80):
        total = np.zeros(config.vocab_size)
        for context, weight in zip(contexts, weights, strict=True):
            padded = np.zeros((1, config.block_size), np.int32)
            padded[0, : len(context)] = context
            logits = np.asarray(full_forward(config)(jnp.asarray(padded)), np.float64)
            logits = logits[0, len(context) - 1]
            total += weight * (logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        expected.append(int(total.argmax()))
        for context in contexts:
            context.append(expected[-1])
            if len(context) > config.block_size:
                context[1:] = context[-(config.block_size // 2 - 1) :]
    assert len(set(expected)) > 10
    assert blended(config, start, weights, 80)[0].tolist() == expected


def test_blended_texts_are_drawn_as_if_alone(config: ModelConfig) -> None:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    rows = [[1, 5, 6], [2, 5, 6]]
    batch = blended(config, rows * 3, [0.4, 0.6], 20, sampling=sampling)
    np.testing.assert_array_equal(
        batch[:1], blended(config, rows, [0.4, 0.6], 20, sampling=sampling)
    )
    assert len({tuple(text) for text in batch}) == 3


def test_a_blend_is_renormalised() -> None:
    """The geometric mean of (3/4, 1/4) and (1/4, 3/4) is even; (1.5, -0.5) makes them 9 to 1."""
    logits = jnp.log(jnp.array([[0.75, 0.25], [0.25, 0.75]])) + 3.0  # as logits, to a constant
    even = blend_logits(logits, jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(jax.nn.softmax(even), [[0.5, 0.5]], rtol=1e-6)
    more = blend_logits(logits, jnp.array([1.5, -0.5]))
    np.testing.assert_allclose(jax.nn.softmax(more), [[0.9, 0.1]], rtol=1e-5)


@pytest.mark.long
def test_many_streams_write_what_one_does(config: ModelConfig) -> None:
    """Their prompts are read in shorter chunks, and their caches begin shorter."""
    config = ModelConfig(**vars(config) | {"block_size": 100})
    prompts = np.random.default_rng(0).integers(3, 320, (40, 20)).tolist()
    together = write(config, prompts, 60)
    for number in (0, 39):
        assert together[number].tolist() == by_full_forward(config, prompts[number], 60)


def test_rows_may_have_prompts_of_their_own(config: ModelConfig) -> None:
    together = write(config, [[1, 5, 6], [2, 8, 9]], 20)
    np.testing.assert_array_equal(together[0], write(config, [[1, 5, 6]], 20)[0])
    np.testing.assert_array_equal(together[1], write(config, [[2, 8, 9]], 20)[0])


def test_the_same_seed_writes_the_same_text_and_another_does_not(config: ModelConfig) -> None:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    once, again, other = (write(config, [[1, 5]], 30, sampling, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


def test_top_k_1_and_tiny_top_p_are_greedy(config: ModelConfig) -> None:
    greedy = write(config, [[1, 5]], 30)
    for sampling in (Sampling(1.0, 1, 1.0), Sampling(1.0, 0, 1e-9)):
        np.testing.assert_array_equal(write(config, [[1, 5]], 30, sampling, seed=9), greedy)


def test_parameters_on_a_device_of_their_own_need_no_further_programs(config: ModelConfig) -> None:
    # As a checkpoint's are. Both prompt and text take several calls of their program.
    params = jax.device_put(loud_params(config), jax.devices()[-1])
    sampler = Sampler(config, dtype=jnp.float32)
    prompt = np.tile(np.arange(1, 100, dtype=np.int32), (1, 1))
    [*sampler.stream(params, prompt, max_tokens=20, sampling=Sampling(), seed=1)]
    assert (sampler.prefill._cache_size(), sampler._decode._cache_size()) == (1, 1)


def test_another_prompt_or_setting_does_not_compile_again() -> None:
    sampler = Sampler(TINY, dtype=jnp.float32)
    write(TINY, [[1, *range(3, 12)]], 40, Sampling(1.0, 40, 0.9), 0, sampler)
    before = sampler.prefill._cache_size(), sampler._decode._cache_size()
    write(TINY, [[1, 5]], 40, Sampling(0.5, 13, 0.3), 1, sampler)
    write(TINY, [[1, *range(3, 30)]], 7, Sampling(0.0, 64, 1.0), 2, sampler)
    assert (sampler.prefill._cache_size(), sampler._decode._cache_size()) == before == (1, 1)


def probabilities(logits: list[float], *settings: float) -> np.ndarray:
    return np.asarray(
        jax.nn.softmax(filter_logits(jnp.array([logits]), *map(jnp.asarray, settings))[0])
    )


def test_temperature_divides_the_logits() -> None:
    np.testing.assert_allclose(
        probabilities([2.0, 1.0, 0.0], 0.5, 3, 1.0),
        np.exp([4, 2, 0]) / np.exp([4, 2, 0]).sum(),
        rtol=1e-5,
    )


def test_top_k_keeps_k_and_renormalises() -> None:
    expected = [*(np.exp([2, 1]) / np.exp([2, 1]).sum()), 0, 0]
    np.testing.assert_allclose(probabilities([2, 1, 0.5, 0], 1.0, 2, 1.0), expected, rtol=1e-5)


def test_top_p_keeps_the_token_that_crosses_p() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    for top_p, kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)):
        assert (probabilities(logits, 1.0, 4, top_p) > 0).sum() == kept


def test_drawing_follows_the_probabilities() -> None:
    config = ModelConfig(**vars(TINY) | {"vocab_size": 3})
    params = init_params(config, 0)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    n = 4000
    sampler = Sampler(config, dtype=jnp.float32)
    (first, *_) = sampler.stream(
        params, np.ones((n, 1), np.int32), max_tokens=1, sampling=sampling, seed=0
    )
    model = nnx.merge(graph(config, jnp.float32), params)
    expected = jax.nn.softmax(model(jnp.ones((1, 1), jnp.int32))[0, 0])
    shares = np.bincount(first[:, 0], minlength=3) / n
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / n))


def test_a_window_keeps_its_opener() -> None:
    tokens = np.array([[9, 1, 2, 3, 4]])
    assert keep_window(tokens, 3).tolist() == [[9, 3, 4]]
    assert keep_window(tokens, 1).tolist() == [[9]]
    assert keep_window(tokens, 5) is tokens


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-0.1),
        Sampling(temperature=float("nan")),
        Sampling(top_k=-1),
        Sampling(top_p=0.0),
        Sampling(top_p=1.1),
    ],
)
def test_settings_out_of_range_are_told(sampling: Sampling) -> None:
    with pytest.raises(UserError, match="must be"):
        sampling.validate()
