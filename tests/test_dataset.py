from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from gothic_jax.cli import UserError
from gothic_jax.dataset import (
    TokenText,
    batch_iterator,
    load_tokens,
    training_batches,
)
from gothic_jax.texts import END_OF_TEXT, split_works
from gothic_jax.tokenizer import train_tokenizer
from tests.common import TEXT


@pytest.fixture
def text(tmp_path: Path, tokenizer: Tokenizer) -> TokenText:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return load_tokens(path, tokenizer)


@pytest.fixture
def numbered() -> TokenText:
    """A text whose tokens tell where they stand; its first half is of voice 1000."""
    tokens = np.arange(1000, dtype=np.uint16)
    openers = np.where(tokens < 500, 1000, 1001).astype(np.uint16)
    return TokenText(tokens, openers, end_of_text=1002, sha256="")


def batches(text: TokenText, seed: int = 0, dropout: float = 0.0):
    return training_batches(text, shape=(2, 8), block_size=16, voice_dropout=dropout, seed=seed)


def test_a_text_is_voice_token_work_end_for_each_work(
    text: TokenText, tokenizer: Tokenizer
) -> None:
    assert tokenizer.decode(list(text.tokens), skip_special_tokens=False) == "".join(
        f"<|{work.voice}|>{work.text}<|endoftext|>" for work in split_works(TEXT)
    )


def test_openers_name_the_voice_of_each_place(text: TokenText, tokenizer: Tokenizer) -> None:
    end, wilde, lovecraft = (
        tokenizer.token_to_id(token) for token in (END_OF_TEXT, "<|wilde|>", "<|lovecraft|>")
    )
    first, last = np.flatnonzero(text.tokens == end)
    assert set(text.openers[:first]) == {wilde}
    assert set(text.openers[first + 1 : last]) == {lovecraft}
    assert text.openers[first] == text.openers[last] == end


def test_windows_are_the_text_with_its_opener_in_front(numbered: TokenText) -> None:
    for index in range(30):
        batch = batches(numbered)[index]
        assert batch.shape == (2, 8, 17)
        for window in batch.reshape(-1, 17):
            start = window[1] - 1
            np.testing.assert_array_equal(window[1:], np.arange(start + 1, start + 17))
            assert window[0] == numbered.openers[start]


def test_voice_dropout_hides_the_voice_of_that_share(text: TokenText) -> None:
    opened = np.concatenate([batches(text, dropout=0.25)[i][..., 0].ravel() for i in range(200)])
    assert (opened == text.end_of_text).mean() == pytest.approx(0.25, abs=0.03)


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


def test_windows_start_everywhere_alike(numbered: TokenText) -> None:
    dataset = training_batches(numbered, shape=(100_000,), block_size=16, voice_dropout=0.0, seed=0)
    seen, counts = np.unique(dataset[0][:, 1] - 1, return_counts=True)
    np.testing.assert_array_equal(seen, np.arange(numbered.tokens.size - 16))
    assert counts.min() > 0.3 * counts.mean()


def test_tokens_are_cached_and_made_anew_for_another_text_or_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    first = load_tokens(path, tokenizer)
    (cache,) = (tmp_path / ".tokens").iterdir()
    with monkeypatch.context() as context:
        context.setattr("gothic_jax.dataset._encode", None)  # the cache must do
        np.testing.assert_array_equal(load_tokens(path, tokenizer).tokens, first.tokens)
    cache.write_bytes(cache.read_bytes()[:50])  # damaged: made anew
    np.testing.assert_array_equal(load_tokens(path, tokenizer).tokens, first.tokens)
    path.write_text(TEXT.replace("harbour", "mountain"))
    assert not np.array_equal(load_tokens(path, tokenizer).tokens, first.tokens)
    other = train_tokenizer(split_works(TEXT), 300, 2)
    assert load_tokens(path, other).tokens.max() < 300
    assert len(list((tmp_path / ".tokens").iterdir())) == 1


def test_a_text_without_markers_is_one_work_of_no_voice(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("The duchess set down what follows.\n" * 30)
    text = load_tokens(path, tokenizer)
    assert set(text.openers) == {text.end_of_text}


def test_a_voice_that_the_tokenizer_does_not_know_is_no_voice(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "poe.txt"
    path.write_text("<|poe|>\nOnce upon a midnight\n<|endoftext|>\n" + TEXT)
    text = load_tokens(path, tokenizer)
    assert text.unknown_voices == ("poe",)
    first_end = list(text.tokens).index(text.end_of_text)
    assert tokenizer.decode(list(text.tokens[:first_end])) == "Once upon a midnight"
    assert set(text.openers[:first_end]) == {text.end_of_text}


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (None, "gothic-data"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"caf\xe9", "UTF-8"),
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


def test_a_text_shorter_than_a_window_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Too short.")
    with pytest.raises(UserError, match="block_size"):
        batches(load_tokens(path, tokenizer))
