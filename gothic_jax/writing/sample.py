"""A sample while it is written: from tokens to text that will not change any more."""

import codecs
import enum
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple, SupportsInt

from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.writing.guard import Guard


class Ending(enum.Enum):
    """Why a sample ended."""

    END = "end"
    """The model ended the work."""
    LENGTH = "length"
    """It has as many tokens as were asked for."""
    STOP = "stop"
    """One of the strings to stop at came next."""


class Piece(NamedTuple):
    """What a sample adds."""

    text: str
    ending: Ending | None
    """Why nothing follows; None while more may follow."""


class Sample:
    """Takes tokens as they are drawn, and gives the text that is certain.

    It ends where its work does, before the first of the strings `stop` in it, or after
    `max_tokens`. Bytes are held back until their character is complete (those that make none are
    left out), text until it cannot be the beginning of a string to stop at, and, with a guard,
    a word until it is complete and no copy.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        max_tokens: int,
        guard: Guard | None = None,
    ) -> None:
        self.tokens: list[int] = []
        """Those taken so far, without the one that ends a work."""
        self.ending: Ending | None = None
        self._tokenizer = tokenizer
        self._stop = stop
        self._max_tokens = max_tokens
        self._guard = guard
        self._text = ""
        self._given = 0
        self._lengths = [0]
        """Characters of the text before each token, and behind the last."""
        self._decoders = [codecs.getincrementaldecoder("utf-8")("ignore").getstate()]
        """The decoder's state at the same places."""
        self._banned: dict[int, list[int]] = {}

    @property
    def certain(self) -> int:
        """How many of the tokens belong to text that has been given, wholly or in part."""
        if self.ending in (Ending.END, Ending.LENGTH):
            return len(self.tokens)
        if self.ending is Ending.STOP:
            return bisect_left(self._lengths, self._given)
        return bisect_right(self._lengths, self._given) - 1

    @property
    def banned(self) -> Sequence[int]:
        """Tokens that must not come next, since they led to a copy."""
        return self._banned.get(len(self.tokens), [])

    def add(self, tokens: Iterable[SupportsInt]) -> Piece:
        """What further tokens add to the text.

        Where the guard finds a copy, `tokens` is shorter afterwards: the sample goes on from
        there, without the tokens that are then `banned`.
        """
        for token in map(int, tokens):
            if self.ending is not None:
                break
            if token == self._tokenizer.end_of_text:
                self.ending = Ending.END
            else:
                self._append(token)
            ended = self.ending is not None
            if self._guard is None:
                continue
            if (copied := self._guard.find_copy(self._text, ended=ended)) is not None:
                # What has been given stays: then a token more must not make it that word.
                self._take_back(max(copied, self._given))
                break
        ready = len(self._text) if self.ending else self._safe()
        text = self._text[self._given : ready]
        self._given = max(ready, self._given)
        return Piece(text, self.ending)

    def _append(self, token: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        decoder.setstate(self._decoders[-1])
        self._text += decoder.decode(self._tokenizer.token_bytes[token])
        self.tokens.append(token)
        self._lengths.append(len(self._text))
        self._decoders.append(decoder.getstate())
        places = [self._text.find(stop, self._given) for stop in self._stop]
        if found := [place for place in places if place >= 0]:
            self._text = self._text[: min(found)]
            self.ending = Ending.STOP
        elif len(self.tokens) == self._max_tokens:
            self.ending = Ending.LENGTH

    def _take_back(self, character: int) -> None:
        """Removes the token that a character of the text belongs to, and all after it."""
        kept = min(bisect_right(self._lengths, character), len(self.tokens)) - 1
        self._banned = {at: banned for at, banned in self._banned.items() if at <= kept}
        self._banned.setdefault(kept, []).append(self.tokens[kept])
        del self.tokens[kept:], self._lengths[kept + 1 :], self._decoders[kept + 1 :]
        self._text = self._text[: self._lengths[-1]]
        self.ending = None
        assert self._guard is not None
        self._guard.take_back(len(self._text))

    def _safe(self) -> int:
        """Characters of the text that belong to no string to stop at, and to no open word."""
        longest = max(map(len, self._stop), default=1)
        end = len(self._text)
        for start in range(max(self._given, end - longest + 1), end):
            if any(stop.startswith(self._text[start:]) for stop in self._stop):
                end = start
                break
        if self._guard is not None:
            token = bisect_right(self._lengths, self._guard.open_word(self._text)) - 1
            end = min(end, self._lengths[token])
        return max(end, self._given)
