"""TensorBoard's log of a run, which a failing disk does not stop.

tensorboardX is imported at the first point: where PyTorch is installed it imports that, which takes
a second before the first iteration.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gothic_jax.errors import UserError

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

_PREFIX = "events.out.tfevents."


def logs_of(run: Path) -> Path:
    """The folder of a run's logs."""
    return run / "logs"


def delete_logs(run: Path) -> None:
    """Deletes a run's logs, and nothing else in its folder. Raises UserError."""
    try:
        for path in logs_of(run).glob(f"{_PREFIX}*"):
            path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be deleted: {error.strerror}") from error


class NoLog:
    """Writes nothing, as all processes of a run but the first."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Leaves the points out."""

    def text(self, step: int, name: str, content: str) -> None:
        """Leaves the text out."""

    def flush(self) -> None:
        """Has nothing to put on the disk."""

    def close(self) -> None:
        """Has nothing to close."""


class EventLog:
    """Writes events as they come.

    tensorboardX's own SummaryWriter passes events to a thread, which ends at the first write
    that fails and then lets the program wait for ever. Here such an error is reported once, the
    points are left out, and a later flush tries a new file.
    """

    def __init__(self, folder: Path, first: int, say: Callable[[str], None]) -> None:
        """`first` iterations are done; what an earlier file logged after them is void."""
        self._folder = folder
        self._void_from = first + 1
        self._say = say
        self._reported = False
        self._begun = False
        self._file: RecordWriter | None = None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to each of several curves."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._add(step, scalar(name, value))

    def text(self, step: int, name: str, content: str) -> None:
        """Adds a text, which TensorBoard renders as Markdown."""
        from tensorboardX.summary import text

        self._add(step, text(name, content))

    def flush(self) -> None:
        """Puts all events on the disk, or tries a new file if there is none."""
        self._begun = True
        with self._reporting():
            if self._file is None:
                self._open()
            else:
                self._file.flush()
                self._reported = False  # a later failure is reported again

    def close(self) -> None:
        """Puts all events on the disk and closes the file."""
        if self._file is not None:
            with self._reporting():
                self._file.close()

    def _open(self) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(str(self._folder / f"{_PREFIX}{name}"))
        self._write(Event(file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=self._void_from, session_log=start))

    def _add(self, step: int, summary: "Summary") -> None:
        from tensorboardX.proto.event_pb2 import Event

        if not self._begun:
            self.flush()
        if self._file is not None:
            self._void_from = max(self._void_from, step + 1)
            with self._reporting():
                self._write(Event(step=step, summary=summary))

    def _write(self, event: "Event") -> None:
        assert self._file is not None
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """If a write in the block fails: gives up the file, and reports the first such failure."""
        try:
            yield
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            self._file = None
            if not self._reported:
                self._reported = True
                self._say(
                    f"warning: TensorBoard's log in {self._folder} cannot be written:"
                    f" {error.strerror}; the run goes on, and points are missing until it can be"
                )
