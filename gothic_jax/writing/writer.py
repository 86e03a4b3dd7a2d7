"""The engine that writes: a checkpoint's tokenizer, parameters and sampler together.

It knows nothing of terminals and files; whoever shows, serves or measures text calls it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.machine.device import decoding_dtype
from gothic_jax.measuring import style
from gothic_jax.measuring.predictions import DistributionFunction, Predictions, distributions_on
from gothic_jax.measuring.scoring import LossFunction, losses_on
from gothic_jax.model.gpt import Params
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import complete
from gothic_jax.writing.engine import Engine, Text, Written
from gothic_jax.writing.guard import Guard
from gothic_jax.writing.sample import Ending, Piece, Sample
from gothic_jax.writing.sampler import Sampler
from gothic_jax.writing.settings import Settings
from gothic_jax.writing.slots import Slots


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
        self._engine: tuple[int, Engine] | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: jax.Device,
        tokenizer: Tokenizer | None = None,
        dtype: str | None = None,
    ) -> "Writer":
        """The writer of a checkpoint, with its own tokenizer unless another is given.

        It computes in `dtype`; by default in what `decoding_dtype` says. Raises UserError where
        checkpoint and tokenizer do not fit.
        """
        config = checkpoint.meta.model_config
        compute_dtype = checkpoint.meta.config["compute_dtype"]
        return cls(
            checkpoint.params(SingleDeviceSharding(device)),
            Sampler(config, dtype=dtype or decoding_dtype(device)),
            tokenizer or checkpoint.tokenizer,
            losses_on(device, config, compute_dtype),
            distributions_on(device, config, compute_dtype),
        )

    @property
    def voices(self) -> Sequence[str]:
        """The voices that the model knows, without `any`."""
        return [*self.tokenizer.voices]

    @property
    def dtype(self) -> str:
        """The type that it computes in."""
        return str(self._sampler.dtype)

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

        What is held back, and where a sample ends, `Sample` says.
        """
        weights = complete(settings.blend, self.voices)
        openers = np.array([[self.tokenizer.openers[voice]] for voice in weights], np.int32)
        rows = np.concatenate([openers, np.tile(prompt, (len(weights), 1))], axis=1)
        parts = [Sample(self.tokenizer, stop, settings.max_tokens) for _ in range(samples)]
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

    def engine(self, slots: int) -> Engine:
        """An engine for many texts at once, of so many slots; the last one, if it had as many."""
        if self._engine is None or self._engine[0] != slots:
            in_slots = Slots(self._sampler, self._params, slots)
            self._engine = slots, Engine(in_slots, self.tokenizer)
        return self._engine[1]

    def stream_in_slots(
        self,
        prompt: Int[np.ndarray, " time"],
        settings: Settings,
        numbers: Sequence[int],
        seed: int,
        slots: int,
        stop: Sequence[str] = (),
        guard: Callable[[], Guard] | None = None,
    ) -> Iterator[list[Piece]]:
        """As `stream`, for the samples of these numbers, by an engine of so many slots.

        `guard` makes the guard of each.
        """
        new: list[list[Written]] = [[] for _ in numbers]
        texts = [
            Text(prompt, settings, seed, written.append, number, stop, guard and guard())
            for number, written in zip(numbers, new, strict=True)
        ]
        engine = self.engine(slots)
        endings: list[Ending | None] = [None for _ in numbers]
        try:
            engine.submit(*texts)
            while not all(endings):
                engine.turn()
                for i, written in enumerate(new):
                    endings[i] = endings[i] or (written[-1].piece.ending if written else None)
                yield [
                    Piece("".join(one.piece.text for one in written), ending)
                    for written, ending in zip(new, endings, strict=True)
                ]
                for written in new:
                    written.clear()
        finally:
            for text in texts:
                text.cancelled = True

    def write(
        self,
        prompt: Int[np.ndarray, " time"],
        settings: Settings,
        samples: int,
        seed: int,
        stop: Sequence[str] = (),
    ) -> list[Piece]:
        """The whole samples that `stream` yields piece by piece."""
        return whole(self.stream(prompt, settings, samples, seed, stop))


def whole(pieces: Iterable[list[Piece]]) -> list[Piece]:
    """Samples that come piece by piece, as one piece each."""
    streamed = zip(*pieces, strict=True)
    return [Piece("".join(piece.text for piece in each), each[-1].ending) for each in streamed]
