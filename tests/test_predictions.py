import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from gothic_jax.checkpoints.checkpoint import Checkpoint, locate
from gothic_jax.errors import UserError
from gothic_jax.machine.device import select_device
from gothic_jax.measuring.predictions import Prediction, Predictions, blended, distributions_on
from gothic_jax.model.gpt import graph, init_params
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.works import END_OF_TEXT
from gothic_jax.writing.writer import Writer
from tests.common import DARK, TINY, Workplace

BLENDS = [{}, {"wilde": 1.0}, {"wilde": 0.25, "lovecraft": 0.75}, {"lovecraft": 1.5}]


@functools.cache
def params() -> dict:
    """A model whose expectations differ from token to token."""
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, init_params(TINY, 3))


@pytest.fixture(scope="module")
def predictions(tokenizer: Tokenizer) -> Predictions:
    distributions = distributions_on(jax.devices()[0], TINY, "float32")
    return Predictions(distributions, params(), tokenizer, TINY.block_size)


def plainly(tokenizer: Tokenizer, context: list[int], blend: dict[str, float]) -> np.ndarray:
    """Log-probabilities after a context, by a pass over nothing else, in NumPy and f64."""
    model = nnx.merge(graph(TINY, jnp.float32), params())
    total = np.zeros(TINY.vocab_size)
    weights = blend | {"any": 1 - sum(blend.values())}
    for voice, weight in weights.items():
        opener = tokenizer.special_tokens[f"<|{voice}|>"]
        padded = np.zeros((1, TINY.block_size), np.int32)
        padded[0, : len(context) + 1] = [opener, *context]
        logits = np.asarray(model(jnp.asarray(padded))[0, len(context)], np.float64)
        total += weight * (logits - np.log(np.exp(logits).sum()))
    return total - np.log(np.exp(total).sum())


@pytest.mark.parametrize("blend", BLENDS)
def test_each_token_is_predicted_from_those_before_it(
    predictions: Predictions, tokenizer: Tokenizer, blend: dict[str, float]
) -> None:
    tokens = tokenizer.encode(DARK)[: TINY.block_size].astype(np.int32)
    rows = predictions.log_probabilities(tokens, blend)
    assert rows.shape == (TINY.block_size, TINY.vocab_size)
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, rtol=1e-5)
    for place in (0, 1, 17, TINY.block_size - 1):
        expected = plainly(tokenizer, tokens[:place].tolist(), blend)
        np.testing.assert_allclose(rows[place], expected, atol=1e-4)


def test_a_text_longer_than_the_block_is_predicted_to_its_end(
    predictions: Predictions, tokenizer: Tokenizer
) -> None:
    tokens = tokenizer.encode(DARK).astype(np.int32)
    block, half = TINY.block_size, TINY.block_size // 2
    assert len(tokens) > 2 * block
    rows = predictions.log_probabilities(tokens, {"wilde": 1.0})
    assert len(rows) == len(tokens)
    # The second window begins half a block later, and is the first to reach these two places.
    for place, begin in ((block - 1, 0), (block, half), (block + half - 1, half)):
        expected = plainly(tokenizer, tokens[begin:place].tolist(), {"wilde": 1.0})
        np.testing.assert_allclose(rows[place], expected, atol=1e-4)


def test_a_text_of_no_tokens_has_no_distributions(predictions: Predictions) -> None:
    assert predictions.log_probabilities(np.zeros(0, np.int32), {}).shape == (0, TINY.vocab_size)


@pytest.mark.parametrize("text", ["", "There are doors", DARK])
def test_the_likeliest_tokens_come_first_with_their_probabilities(
    predictions: Predictions, tokenizer: Tokenizer, text: str
) -> None:
    context = tokenizer.encode(text).tolist()[-(TINY.block_size - 1) :]
    for blend, listed in zip(BLENDS, predictions.next_tokens(text, BLENDS, 5), strict=True):
        probabilities = np.exp(plainly(tokenizer, context, blend))
        probabilities[[*tokenizer.openers.values()]] = 0
        order = np.argsort(-probabilities)[:5]
        assert len(listed) == 5
        np.testing.assert_allclose(
            [prediction.probability for prediction in listed], probabilities[order], rtol=1e-3
        )
        texts = {tokenizer.token_bytes[token].decode(errors="replace") for token in order}
        assert {prediction.text for prediction in listed} <= texts | {END_OF_TEXT}


def test_all_tokens_are_listed_but_those_that_open_works(
    predictions: Predictions, tokenizer: Tokenizer
) -> None:
    (listed,) = predictions.next_tokens("There", [{"wilde": 1.0}], 10_000)
    assert len(listed) == TINY.vocab_size - len(tokenizer.openers)
    texts = [prediction.text for prediction in listed]
    assert texts.count(END_OF_TEXT) == 1
    assert "<|wilde|>" not in texts
    assert "<|any|>" not in texts
    assert "\ufffd" in texts  # a byte that is no character
    shares = [prediction.probability for prediction in listed]
    assert shares == sorted(shares, reverse=True)
    assert 0.9 < sum(shares) < 1


def test_mistakes_are_told(predictions: Predictions) -> None:
    with pytest.raises(UserError, match="lovecraft, wilde"):
        predictions.next_tokens("The", [{"poe": 1.0}], 3)
    with pytest.raises(UserError, match="lovecraft, wilde"):
        predictions.log_probabilities(np.zeros(3, np.int32), {"poe": 1.0})
    with pytest.raises(UserError, match="Unicode"):
        predictions.next_tokens("a\ud800b", [{}], 3)


@given(st.floats(-100, 100), st.integers(0, 2**32 - 1))
def test_a_blend_is_the_normalised_product_of_powers(weight: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = {voice: rng.dirichlet(np.ones(8), 3).astype(np.float32) + 1e-6 for voice in "ab"}
    logs = {voice: np.log(share) for voice, share in shares.items()}
    rows = blended(logs, {"a": weight, "b": 1 - weight})
    exact = sum(
        w * logs[voice].astype(np.float64) for voice, w in (("a", weight), ("b", 1 - weight))
    )
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(rows, exact, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, rtol=1e-5)


def test_a_checkpoints_writer_predicts_what_it_was_trained_on(trained_once: Workplace) -> None:
    where: Checkpoint = locate(str(trained_once.out_dir))
    writer = Writer.load(where, select_device("auto"))
    (listed,) = writer.predictions.next_tokens("There are", [{"lovecraft": 1.0}], 3)
    assert all(isinstance(prediction, Prediction) for prediction in listed)
    # Six iterations have taught it which tokens its text has at all.
    tokens = writer.encode(DARK)
    rows = writer.predictions.log_probabilities(tokens, {"lovecraft": 1.0})
    nats = -rows[np.arange(len(tokens)), tokens].mean()
    assert nats < np.log(TINY.vocab_size)
