import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gothic_jax.commands import evaluate
from gothic_jax.errors import UserError
from gothic_jax.measuring.scoring import Evaluator, Score, cut_windows, loss_function
from gothic_jax.model.gpt import graph, init_params
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import TokenText, load_tokens
from gothic_jax.text.works import split_works
from tests.common import TINY, Workplace, text_of


@pytest.fixture
def text(workplace: Workplace, tokenizer: Tokenizer) -> TokenText:
    return load_tokens(workplace.root / "mixed_val.txt", tokenizer)


def scores(
    text: TokenText, tokenizer: Tokenizer, *, stride: int | None = None, batch_size: int = 4
) -> dict[str, Score]:
    params = init_params(TINY, 0)
    # Logits far from uniform, so that a wrong context shows.
    params = jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 1 else leaf, params)
    evaluator = Evaluator(
        text.works(), tokenizer, block_size=TINY.block_size, stride=stride, batch_size=batch_size
    )
    return evaluator(loss_function(TINY, "float32", "xla"), params)


@pytest.mark.parametrize("stride", [1, 7, 31, 32])
def test_each_text_token_is_predicted_once_from_its_own_work(
    text: TokenText, tokenizer: Tokenizer, stride: int
) -> None:
    specials = sorted(tokenizer.special_tokens.values())
    inputs, targets, counts = cut_windows(text.works(), TINY.block_size, stride)
    predicted = targets[counts]
    np.testing.assert_array_equal(predicted, text.tokens[~np.isin(text.tokens, specials)])
    openers = {tokenizer.special_tokens[token] for token in ("<|wilde|>", "<|lovecraft|>")}
    assert set(inputs[:, 0]) == openers
    assert not np.isin(inputs[:, 1:][counts[:, 1:]], list(openers)).any()
    if stride < TINY.block_size:
        # All but a work's first window know at least block - stride tokens before they predict.
        first_counted = counts.argmax(axis=1)
        later = np.flatnonzero(np.diff(inputs[:, 0]) == 0) + 1
        assert (first_counted[later] >= TINY.block_size - stride).all()


def test_the_loss_is_the_sum_over_windows_computed_one_by_one(
    text: TokenText, tokenizer: Tokenizer
) -> None:
    params = jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 1 else leaf, init_params(TINY, 0))
    model = nnx.jit(nnx.merge(graph(TINY, jnp.float32), params))
    nats, n_tokens = 0.0, 0
    for work in split_works(text_of(3)):
        opener = tokenizer.special_tokens[f"<|{work.voice}|>"]
        ids = tokenizer.encode(work.text).tolist()
        for start in range(0, len(ids), TINY.block_size):
            window = ids[start : start + TINY.block_size]
            logits = np.asarray(model(jnp.array([[opener, *window[:-1]]]))[0], np.float64)
            log_sum = np.log(np.exp(logits).sum(-1))
            nats += float((log_sum - logits[np.arange(len(window)), window]).sum())
            n_tokens += len(window)
    score = scores(text, tokenizer)["all"]
    assert score.tokens == n_tokens
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bytes == sum(len(work.text.encode()) for work in split_works(text_of(3)))


def test_voices_add_up_to_all(text: TokenText, tokenizer: Tokenizer) -> None:
    result = scores(text, tokenizer)
    assert set(result) == {"all", "wilde", "lovecraft"}
    for name in ("nats", "tokens", "bytes"):
        total = getattr(result["wilde"], name) + getattr(result["lovecraft"], name)
        assert getattr(result["all"], name) == pytest.approx(total)


def test_the_score_does_not_depend_on_the_batch_size(text: TokenText, tokenizer: Tokenizer) -> None:
    expected = scores(text, tokenizer, batch_size=1)
    for batch_size in (3, 64):
        for voice, score in scores(text, tokenizer, batch_size=batch_size).items():
            assert score.tokens == expected[voice].tokens
            assert score.nats == pytest.approx(expected[voice].nats, rel=1e-6)


def test_a_batch_larger_than_the_text_is_not_filled_up(
    text: TokenText, tokenizer: Tokenizer
) -> None:
    sizes = set()

    def losses(params: object, inputs: np.ndarray, targets: np.ndarray) -> jnp.ndarray:
        sizes.add(len(inputs))
        return jnp.zeros(inputs.shape)

    Evaluator(text.works(), tokenizer, block_size=TINY.block_size, batch_size=100_000)(losses, {})
    (size,) = sizes
    assert size == len(cut_windows(text.works(), TINY.block_size, TINY.block_size).inputs)


def test_figures_follow_from_nats_tokens_and_bytes() -> None:
    score = Score(nats=8 * math.log(2), tokens=4, bytes=16)
    assert score.loss == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)
    assert score.bits_per_byte == pytest.approx(0.5)


def test_a_stride_out_of_range_is_told(text: TokenText, tokenizer: Tokenizer) -> None:
    for stride in (0, 33):
        with pytest.raises(UserError, match="stride"):
            scores(text, tokenizer, stride=stride)


def test_command_gives_the_trainers_own_validation_figures(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = trained.root / "elsewhere" / "mixed_val.txt"
    copy.parent.mkdir()
    copy.write_text((trained.root / "mixed_val.txt").read_text())
    file = str(copy)
    assert evaluate.main(["--checkpoint", f"{trained.out_dir}/latest", "--file", file]) == 0
    table = capsys.readouterr().out
    assert (
        evaluate.main(["--checkpoint", f"{trained.out_dir}/latest", "--file", file, "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    meta = json.loads((trained.out_dir / "6" / "meta.json").read_text())
    assert list(copy.parent.iterdir()) == [copy]  # nothing is left beside a text that is judged
    voices = report["voices"]
    assert set(voices) == {"wilde", "lovecraft"}
    for voice, score in {"all": report, **voices}.items():
        for name, value in meta["scores"][voice].items():
            assert score[name] == pytest.approx(value, rel=1e-5)
        assert f"{score['loss']:.4f}" in table


def test_a_text_is_scored_in_the_typography_of_the_training_text(
    trained_once: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, curly = tmp_path / "plain.txt", tmp_path / "curly.txt"
    plain.write_text('"Nothing," he said, "ages like candour."')
    curly.write_text("\u201cNothing,\u201d he said, \u201cages like candour.\u201d")
    figures = []
    for file, *flags in ((plain,), (curly,), (curly, "--raw-text")):
        command = ["--checkpoint", str(trained_once.out_dir), "--file", str(file), "--json"]
        assert evaluate.main([*command, *flags]) == 0
        captured = capsys.readouterr()
        assert ("--raw-text leaves it" in captured.err) == (file == curly and not flags)
        figures.append(json.loads(captured.out)["loss"])
    assert figures[0] == figures[1] != figures[2]
