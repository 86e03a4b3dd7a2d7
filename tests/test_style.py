import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gothic_jax.commands import evaluate
from gothic_jax.errors import UserError
from gothic_jax.measuring.style import Lean, Meter, _sentence_edges, together
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.works import Work
from tests.common import TINY, Workplace


def by_rule(params: object, inputs: np.ndarray, targets: np.ndarray) -> jnp.ndarray:
    """Losses of a made-up model: under opener o a token t costs (o * t) % 7, whatever is before."""
    return jnp.asarray((inputs[:, :1] * targets) % 7, jnp.float32)


@pytest.fixture
def meter(tokenizer: Tokenizer) -> Meter:
    return Meter(by_rule, {}, tokenizer, TINY.block_size)


TEXT = "The tide was out. Nobody, said Mr. Grey, had seen it go!\n\nIt came back at night"
SENTENCES = [
    "The tide was out.",
    "Nobody, said Mr. Grey, had seen it go!",
    "It came back at night",
]


def test_sentences_end_at_their_marks_and_not_at_titles() -> None:
    edges = _sentence_edges(TEXT)
    pieces = [TEXT[a:b].strip() for a, b in zip([0, *edges], edges, strict=False)]
    assert pieces == SENTENCES
    assert _sentence_edges('"Who?" he said. "I!"\n') == [6, 15, 20]
    assert _sentence_edges("") == []


@pytest.mark.parametrize("prompt", ["", "On the old quay "])
def test_a_sentence_has_the_mean_log_likelihood_of_its_tokens(
    meter: Meter, tokenizer: Tokenizer, prompt: str
) -> None:
    """By hand: tokens of each sentence, which over the whole text are more than one window."""
    ids = tokenizer.encode(prompt + TEXT)
    assert len(ids) > TINY.block_size
    leans = meter.sentences(TEXT, prompt)
    assert [lean.text for lean in leans] == SENTENCES
    position = 0
    decoded = ""
    expected: list[list[int]] = [[] for _ in SENTENCES]
    ends = [len(prompt) + edge for edge in _sentence_edges(TEXT)]
    for position, token in enumerate(ids):
        decoded = tokenizer.decode(list(ids[: position + 1]))
        if len(decoded) > len(prompt):
            sentence = next(i for i, end in enumerate(ends) if len(decoded) <= end)
            expected[sentence].append(int(token))
    for lean, tokens in zip(leans, expected, strict=True):
        assert lean.tokens == len(tokens)
        for voice, opener in tokenizer.voices.items():
            mean = -np.mean([(opener * token) % 7 for token in tokens])
            assert lean.log_likelihood[voice] == pytest.approx(mean)
    whole = together(leans, "all")
    assert whole.tokens == sum(map(len, expected))
    for voice, opener in tokenizer.voices.items():
        mean = -np.mean([(opener * token) % 7 for tokens in expected for token in tokens])
        assert whole.log_likelihood[voice] == pytest.approx(mean)


def test_a_lean_is_to_the_likeliest_voice_by_its_lead_over_the_next() -> None:
    lean = Lean("", 1, {"a": -3.0, "b": -2.0, "c": -2.5})
    assert (lean.voice, lean.strength) == ("b", 0.5)
    assert lean.towards({"b": 1.0}) == pytest.approx(0.5)
    assert lean.towards({"a": 1.0}) == pytest.approx(-0.5)
    assert lean.towards({"a": 0.5, "b": 0.5}) == pytest.approx(0.0)
    assert lean.towards({"b": 1.5, "a": -0.5}) == pytest.approx(1.0)
    assert lean.towards({}) == 0


def test_style_compares_voices() -> None:
    one = Tokenizer.train([Work("me", "A diary of small weathers.")], 300, 2)
    with pytest.raises(UserError, match="two or more"):
        Meter(by_rule, {}, one, TINY.block_size)


def test_eval_tells_the_style_of_a_file(
    trained_once: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    command = ["--checkpoint", str(trained_once.out_dir), "--style", str(path)]
    assert evaluate.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [*SENTENCES, "(3 sentences)"]
    assert evaluate.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [sentence["text"] for sentence in report["sentences"]] == SENTENCES
    for sentence in [*report["sentences"], report["all"]]:
        assert sentence["voice"] in ("wilde", "lovecraft")
        assert math.isfinite(sentence["strength"])
        assert sentence["strength"] >= 0
