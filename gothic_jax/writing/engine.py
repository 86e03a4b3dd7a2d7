"""Writes many texts at once, which come and go between chunks: continuous batching.

A text is the same, bit for bit, whatever else is written beside it: the slots' shapes never
change, its random numbers are keyed by its seed, its number and the place of the token, and where
its window slides depends on its own length alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gothic_jax.errors import UserError
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import ANY, complete
from gothic_jax.writing.guard import Guard
from gothic_jax.writing.sample import Piece, Sample
from gothic_jax.writing.sampler import keep_window
from gothic_jax.writing.settings import Settings
from gothic_jax.writing.slots import MAX_VOICES, Drawn, Slots


class ScoredToken(NamedTuple):
    """A token drawn, beside what else could have come."""

    token: int
    log_probability: float
    """In nats, by the unfiltered blend of the voices."""
    likeliest: list[tuple[int, float]]
    """The likeliest tokens at its place, likeliest first, as many as the text asks for."""


class Written(NamedTuple):
    """What a chunk adds to a text."""

    piece: Piece
    tokens: list[ScoredToken]
    """Those of the piece."""


@dataclass(eq=False)
class Text:
    """A text to write, and what has been written of it."""

    prompt: Int[np.ndarray, " time"]
    settings: Settings
    seed: int
    deliver: Callable[[Written], None]
    """Is called after each chunk that adds something, the last time with an ending."""
    number: int = 0
    """Which of the texts of a seed it is: that one's random numbers are drawn."""
    stop: Sequence[str] = ()
    guard: Guard | None = None
    likeliest: int = 0
    """How many of the likeliest tokens are reported at each place; MAX_LIKELIEST at most."""
    cancelled: bool = False
    """Set by whoever no longer wants it: it is then not delivered any more, and its slots are
    free after the chunk under way."""
    weights: dict[str, float] = field(default_factory=dict)
    """By voice, as `complete` gives them; set by `Engine.submit`."""

    @property
    def slots(self) -> int:
        """How many slots it needs."""
        return len(self.weights)


class Engine:
    """Slots, and the texts that are in them or wait for them, first come, first served.

    All calls but `submit` belong to one thread.
    """

    def __init__(self, slots: Slots, tokenizer: Tokenizer) -> None:
        self._slots = slots
        self._tokenizer = tokenizer
        self._waiting: deque[Text] = deque()
        self._open: dict[int, _Place] = {}
        self._free = list(range(slots.slots))

    @property
    def waiting(self) -> int:
        """Texts that have no slot yet, and that somebody still wants."""
        # Of a copy, since other threads may add texts meanwhile.
        return sum(not text.cancelled for text in [*self._waiting])

    @property
    def free(self) -> int:
        """Slots that have no text."""
        return len(self._free)

    def submit(self, *texts: Text) -> None:
        """Adds texts to those that wait.

        Raises UserError where the model lacks a voice, or a blend has more than there are slots.
        """
        for text in texts:
            text.weights = complete(text.settings.blend, [*self._tokenizer.voices])
            if text.slots > (most := min(MAX_VOICES, self._slots.slots)):
                raise UserError(
                    f"a blend may have {most} voices here, counting `{ANY}` for what the others"
                    f" leave of 1, not {text.slots}; leave some out"
                )
        self._waiting.extend(texts)

    def turn(self) -> bool:
        """Lets waiting texts in, writes a chunk of all, delivers it; False if there was nothing."""
        for number in [n for n, place in self._open.items() if place.text.cancelled]:
            self._leave(number)
        # Once round: another thread may add to the queue, but only this one takes from it.
        for _ in range(len(self._waiting)):
            text = self._waiting.popleft()
            if not text.cancelled:
                self._waiting.append(text)
        while self._waiting and self._waiting[0].slots <= len(self._free):
            self._enter(self._waiting.popleft())
        if not self._open:
            return False
        drawn = self._slots.advance(
            {number: len(place.sample.tokens) for number, place in self._open.items()},
            {number: place.sample.banned for number, place in self._open.items()},
        )
        for number, place in [*self._open.items()]:
            written = place.take(drawn, self._slots)
            if written.piece.ending is not None:
                self._leave(number)
            if not place.text.cancelled and (written.tokens or written.piece.ending is not None):
                place.text.deliver(written)
        return True

    def _enter(self, text: Text) -> None:
        slots = [self._free.pop(0) for _ in range(text.slots)]
        self._slots.occupy(
            slots,
            [*text.weights.values()],
            text.settings.sampling,
            seed=text.seed,
            sample=text.number,
        )
        place = self._open[slots[0]] = _Place(text, slots, self._tokenizer)
        place.read(self._slots, self._slots.config.block_size)

    def _leave(self, number: int) -> None:
        slots = self._open.pop(number).slots
        self._slots.free(slots)
        self._free = sorted([*self._free, *slots])


