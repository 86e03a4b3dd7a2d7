"""The engine that writes: a checkpoint's tokenizer, parameters and sampler together.

It knows nothing of terminals and files; whoever shows, serves or measures text calls it.
"""

import codecs
import enum
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.measuring import style
from gothic_jax.measuring.predictions import DistributionFunction, Predictions, distributions_on
from gothic_jax.measuring.scoring import LossFunction, losses_on
from gothic_jax.model.gpt import Params
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import complete
from gothic_jax.writing.sampler import Sampler
from gothic_jax.writing.settings import Settings


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


class Writer:
    """A model ready to write."""

    def __init__(
        self,
        params: Params,
        sampler: Sampler,
        tokenizer: Tokenizer,
        losses: LossFunction,
        distributions: DistributionFunction,
    ) -> None:
        self.tokenizer = tokenizer
        self._params = params
        self._sampler = sampler
        self._losses = losses
        self._distributions = distributions

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, device: jax.Device, tokenizer: Tokenizer | None = None
    ) -> "Writer":
        """The writer of a checkpoint, with its own tokenizer unless another is given.

        Raises UserError where checkpoint and tokenizer do not fit.
        """
        config = checkpoint.meta.model_config
        compute_dtype = checkpoint.meta.config["compute_dtype"]
        return cls(
            checkpoint.params(SingleDeviceSharding(device)),
            Sampler(config),
            tokenizer or checkpoint.tokenizer,
            losses_on(device, config, compute_dtype),
            distributions_on(device, config, compute_dtype),
        )

    @property
    def voices(self) -> Sequence[str]:
        """The voices that the model knows, without `any`."""
        return [*self.tokenizer.voices]

    @property
    def block_size(self) -> int:
        """The longest context, in tokens."""
        return self._sampler.config.block_size

    @cached_property
    def meter(self) -> style.Meter:
        """Measures the style of a text. Raises UserError for a model of fewer than two voices."""
        return style.Meter(self._losses, self._params, self.tokenizer, self.block_size)

    @cached_property
    def predictions(self) -> Predictions:
        """Tells what the model expects next."""
        return Predictions(self._distributions, self._params, self.tokenizer, self.block_size)

    def encode(self, prompt: str) -> Int[np.ndarray, " time"]:
        """The prompt's tokens; raises UserError where it is empty or not valid Unicode."""
        if not prompt.strip():
            raise UserError("the prompt is empty; give some words to continue from")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError("the prompt is not valid Unicode; leave out lone surrogates") from error
        return self.tokenizer.encode(prompt).astype(np.int32)

    def stream(
        self,
        prompt: Int[np.ndarray, " time"],
        settings: Settings,
        samples: int,
        seed: int,
        stop: Sequence[str] = (),
    ) -> Iterator[list[Piece]]:
        """Yields what each sample adds next, until all have ended.

        A sample ends where its work does, before the first of the strings `stop` in it, or after
        `max_tokens`. Bytes are held back until their character is complete (those that make none
        are left out), and text until it cannot be the beginning of a string to stop at.
        """
        weights = complete(settings.blend, self.voices)
        openers = np.array([[self.tokenizer.openers[voice]] for voice in weights], np.int32)
        rows = np.concatenate([openers, np.tile(prompt, (len(weights), 1))], axis=1)
        parts = [_Sample(self.tokenizer, stop, settings.max_tokens) for _ in range(samples)]
        chunks = self._sampler.stream(
            self._params,
            np.tile(rows, (samples, 1)),
            max_tokens=settings.max_tokens,
            sampling=settings.sampling,
            seed=seed,
            weights=[*weights.values()],
        )
        for chunk in chunks:
            pieces = [part.add(row) for part, row in zip(parts, chunk, strict=True)]
            yield pieces
            if all(piece.ending for piece in pieces):
                break

    def write(
        self,
        prompt: Int[np.ndarray, " time"],
        settings: Settings,
        samples: int,
        seed: int,
        stop: Sequence[str] = (),
    ) -> list[Piece]:
        """The whole samples that `stream` yields piece by piece."""
        streamed = zip(*self.stream(prompt, settings, samples, seed, stop), strict=True)
        return [Piece("".join(p.text for p in each), each[-1].ending) for each in streamed]


class _Sample:
    """A sample while it is written."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._left = max_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._held = ""
        self._ending: Ending | None = None

    def add(self, tokens: Int[np.ndarray, " chunk"]) -> Piece:
        """What further tokens add to the text."""
        for token in tokens:
            if self._ending is not None:
                break
            self._left -= 1
            if token == self._tokenizer.end_of_text:
                self._ending = Ending.END
                break
            self._held += self._decoder.decode(self._tokenizer.token_bytes[token])
            found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
            if found:
                self._held = self._held[: min(found)]
                self._ending = Ending.STOP
            elif self._left == 0:
                self._ending = Ending.LENGTH
        ready = len(self._held) if self._ending else self._safe()
        text, self._held = self._held[:ready], self._held[ready:]
        return Piece(text, self._ending)

    def _safe(self) -> int:
        """Characters of the held text that cannot belong to a string to stop at."""
        longest = max(map(len, self._stop), default=1)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop):
                return start
        return len(self._held)
