"""A model that is served, and what its answers share."""

import asyncio
from dataclasses import dataclass, field

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.measuring.novelty import Loaded
from gothic_jax.serving.requests import Model
from gothic_jax.writing import receipts
from gothic_jax.writing.engine import EngineThread
from gothic_jax.writing.writer import Writer

MAX_MEASURED = 100_000
"""Characters of a text that is measured."""


@dataclass
class Service:
    """A model that is served."""

    name: str
    checkpoint: Checkpoint
    writer: Writer
    slots: int
    index: Loaded | None
    copy_guard: int | None
    keeps_receipts: bool
    thread: EngineThread = field(init=False)
    circumstances: dict[str, str] = field(init=False)
    measuring: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Measuring is slow, and one at a time leaves the writing its share of the processor."""

    def __post_init__(self) -> None:
        self.thread = EngineThread(self.writer.engine(self.slots))
        self.circumstances = receipts.circumstances(self.checkpoint)

    @property
    def model(self) -> Model:
        """What requests are checked against."""
        return Model(self.name, self.writer.tokenizer, self.copy_guard, self.index is not None)