class EngineThread:
    """Runs an engine in a thread of its own, for as long as the process lives."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failed = False
        """Whether an error of ours has ended it; its traceback is on stderr."""
        self._work = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="engine").start()

    def submit(self, *texts: Text) -> None:
        """As `Engine.submit`, from any thread."""
        self.engine.submit(*texts)
        self._work.set()

    def _run(self) -> None:
        try:
            while True:
                self._work.clear()
                if not self.engine.turn():
                    self._work.wait()
        finally:
            self.failed = True


class _Place:
    """A text in its slots.

    When its window was last read, that had `_first` tokens, and `_base` of the sample's tokens were
    there.
    """

    def __init__(self, text: Text, slots: list[int], tokenizer: Tokenizer) -> None:
        self.text = text
        self.slots = slots
        self.sample = Sample(tokenizer, text.stop, text.settings.max_tokens, text.guard)
        self._openers = [tokenizer.openers[voice] for voice in text.weights]
        self._scores: list[ScoredToken] = []
        self._delivered = 0
        self._base = 0
        self._first = 0

    def read(self, slots: Slots, length: int) -> None:
        """Reads the opener and the last tokens, `length` in all at most, in place of the window."""
        tokens = np.concatenate([self.text.prompt, np.array(self.sample.tokens, np.int32)])
        self._base = len(self.sample.tokens)
        for slot, opener in zip(self.slots, self._openers, strict=True):
            context = keep_window(np.array([[opener, *tokens]], np.int32), length)[0]
            slots.read(slot, context)
            self._first = len(context)

    def take(self, drawn: Drawn, slots: Slots) -> Written:
        """Takes the text's part of a chunk, and makes its slots ready for the next one."""
        text, sample = self.slots[0], self.sample
        before = len(sample.tokens)
        # The window holds no more, and slides as the sampler's does.
        tokens = drawn.tokens[text, : slots.config.block_size - self._position(before)]
        piece = sample.add(tokens)
        now = len(sample.tokens)
        del self._scores[now:]
        for i in range(now - before):
            likeliest = zip(
                drawn.likeliest[text, i, : self.text.likeliest].tolist(),
                drawn.likeliest_log_probabilities[text, i, : self.text.likeliest].tolist(),
                strict=True,
            )
            score = float(drawn.log_probabilities[text, i])
            self._scores.append(ScoredToken(int(tokens[i]), score, [*likeliest]))
        if piece.ending is None:
            self._make_ready(slots)
        delivered, self._delivered = self._delivered, sample.certain
        return Written(piece, self._scores[delivered : sample.certain])

    def _position(self, tokens: int) -> int:
        """Where the last of so many of the sample's tokens is, or the context's last one."""
        return self._first - 1 + tokens - self._base

    def _make_ready(self, slots: Slots) -> None:
        now, block = len(self.sample.tokens), slots.config.block_size
        # Where tokens were taken back across the place where the window slid, the one before it
        # is gone.
        if now < self._base or self._position(now) >= block:
            self.read(slots, max(block // 2, 1))
            return
        tokens = [*self.text.prompt[-1:], *self.sample.tokens[-1:]]
        for slot, opener in zip(self.slots, self._openers, strict=True):
            slots.go_on(slot, int([opener, *tokens][-1]), self._position(now))
