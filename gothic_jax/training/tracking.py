"""A run's figures while it trains: in TensorBoard, and as a progress bar or plain lines."""

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO, cast

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gothic_jax.machine.device import memory_peak, peak_flops
from gothic_jax.machine.terminal import styled
from gothic_jax.measuring.compass import Reading
from gothic_jax.measuring.novelty import Novelty
from gothic_jax.measuring.scoring import Score
from gothic_jax.text.voices import ALL
from gothic_jax.training.tensorboard import EventLog, NoLog, logs_of


class _LossyStream:
    """A stream that drops what cannot be written: a run is worth more than its lines.

    The terminal may be gone, the reader of a pipe may have left, a disk may be full.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class Tracker:
    """Writes a run's figures to TensorBoard and to stdout. A context manager.

    On a terminal that can show one, stdout gets a progress bar, otherwise a line from time to
    time. No failure of either stops the run.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        first: int,
        tokens_per_iteration: int,
        flops_per_iteration: float,
        bytes_per_token: float,
        silent: bool = False,
    ) -> None:
        """`first` is the number of iterations already done; what was logged after them is void.

        If `silent`, nothing is logged: another process does it.
        """
        self._log_interval = config.log_interval
        self._max_iters = config.max_iters
        self._tokens_per_iteration = tokens_per_iteration
        self._bytes_per_token = bytes_per_token
        self._device = jax.local_devices()[0]
        peak = peak_flops(self._device)
        self._mfu_per_rate = flops_per_iteration / peak / jax.device_count() if peak else None
        self._has_bar = styled(sys.stdout)
        self._console = Console(
            file=cast(TextIO, _LossyStream(sys.stdout)),
            force_terminal=self._has_bar,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )
        logs = logs_of(Path(config.out_dir))
        self._board = NoLog() if silent else EventLog(logs, first, self.say)
        self._bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._has_bar,
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
        """Ends the progress bar: what is printed next comes below it."""
        self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(line, markup=False)

    @property
    def tokens_per_second(self) -> float:
        """Mean over this process, without evaluations and saves."""
        if not self._seconds_timed:
            return 0.0
        return self._iterations_timed * self._tokens_per_iteration / self._seconds_timed

    def pause_clock(self) -> None:
        """Stops the clock for an evaluation and a save, and shows them as under way."""
        self._bar.update(self._task, description="evaluating and saving")
        self._seconds_timed += time.perf_counter() - self._lap_start

    def resume_clock(self) -> None:
        """Starts the clock again."""
        self._lap_start = time.perf_counter()

    def iteration(self, done: int, metrics: dict[str, float], *, skipped: int) -> None:
        """Reports iteration number `done`, counted from 1; the clock must be running.

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
        if not_finite := [name for name, value in metrics.items() if not math.isfinite(value)]:
            names = " and ".join(not_finite).replace("_", " ")
            self.say(f"{done}/{self._max_iters}  skipped: its {names} is not finite")
            self._board.scalars(done, {"train/skipped": float(skipped)})
            return
        if done % self._log_interval and done != self._max_iters:
            return
        if not self._has_bar:
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
                "device/memory_peak_bytes": float(memory_peak(self._device)),
            },
        )
        if self._mfu_per_rate is not None:
            self._board.scalars(done, {"speed/mfu": rate * self._mfu_per_rate})

    def evaluation(
        self, done: int, scores: dict[str, Score], reading: Reading, *, best: bool
    ) -> None:
        """Reports the scores on the validation text, per voice, and the compass beside them."""
        for voice, score in scores.items():
            self._board.scalars(
                done,
                {
                    f"val/loss/{voice}": score.loss,
                    f"val/perplexity/{voice}": score.perplexity,
                    f"val/bits_per_byte/{voice}": score.bits_per_byte,
                },
            )
        for name, value in reading._asdict().items():
            self._board.scalars(done, {f"compass/{name}": value})
        total = scores[ALL]
        voices = ", ".join(
            f"{voice} {score.bits_per_byte:.3f}" for voice, score in scores.items() if voice != ALL
        )
        self.say(
            f"{done}/{self._max_iters}  validation: loss {total.loss:.4f}"
            f"  perplexity {total.perplexity:.2f}  bits/byte {total.bits_per_byte:.3f}"
            + (f" ({voices})" if voices else "")
            + f"  gap {reading.gap:.2f}, recites {reading.recites:.0%}"
            + ("  best so far" if best else "")
        )

    def sample(self, done: int, voice: str, text: str) -> None:
        """Writes a sample of a voice to TensorBoard."""
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
        """Puts all of TensorBoard's log on the disk."""
        self._board.flush()


def duration(seconds: float) -> str:
    """Seconds in readable units: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
