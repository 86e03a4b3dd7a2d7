"""The overfit compass: what it compares, when a model recites, and what it advises."""

import re

import numpy as np
import pytest

from gothic_jax.measuring.compass import (
    PASSAGES,
    RECITED_WORDS,
    Compass,
    Reading,
    similar_passages,
    verdict,
)
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import TokenText, load_tokens
from tests.common import Workplace

BLOCK = 64


@pytest.fixture
def train(workplace: Workplace, tokenizer: Tokenizer) -> TokenText:
    return load_tokens(workplace.root / "mixed_train.txt", tokenizer)


def work_of_voice(workplace: Workplace, tokenizer: Tokenizer, voice: str) -> TokenText:
    """The training works of one voice alone, as a held-out text."""
    text = (workplace.root / "mixed_train.txt").read_text()
    (work,) = re.findall(rf"<\|{voice}\|>\n.*?<\|endoftext\|>\n", text, re.DOTALL)
    path = workplace.root / "one.txt"
    path.write_text(work)
    return load_tokens(path, tokenizer)


def test_it_compares_as_much_training_text_of_the_same_voices(
    workplace: Workplace, train: TokenText, tokenizer: Tokenizer
) -> None:
    held_out = work_of_voice(workplace, tokenizer, "lovecraft")
    sample = similar_passages(train, held_out, BLOCK)
    assert {opener for _, opener in sample} == {tokenizer.voices["lovecraft"]}
    assert len(sample) == held_out.tokens.size // BLOCK
    assert all(len(tokens) == BLOCK for tokens, _ in sample)
    whole = held_out.tokens.tobytes()
    assert all(tokens.tobytes() in whole for tokens, _ in sample)
    # A voice that the training text has not is compared with all of it.
    stranger = held_out._replace(openers=np.full_like(held_out.openers, tokenizer.any_voice))
    assert len({opener for _, opener in similar_passages(train, stranger, BLOCK)}) == 2


def reading(train: TokenText, tokenizer: Tokenizer, wrong: set[int]) -> Reading:
    """Of a model that is sure of every token but those at some places of every window."""

    def losses(params: object, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.full(inputs.shape, np.log(2))

    def hits(params: object, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        right = np.ones(inputs.shape, bool)
        right[:, [*wrong]] = False
        return right

    compass = Compass(train, train, tokenizer, block_size=BLOCK, batch_size=4)
    return compass(losses, hits, {}, val_bits_per_byte=2.0)


def test_a_passage_is_recited_where_each_token_after_its_first_half_is_the_likeliest(
    train: TokenText, tokenizer: Tokenizer
) -> None:
    sure = reading(train, tokenizer, set())
    assert sure.recites == 1
    assert reading(train, tokenizer, set(range(BLOCK // 2))).recites == 1
    assert reading(train, tokenizer, {BLOCK // 2 + 3}).recites == 0
    assert sure.gap == 2.0 - sure.train_bits_per_byte
    # A bit a token.
    assert sure.train_bits_per_byte == pytest.approx(
        1 / np.mean(tokenizer.byte_lengths[train.tokens[tokenizer.byte_lengths[train.tokens] > 0]]),
        rel=0.05,
    )


def test_no_more_than_the_words_asked_for_need_to_be_recited(tokenizer: Tokenizer) -> None:
    words = "ab " * 400
    body = tokenizer.encode(words).astype(np.uint16)
    text = TokenText(
        np.append(body, tokenizer.end_of_text).astype(np.uint16),
        np.array([len(body) + 1]),
        ("wilde",),
        np.array([tokenizer.voices["wilde"]], np.uint16),
        tokenizer.any_voice,
        "",
    )
    compass = Compass(text, text, tokenizer, block_size=256, batch_size=4)
    tokens_a_word = len(body) / 400
    counted = compass._counted.sum(axis=1)
    assert len(counted) <= PASSAGES
    assert counted == pytest.approx(RECITED_WORDS * tokens_a_word, abs=tokens_a_word)


SHOWN = Reading(train_bits_per_byte=1.3, gap=0.41, recites=0.25)


@pytest.mark.parametrize(
    ("best", "at_best", "at_end", "dropout", "told"),
    [
        (900, 1.7, 1.7, 0.1, ["best at the end", "--max-iters 1800"]),
        (300, 1.6, 1.7, 0.1, ["gap 0.41, recites 25%", "--max-iters 300", "dropout=0.2"]),
        (300, 1.6, 1.7, 0.4, ["too long", "--max-iters 300,", "gothic-data --library"]),
        (800, 1.699, 1.7, 0.1, ["about as long as its text allows"]),
    ],
)  # fmt: skip
def test_the_verdict_names_what_should_do_better(
    best: int, at_best: float, at_end: float, dropout: float, told: list[str]
) -> None:
    line = verdict(
        SHOWN,
        best=best,
        best_bits_per_byte=at_best,
        done=900,
        bits_per_byte=at_end,
        dropout=dropout,
    )
    assert all(part in line for part in told), line
    assert ("dropout" in line) == ("dropout=0.2" in told)


@pytest.mark.long
def test_a_run_too_long_for_its_text_is_told_so(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"max_iters": 400, "eval_interval": 100, "learning_rate": 1e-2, "model.dropout": 0.0}
    assert workplace.train(**flags) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"gap (-?[\d.]+), recites (\d+)%", out)
    assert len(rows) >= 4
    assert float(rows[3][0]) > float(rows[0][0])
    assert int(rows[3][1]) > 50
