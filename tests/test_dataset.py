from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gothic_jax.errors import UserError
from gothic_jax.model.ops import NOTHING
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import TokenText, load_tokens
from gothic_jax.text.windows import batch_iterator, training_batches
from gothic_jax.text.works import split_works
from tests.common import TEXT


@pytest.fixture
def text(tmp_path: Path, tokenizer: Tokenizer) -> TokenText:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return load_tokens(path, tokenizer)


ENDS = np.array([500, 600, 605, 1000])
"""Works of two voices, one of them shorter than a window."""


@pytest.fixture
def numbered() -> TokenText:
    """A text whose tokens tell where they stand."""
    return TokenText(
        np.arange(1000, dtype=np.uint16),
        ENDS,
        voices=("a", "b", "b", "a"),
        openers=np.array([1000, 1001, 1001, 1000], np.uint16),
        any_voice=1002,
        sha256="",
    )


def batches(text: TokenText, seed: int = 0, dropout: float = 0.0):
    return training_batches(text, shape=(2, 8), block_size=16, voice_dropout=dropout, seed=seed)


def many(text: TokenText, **how: Any) -> np.ndarray:
    settings = {"block_size": 16, "voice_dropout": 0.0, "seed": 0} | how
    return training_batches(text, shape=(100_000,), **settings)[0]


def test_a_text_is_work_and_end_for_each_work(text: TokenText, tokenizer: Tokenizer) -> None:
    works = split_works(TEXT)
    assert tokenizer.decode(list(text.tokens)) == "".join(work.text for work in works)
    ends = np.flatnonzero(text.tokens == tokenizer.end_of_text) + 1
    assert ends.tolist() == text.ends.tolist()
    for (body, opener), work in zip(text.works(), works, strict=True):
        assert tokenizer.decode(list(body)) == work.text
        assert opener == tokenizer.special_tokens[f"<|{work.voice}|>"]
    assert text.voices == ("wilde", "lovecraft")


def test_windows_lie_within_a_work_and_open_with_its_voice(numbered: TokenText) -> None:
    windows = many(numbered)
    assert windows.shape == (100_000, 17)
    start = windows[:, 1]
    work = np.searchsorted(ENDS, start, side="right")
    np.testing.assert_array_equal(windows[:, 0], numbered.openers[work])
    places = start[:, None] + np.arange(16)
    inside = places < ENDS[work][:, None]
    np.testing.assert_array_equal(windows[:, 1:], np.where(inside, places, NOTHING))
    # Only a work that is shorter than a window leaves a part of it empty.
    assert set(start[~inside.all(axis=1)]) == {600}


def test_voice_dropout_hides_the_voice_of_that_share(numbered: TokenText) -> None:
    opened = many(numbered, voice_dropout=0.25)[:, 0]
    assert (opened == numbered.any_voice).mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        (None, 0.895),
        ({"a": 1.0, "b": 1.0}, 0.5),
        ({"a": 0.0, "b": 3.0}, 0.0),
        ({"a": 1.0, "rest": 3.0}, 0.25),
        ({"rest": 1.0}, 0.895),
    ],
)
def test_voices_are_drawn_by_their_weights(
    numbered: TokenText, weights: dict[str, float] | None, share: float
) -> None:
    opened = many(numbered, voice_weights=weights)[:, 0]
    assert (opened == 1000).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    "weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "rest": 1.0}]
)
def test_weights_of_other_voices_than_the_texts_are_told(
    numbered: TokenText, weights: dict[str, float]
) -> None:
    with pytest.raises(UserError, match="which are a, b"):
        many(numbered, voice_weights=weights)


def test_a_batch_depends_on_seed_and_index_alone(text: TokenText) -> None:
    np.testing.assert_array_equal(batches(text)[7], batches(text)[7])
    assert not np.array_equal(batches(text)[7], batches(text)[8])
    assert not np.array_equal(batches(text)[7], batches(text, seed=1)[7])


def test_the_iterator_goes_on_from_any_index(text: TokenText) -> None:
    for first in (0, 1, 5):
        iterator = batch_iterator(batches(text), first)
        for index in range(first, first + 8):
            np.testing.assert_array_equal(next(iterator), batches(text)[index])
        assert iterator.get_state() == {"next_index": first + 8}


def test_every_token_is_read_about_as_often(numbered: TokenText) -> None:
    """Those near a work's ends between half and one and a half times as often as the others."""
    windows = many(numbered)[:, 1:]
    counts = np.bincount(windows[windows != NOTHING], minlength=1000)
    inner = counts[20:480].mean()
    assert (counts[16:484] > 0.85 * inner).all()
    # A short work's one window is drawn as seldom as the work is short.
    long_works = np.r_[0:600, 605:1000]
    assert counts[long_works].min() > 0.4 * inner
    assert counts[long_works].max() < 1.6 * inner


def test_tokens_are_cached_and_made_anew_for_another_text_or_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    first = load_tokens(path, tokenizer)
    (cache,) = (tmp_path / ".tokens").iterdir()
    with monkeypatch.context() as context:
        context.setattr("gothic_jax.text.tokens._encode", None)  # the cache must do
        np.testing.assert_array_equal(load_tokens(path, tokenizer).tokens, first.tokens)
    cache.write_bytes(cache.read_bytes()[:50])  # damaged: made anew
    np.testing.assert_array_equal(load_tokens(path, tokenizer).tokens, first.tokens)
    path.write_text(TEXT.replace("harbour", "mountain"))
    assert not np.array_equal(load_tokens(path, tokenizer).tokens, first.tokens)
    other = Tokenizer.train(split_works(TEXT), 300, 2)
    assert load_tokens(path, other).tokens.max() < 300
    assert len(list((tmp_path / ".tokens").iterdir())) == 1
    longer = tmp_path / "text.two.txt"
    longer.write_text(TEXT)
    load_tokens(longer, other)
    assert len(list((tmp_path / ".tokens").iterdir())) == 2  # another text's stays


def test_a_text_without_markers_is_one_work_of_no_voice(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("The duchess set down what follows.\n" * 30)
    text = load_tokens(path, tokenizer)
    assert text.voices == ("any",)
    assert text.openers.tolist() == [tokenizer.special_tokens["<|any|>"]]


def test_a_voice_that_the_tokenizer_does_not_know_is_no_voice(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "poe.txt"
    path.write_text("<|poe|>\nOnce upon a midnight\n<|endoftext|>\n" + TEXT)
    text = load_tokens(path, tokenizer)
    assert text.unknown_voices == ("poe",)
    body, opener = next(text.works())
    assert tokenizer.decode(list(body)) == "Once upon a midnight"
    assert opener == text.any_voice
    assert text.voices == ("any", "wilde", "lovecraft")


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (None, "gothic-data"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"caf\xc3\xa9 \xff", "not UTF-8, as other parts of it are"),
        (b"<|wilde|>\n<|endoftext|>\n", "no text"),
    ],
)
def test_a_text_that_cannot_serve_is_told_with_the_cure(
    tmp_path: Path, tokenizer: Tokenizer, content: bytes | None, cure: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=cure):
        load_tokens(path, tokenizer)


def test_a_text_of_two_tokens_gives_windows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a")
    text = load_tokens(path, tokenizer)
    assert text.tokens.size == 2
    for window in batches(text)[0].reshape(-1, batches(text)[0].shape[-1]):
        np.testing.assert_array_equal(window[1:3], text.tokens)
        assert (window[3:] == NOTHING).all()
