"""Text files as token arrays, cached beside them."""

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt16

from gothic_jax.errors import UserError
from gothic_jax.machine.files import sha256, write_atomically
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import ANY, REST
from gothic_jax.text.works import read_text, split_works, works_of


class TokenText(NamedTuple):
    """A text file as tokens: one work after another, each ended by `<|endoftext|>`."""

    tokens: UInt16[np.ndarray, " n"]
    ends: Int[np.ndarray, " work"]
    """Where each work ends, after its `<|endoftext|>`."""
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

        The weight of `rest` is shared by the voices without one, as their lengths. Raises
        UserError where the weights name other voices than the text has, or not all of them.
        """
        lengths = self.lengths
        if weights is None:
            return lengths / lengths.sum()
        voices = np.array([voice if voice in weights else REST for voice in self.voices])
        if odd := weights.keys() ^ set(voices.tolist()):
            raise UserError(
                f"voice_weights must name the voices of the text, which are"
                f" {', '.join(sorted(set(self.voices)))}, or `rest` for all others; look at"
                f" {', '.join(sorted(odd))}"
            )
        shares = np.zeros(len(lengths))
        for voice, weight in weights.items():
            own = voices == voice
            shares[own] = weight * lengths[own] / lengths[own].sum()
        return shares / shares.sum()


def encode_text(path: Path, text: str, tokenizer: Tokenizer) -> TokenText:
    """The tokens of a text, which was read from a file.

    A work in a voice that the tokenizer does not know is read as one in no voice. Raises
    UserError, which names the file, where it has no work.
    """
    return _token_text(text, _encode(path, text, tokenizer), tokenizer)


def load_tokens(path: Path, tokenizer: Tokenizer) -> TokenText:
    """The tokens of a text file; raises UserError as `read_text` and `encode_text` do."""
    return cached_tokens(path, read_text(path), tokenizer)


def cached_tokens(path: Path, text: str, tokenizer: Tokenizer) -> TokenText:
    """`encode_text`, from the cache beside the file where that is up to date."""
    key = sha256(f"{sha256(text.encode())} {tokenizer.sha256}".encode())[:16]
    cache = path.parent / ".tokens" / f"{path.stem}.{key}.tokens"
    tokens = _read_cache(cache)
    if tokens is None:
        tokens = _encode(path, text, tokenizer)
        _write_cache(cache, tokens)
    return _token_text(text, tokens, tokenizer)


def _token_text(text: str, tokens: UInt16[np.ndarray, " n"], tokenizer: Tokenizer) -> TokenText:
    known, any_voice = tokenizer.voices, tokenizer.any_voice
    named = [work.voice for work in split_works(text)]
    return TokenText(
        tokens,
        # No other token is `<|endoftext|>`: within a text it is a word like others.
        ends=np.flatnonzero(tokens == tokenizer.end_of_text) + 1,
        voices=tuple(voice if voice in known else ANY for voice in named),
        openers=np.array([known.get(voice, any_voice) for voice in named], np.uint16),
        any_voice=any_voice,
        sha256=sha256(text.encode()),
        unknown_voices=tuple(sorted({*named} - {"", *known})),
    )


def _encode(path: Path, text: str, tokenizer: Tokenizer) -> UInt16[np.ndarray, " n"]:
    works = works_of(path, text)
    ids = [np.append(tokenizer.encode(work.text), tokenizer.end_of_text) for work in works]
    return np.concatenate(ids).astype(np.uint16)


def _read_cache(cache: Path) -> UInt16[np.ndarray, " n"] | None:
    try:
        content = cache.read_bytes()
    except OSError:
        return None
    digest, array = content[:64], content[64:]
    if sha256(array).encode() != digest:
        return None  # damaged: made again
    return np.load(io.BytesIO(array), allow_pickle=False)


def _write_cache(cache: Path, tokens: UInt16[np.ndarray, " n"]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    # Its own hash first: half of the file, or other bits, would be tokens too.
    content = sha256(buffer.getvalue()).encode() + buffer.getvalue()
    try:
        write_atomically(cache, content)
    except UserError as error:
        print(f"The tokens are not cached, and will be made again each time: {error}")
        return
    stem = cache.name.rsplit(".", 2)[0]
    ours = re.compile(re.escape(stem) + r"\.[0-9a-f]{16}\.tokens")
    for stale in cache.parent.iterdir():
        if stale != cache and ours.fullmatch(stale.name):
            stale.unlink(missing_ok=True)
