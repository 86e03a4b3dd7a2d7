"""What a run tells while it goes: TensorBoard, and a progress bar or plain lines."""

import contextlib
import itertools
import math
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar, text

from gothic_jax.device import memory_peak, peak_flops
from gothic_jax.novelty import Novelty
from gothic_jax.scoring import ALL, Score

_FILE_NUMBERS = itertools.count()


class EventLog:
    """TensorBoard's log of a run, written as it comes.

    tensorboardX's own SummaryWriter hands events to a thread, which ends at the first write
    that fails and lets the program wait for ever. Here such an error is told once, points are
    left out, and a later flush tries a new file.
    """

    def __init__(self, folder: Path, first: int, say: Callable[[str], None]) -> None:
        """`first` iterations are done; what was logged past them is void."""
        self._folder = folder
        self._void_from = first + 1
        self._say = say
        self._told = False
        self._file: RecordWriter | None = None
        self._open()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Points of several curves."""
        for name, value in values.items():
            self._add(step, scalar(name, value))

    def text(self, step: int, name: str, content: str) -> None:
        """A text, as Markdown."""
        self._add(step, text(name, content))

    def flush(self) -> None:
        """Puts all of it on the disk."""
        if self._file is None:
            self._open()
        elif self._guarded(self._file.flush):
            self._told = False  # should it fail again, that is news

    def close(self) -> None:
        """Puts all of it on the disk and ends."""
        if self._file is not None:
            self._guarded(self._file.close)

    def _open(self) -> None:
        # Two files of one second would have one name but for the last two parts.
        number = next(_FILE_NUMBERS)
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{number}"

        def begin() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._folder / f"events.out.tfevents.{name}"))
            start = SessionLog(status=SessionLog.START)
            for event in (
                Event(file_version="brain.Event:2"),
                Event(step=self._void_from, session_log=start),
            ):
                event.wall_time = time.time()
                self._file.write(event.SerializeToString())

        self._guarded(begin)

    def _add(self, step: int, summary: Summary) -> None:
        if (file := self._file) is not None:
            event = Event(wall_time=time.time(), step=step, summary=summary)
            self._guarded(lambda: file.write(event.SerializeToString()))
            self._void_from = max(self._void_from, step + 1)

    def _guarded(self, write: Callable[[], object]) -> bool:
        """Whether it was written."""
        try:
            write()
            return True
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            self._file = None
            if not self._told:
                self._told = True
                self._say(
                    f"warning: TensorBoard's log in {self._folder} cannot be written:"
                    f" {error.strerror}; the run goes on, and points are missing until it can be"
                )
            return False


class Tracker:
    """Writes a run's figures to TensorBoard and to the terminal. A context manager."""

    def __init__(
        self,
        config: ConfigDict,
        *,
        first: int,
        tokens_per_iteration: int,
        flops_per_iteration: float,
        bytes_per_token: float,
    ) -> None:
        """`first` is the number of iterations already done; what was logged past it is void."""
        self._log_interval = config.log_interval
        self._max_iters = config.max_iters
        self._tokens_per_iteration = tokens_per_iteration
        self._bytes_per_token = bytes_per_token
        self._device = jax.local_devices()[0]
        peak = peak_flops(self._device)
        self._mfu_per_rate = flops_per_iteration / peak / jax.local_device_count() if peak else None
        self._console = Console(highlight=False, soft_wrap=True)
        self._board = EventLog(Path(config.out_dir) / "logs", first, self.say)
        self._bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=config.max_iters, completed=first)
        self._iterations_timed = 0
        self._seconds_timed = 0.0
        self._since_log = (0, 0.0)
        self._lap_start = time.perf_counter()

    def __enter__(self) -> "Tracker":
        self._bar.start()
        self.resume_clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_bar()
        self._board.close()

    def stop_bar(self) -> None:
        """Takes the progress bar off the terminal: what is said next comes below it."""
        self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(line, markup=False)

    @property
    def tokens_per_second(self) -> float:
        """Mean over the whole of this process."""
        if not self._seconds_timed:
            return 0.0
        return self._iterations_timed * self._tokens_per_iteration / self._seconds_timed

    def pause_clock(self) -> None:
        """Stops the clock for an evaluation and a save, and shows that they go on."""
        self._bar.update(self._task, description="evaluating and saving")
        self._seconds_timed += time.perf_counter() - self._lap_start

    def resume_clock(self) -> None:
        """Starts the clock again."""
        self._lap_start = time.perf_counter()

    def iteration(self, done: int, metrics: dict[str, float], *, skipped: int) -> None:
        """Reports the iteration that makes `done` in all; the clock must be running.

        `skipped` is the number of iterations, up to this one, that were skipped.
        """
        now = time.perf_counter()
        self._seconds_timed += now - self._lap_start
        self._lap_start = now
        self._iterations_timed += 1
        loss = metrics["loss"]
        left = (self._max_iters - done) * self._seconds_timed / self._iterations_timed
        figures = (
            f"loss {loss:.4f}  lr {metrics['learning_rate']:.2e}"
            f"  {self.tokens_per_second:,.0f} tokens/s  {duration(left)} left"
        )
        self._bar.update(self._task, completed=done, description=figures)
        if odd := [name for name, value in metrics.items() if not math.isfinite(value)]:
            names = " and ".join(odd).replace("_", " ")
            self.say(f"{done}/{self._max_iters}  skipped: its {names} is not finite")
            self._board.scalars(done, {"train/skipped": float(skipped)})
            return
        if done % self._log_interval and done != self._max_iters:
            return
        if not self._console.is_terminal:
            self.say(f"{done}/{self._max_iters}  {figures}")
        count, seconds = self._since_log
        self._since_log = (self._iterations_timed, self._seconds_timed)
        rate = (self._iterations_timed - count) / (self._seconds_timed - seconds)
        self._board.scalars(
            done,
            {
                "train/loss": loss,
                "train/perplexity": math.exp(min(loss, 700)),
                "train/bits_per_byte": loss / math.log(2) / self._bytes_per_token,
                "train/learning_rate": metrics["learning_rate"],
                "train/gradient_norm": metrics["gradient_norm"],
                "train/skipped": float(skipped),
                "speed/tokens_per_second": rate * self._tokens_per_iteration,
                "device/memory_peak_bytes": memory_peak(self._device),
            },
        )
        if self._mfu_per_rate is not None:
            self._board.scalars(done, {"speed/mfu": rate * self._mfu_per_rate})

    def evaluation(self, done: int, scores: dict[str, Score], *, best: bool) -> None:
        """Reports the scores on the validation text, per voice."""
        for voice, score in scores.items():
            self._board.scalars(
                done,
                {
                    f"val/loss/{voice}": score.loss,
                    f"val/perplexity/{voice}": score.perplexity,
                    f"val/bits_per_byte/{voice}": score.bits_per_byte,
                },
            )
        total = scores[ALL]
        voices = ", ".join(
            f"{voice} {score.bits_per_byte:.3f}" for voice, score in scores.items() if voice != ALL
        )
        self.say(
            f"{done}/{self._max_iters}  validation: loss {total.loss:.4f}"
            f"  perplexity {total.perplexity:.2f}  bits/byte {total.bits_per_byte:.3f}"
            + (f" ({voices})" if voices else "")
            + ("  best so far" if best else "")
        )

    def sample(self, done: int, voice: str, text: str) -> None:
        """Keeps a sample of a voice in TensorBoard."""
        # TensorBoard renders Markdown, in which an indent keeps line breaks and symbols.
        self._board.text(done, f"sample/{voice}", "    " + text.replace("\n", "\n    "))

    def novelty(self, done: int, voice: str, measured: Novelty) -> None:
        """Reports what a sample shares with the training works."""
        longest = measured.longest.words if measured.longest else 0
        self._board.scalars(
            done,
            {
                f"novelty/longest_copied_words/{voice}": float(longest),
                f"novelty/copied_share/{voice}": measured.copied,
            },
        )

    def flush(self) -> None:
        """Puts what TensorBoard has not written yet on disk."""
        self._board.flush()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
