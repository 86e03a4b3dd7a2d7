"""A model that is served, and what its answers share."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.measuring.novelty import Loaded
from gothic_jax.serving.requests import Model
from gothic_jax.writing import receipts
from gothic_jax.writing.engine import EngineThread
from gothic_jax.writing.writer import Writer

T = TypeVar("T")

Tick = Callable[[], None]
"""What long work calls now and then, and what ends it when nobody wants its result any more."""

MAX_MEASURED = 100_000
"""Characters of a text that is measured."""


class _NotWantedError(Exception):
    """Ends work whose client has gone."""


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
    _measuring: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.thread = EngineThread(self.writer.engine(self.slots))
        self.circumstances = receipts.circumstances(self.checkpoint)

    async def measure(self, work: Callable[[Tick], T]) -> T:
        """The result of some work in a thread.

        One at a time, since it is slow and the writing needs its share of the processor. If its
        client leaves, work that waits is dropped, and what has begun ends at its next tick.
        """
        gone = threading.Event()

        def tick() -> None:
            if gone.is_set():
                raise _NotWantedError

        async with self._measuring:
            begun = asyncio.ensure_future(asyncio.to_thread(work, tick))
            try:
                return await asyncio.shield(begun)
            finally:
                gone.set()
                await asyncio.wait({begun})
                if not begun.cancelled():
                    begun.exception()  # looked at, so that asyncio does not report it

    @property
    def model(self) -> Model:
        """What requests are checked against."""
        return Model(self.name, self.writer.tokenizer, self.copy_guard, self.index is not None)
