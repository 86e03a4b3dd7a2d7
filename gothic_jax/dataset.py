"""Text -> token array, cached on disk -> Grain batches of windows."""

import io
from pathlib import Path
from typing import NamedTuple

import grain.python as grain
import numpy as np
from jaxtyping import Int, UInt16
from tokenizers import Tokenizer

from gothic_jax.cli import UserError
from gothic_jax.files import sha256, write_atomically
from gothic_jax.texts import read_text, split_works, voice_token
from gothic_jax.tokenizer import encode, end_of_text_id, fingerprint, special_tokens, voices


class TokenText(NamedTuple):
    """A text file as tokens: for each work its voice token, its text, `<|endoftext|>`."""

    tokens: UInt16[np.ndarray, " n"]
    openers: UInt16[np.ndarray, " n"]
    """For each position, the token that opens a window which starts there: the voice token of
    the work it lies in, or `<|endoftext|>` where it has none."""
    end_of_text: int
    sha256: str
    """Of the text file."""
    unknown_voices: tuple[str, ...] = ()
    """Voices of the file that the tokenizer has no token for."""


def encode_text(path: Path, tokenizer: Tokenizer) -> TokenText:
    """The tokens of a text file.

    A work of a voice that the tokenizer does not know is read as one of no voice. Raises
    UserError where the file is missing, empty or not UTF-8.
    """
    text = read_text(path)
    return _token_text(text, _encode(path, text, tokenizer), tokenizer)


def load_tokens(path: Path, tokenizer: Tokenizer) -> TokenText:
    """`encode_text`, from the cache beside the file where that is up to date."""
    text = read_text(path)
    text_hash = sha256(text.encode())
    key = sha256(f"{text_hash} {fingerprint(tokenizer)}".encode())[:16]
    cache = path.parent / ".tokens" / f"{path.stem}.{key}.npy"
    tokens = _read_cache(cache)
    if tokens is None:
        tokens = _encode(path, text, tokenizer)
        buffer = io.BytesIO()
        np.save(buffer, tokens)
        _write_cache(cache, buffer.getvalue())
    return _token_text(text, tokens, tokenizer)


def _token_text(text: str, tokens: UInt16[np.ndarray, " n"], tokenizer: Tokenizer) -> TokenText:
    unknown = {work.voice for work in split_works(text)} - {"", *voices(tokenizer)}
    return TokenText(
        tokens,
        _openers(tokens, tokenizer),
        end_of_text_id(tokenizer),
        sha256(text.encode()),
        tuple(sorted(unknown)),
    )


def _encode(path: Path, text: str, tokenizer: Tokenizer) -> UInt16[np.ndarray, " n"]:
    works = split_works(text)
    if not works:
        raise UserError(f"{path} holds no text between its markers; `gothic-data` makes texts")
    end_of_text = end_of_text_id(tokenizer)
    specials = special_tokens(tokenizer)
    pieces = []
    for work in works:
        token = voice_token(work.voice)
        opening = [specials[token]] if token in specials else []
        ids = encode(tokenizer, work.text)
        pieces.append(np.array([*opening, *ids, end_of_text], np.uint16))
    return np.concatenate(pieces)


def _read_cache(cache: Path) -> UInt16[np.ndarray, " n"] | None:
    try:
        tokens = np.load(cache, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # absent, or damaged: made anew
    return tokens if tokens.dtype == np.uint16 and tokens.ndim == 1 else None


def _write_cache(cache: Path, content: bytes) -> None:
    try:
        write_atomically(cache, content)
    except UserError as error:
        print(f"The tokens are not cached, and will be made anew each time: {error}")
        return
    stem = cache.name.split(".")[0]
    for stale in cache.parent.glob(f"{stem}.*.npy"):
        if stale != cache:
            stale.unlink(missing_ok=True)


def _openers(tokens: UInt16[np.ndarray, " n"], tokenizer: Tokenizer) -> UInt16[np.ndarray, " n"]:
    """The last special token at or before each position."""
    specials = np.array(sorted(special_tokens(tokenizer).values()))
    is_special = np.isin(tokens, specials)
    latest = np.maximum.accumulate(np.where(is_special, np.arange(tokens.size), -1))
    end_of_text = np.uint16(end_of_text_id(tokenizer))
    return np.where(latest >= 0, tokens[latest], end_of_text)


def training_batches(
    text: TokenText, *, shape: tuple[int, ...], block_size: int, voice_dropout: float, seed: int
) -> grain.MapDataset:
    """An endless Grain dataset; element i is the batch of iteration i, [*shape, block_size + 1].

    A window starts anywhere in the text with equal chance. Its first token is replaced by the
    opener of that place, so that the model always knows whose words it continues; with
    probability `voice_dropout` by `<|endoftext|>`, which stands for no voice in particular.
    The same seed and index give the same batch, whatever came before.

    Raises UserError where the text is shorter than one window.
    """
    starts = text.tokens.size - block_size
    if starts < 1:
        raise UserError(
            f"the training text has {text.tokens.size:,} tokens, fewer than one window of"
            f" {block_size} + 1; add text or lower --config.model.block_size"
        )
    offsets = np.arange(block_size + 1)

    def crop(_: int, rng: np.random.Generator) -> Int[np.ndarray, "*shape time"]:
        start = rng.integers(starts, size=shape)
        windows = text.tokens[start[..., None] + offsets].astype(np.int32)
        dropped = rng.random(shape) < voice_dropout
        windows[..., 0] = np.where(dropped, text.end_of_text, text.openers[start])
        return windows

    return grain.MapDataset.range(2**31).seed(seed).random_map(crop)


def batch_iterator(batches: grain.MapDataset, first: int) -> grain.DatasetIterator:
    """Batches from index `first` on, made ahead of time in a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": first})
    return iterator
