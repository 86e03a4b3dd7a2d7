"""Text -> token array, cached on disk -> Grain batches of windows."""

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import grain.python as grain
import numpy as np
from jaxtyping import Float, Int, UInt16
from tokenizers import Tokenizer

from gothic_jax.errors import UserError
from gothic_jax.files import sha256, write_atomically
from gothic_jax.texts import ANY, read_text, split_works
from gothic_jax.tokenizer import any_voice_id, encode, end_of_text_id, fingerprint, voices

NOTHING = -1
"""Fills up a window whose work is shorter."""


class TokenText(NamedTuple):
    """A text file as tokens: work after work, each closed by `<|endoftext|>`."""

    tokens: UInt16[np.ndarray, " n"]
    ends: Int[np.ndarray, " work"]
    """Where each work ends, behind its `<|endoftext|>`."""
    voices: tuple[str, ...]
    """Of each work; `any` where it has none, or none that the tokenizer knows."""
    openers: UInt16[np.ndarray, " work"]
    """The token of each work's voice: it opens every window of the work."""
    any_voice: int
    """The token `<|any|>`."""
    sha256: str
    """Of the text file."""
    unknown_voices: tuple[str, ...] = ()
    """Voices of the file that the tokenizer has no token for."""

    @property
    def lengths(self) -> Int[np.ndarray, " work"]:
        """Tokens of each work, its end included."""
        return np.diff(self.ends, prepend=0)

    def works(self) -> Iterator[tuple[UInt16[np.ndarray, " n"], int]]:
        """The tokens of each work without its end, and its opener."""
        for end, length, opener in zip(self.ends, self.lengths, self.openers, strict=True):
            yield self.tokens[end - length : end - 1], int(opener)

    def shares(self, weights: Mapping[str, float] | None = None) -> Float[np.ndarray, " work"]:
        """The chance of each work to be read from: as its length, or by its voice's weight.

        Raises UserError where the weights name other voices than the text has.
        """
        lengths = self.lengths
        if weights is None:
            return lengths / lengths.sum()
        if odd := weights.keys() ^ set(self.voices):
            raise UserError(
                f"voice_weights must name the voices of the text, which are"
                f" {', '.join(sorted(set(self.voices)))}; look at {', '.join(sorted(odd))}"
            )
        shares = np.zeros(len(lengths))
        for voice, weight in weights.items():
            own = np.array(self.voices) == voice
            shares[own] = weight * lengths[own] / lengths[own].sum()
        return shares / shares.sum()


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
    cache = path.parent / ".tokens" / f"{path.stem}.{key}.tokens"
    tokens = _read_cache(cache)
    if tokens is None:
        tokens = _encode(path, text, tokenizer)
        buffer = io.BytesIO()
        np.save(buffer, tokens)
        # Its own hash in front, since half of it, or other bits, would be tokens too.
        _write_cache(cache, path.stem, sha256(buffer.getvalue()).encode() + buffer.getvalue())
    return _token_text(text, tokens, tokenizer)


def _token_text(text: str, tokens: UInt16[np.ndarray, " n"], tokenizer: Tokenizer) -> TokenText:
    known = voices(tokenizer)
    named = [work.voice for work in split_works(text)]
    any_voice = any_voice_id(tokenizer)
    return TokenText(
        tokens,
        # No other token is `<|endoftext|>`: within a text it is a word like others.
        ends=np.flatnonzero(tokens == end_of_text_id(tokenizer)) + 1,
        voices=tuple(voice if voice in known else ANY for voice in named),
        openers=np.array([known.get(voice, any_voice) for voice in named], np.uint16),
        any_voice=any_voice,
        sha256=sha256(text.encode()),
        unknown_voices=tuple(sorted({*named} - {"", *known})),
    )


def _encode(path: Path, text: str, tokenizer: Tokenizer) -> UInt16[np.ndarray, " n"]:
    works = split_works(text)
    if not works:
        raise UserError(f"{path} holds no text between its markers; `gothic-data` makes texts")
    end = end_of_text_id(tokenizer)
    ids = [np.append(encode(tokenizer, work.text), end) for work in works]
    return np.concatenate(ids).astype(np.uint16)


def _read_cache(cache: Path) -> UInt16[np.ndarray, " n"] | None:
    try:
        content = cache.read_bytes()
    except OSError:
        return None
    digest, array = content[:64], content[64:]
    if sha256(array).encode() != digest:
        return None  # damaged: made anew
    return np.load(io.BytesIO(array), allow_pickle=False)


def _write_cache(cache: Path, stem: str, content: bytes) -> None:
    try:
        write_atomically(cache, content)
    except UserError as error:
        print(f"The tokens are not cached, and will be made anew each time: {error}")
        return
    ours = re.compile(re.escape(stem) + r"\.[0-9a-f]{16}\.tokens")
    for stale in cache.parent.iterdir():
        if stale != cache and ours.fullmatch(stale.name):
            stale.unlink(missing_ok=True)


def training_batches(
    text: TokenText,
    *,
    shape: tuple[int, ...],
    block_size: int,
    voice_dropout: float,
    voice_weights: Mapping[str, float] | None = None,
    seed: int,
) -> grain.MapDataset:
    """An endless Grain dataset; element i is the batch of iteration i, [*shape, block_size + 1].

    A window lies within one work. Its first token is the opener of the work's voice or, with
    probability `voice_dropout`, `<|any|>`; the rest is the work's, NOTHING after its end. Works
    are drawn by `TokenText.shares`, places within a work alike, but for those within half a
    window of its ends, which stand for the first and the last window: so its first and last
    words are read half as often as the rest, those a window further in up to 1.5 times. The same
    seed and index give the same batch, whatever came before.

    Raises UserError where the text is shorter than one window, or the weights name other voices.
    """
    if text.tokens.size <= block_size:
        raise UserError(
            f"the training text has {text.tokens.size:,} tokens, fewer than one window of"
            f" {block_size} + 1; add text or lower --config.model.block_size"
        )
    shares, lengths = text.shares(voice_weights), text.lengths
    latest_start = np.maximum(lengths - block_size, 0)
    offsets = np.arange(block_size)

    def crop(_: int, rng: np.random.Generator) -> Int[np.ndarray, "*shape time"]:
        work = rng.choice(len(shares), size=shape, p=shares)
        middle = (rng.random(shape) * lengths[work]).astype(np.int64)
        start = np.clip(middle - block_size // 2, 0, latest_start[work])[..., None] + offsets
        place = (text.ends - lengths)[work][..., None] + start
        inside = start < lengths[work][..., None]
        opener = np.where(rng.random(shape) < voice_dropout, text.any_voice, text.openers[work])
        body = np.where(inside, text.tokens[np.where(inside, place, 0)].astype(np.int32), NOTHING)
        return np.concatenate([opener[..., None].astype(np.int32), body], axis=-1)

    return grain.MapDataset.range(2**31).seed(seed).random_map(crop)


def batch_iterator(batches: grain.MapDataset, first: int) -> grain.DatasetIterator:
    """Batches from index `first` on, made ahead of time in a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": first})
    return iterator
