"""What a run tells while it goes: TensorBoard, and a progress bar or plain lines."""

import math
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from gothic_jax.device import memory_peak, peak_flops
from gothic_jax.evaluate import ALL, Score


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
        self._board = SummaryWriter(str(Path(config.out_dir) / "logs"), purge_step=first + 1)
        self._console = Console(highlight=False, soft_wrap=True)
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
    def seconds(self) -> float:
        """Time spent training, without evaluations and saves."""
        return self._seconds_timed

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

    def iteration(self, done: int, metrics: dict[str, float]) -> None:
        """Reports the iteration that makes `done` in all; the clock must be running."""
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
        if done % self._log_interval and done != self._max_iters:
            return
        if not self._console.is_terminal:
            self.say(f"{done}/{self._max_iters}  {figures}")
        count, seconds = self._since_log
        self._since_log = (self._iterations_timed, self._seconds_timed)
        rate = (self._iterations_timed - count) / (self._seconds_timed - seconds)
        self._scalars(
            done,
            {
                "train/loss": loss,
                "train/perplexity": math.exp(min(loss, 700)),
                "train/bits_per_byte": loss / math.log(2) / self._bytes_per_token,
                "train/learning_rate": metrics["learning_rate"],
                "train/gradient_norm": metrics["gradient_norm"],
                "speed/tokens_per_second": rate * self._tokens_per_iteration,
                "device/memory_peak_bytes": memory_peak(self._device),
            },
        )
        if self._mfu_per_rate is not None:
            self._scalars(done, {"speed/mfu": rate * self._mfu_per_rate})

    def evaluation(self, done: int, scores: dict[str, Score], *, best: bool) -> None:
        """Reports the scores on the validation text, per voice."""
        for voice, score in scores.items():
            self._scalars(
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
        self._board.add_text(f"sample/{voice}", "    " + text.replace("\n", "\n    "), done)

    def flush(self) -> None:
        """Puts what TensorBoard has not written yet on disk."""
        self._board.flush()

    def _scalars(self, done: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, done)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
