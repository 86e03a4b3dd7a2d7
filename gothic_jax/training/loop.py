"""Iteration after iteration of a run, with the evaluations and checkpoints between them."""

import contextlib
import dataclasses
import enum
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Int

from gothic_jax.checkpoints.checkpoint import locate
from gothic_jax.checkpoints.saver import SaveFailure, Saver, delete_checkpoints
from gothic_jax.errors import UserError
from gothic_jax.machine.device import (
    decoding_dtype,
    default_device,
    memory_peak,
    out_of_memory_reported,
    refuse_beyond_memory,
    tree_bytes,
)
from gothic_jax.machine.process import Interrupted, StopSignal
from gothic_jax.measuring import compass
from gothic_jax.measuring.scoring import loss_function
from gothic_jax.model.gpt import flops_per_token, parameter_count
from gothic_jax.text.voices import ALL, ANY
from gothic_jax.text.windows import batch_iterator
from gothic_jax.training.run import Run, evaluation_due, evaluation_pending
from gothic_jax.training.step import Metrics, TrainState, TrainStep, all_finite, make_train_step
from gothic_jax.training.tensorboard import delete_logs
from gothic_jax.training.tracking import Tracker, duration
from gothic_jax.writing.sampler import Sampler
from gothic_jax.writing.settings import Sampling


class Outcome(enum.Enum):
    """How a run ended."""

    COMPLETE = "complete"
    NO_IMPROVEMENT = "no improvement"
    """Validation has not improved for as long as `patience` says."""
    STOPPED = "stopped"
    """By a signal; `--resume` goes on."""


def train(run: Run, say: Callable[[str], None]) -> int:
    """Trains to the end, until validation no longer improves, or to a signal.

    Returns the exit code: 0, or 128 + the signal's number.
    """
    config, out_dir = run.config, Path(run.config.out_dir)
    params = run.first_state.params
    say(f"model: {run.shape.architecture}, {parameter_count(params):,} parameters")
    for line in run.describe():
        say(line)
    with contextlib.ExitStack() as stack:
        stack.enter_context(out_of_memory_reported(run.memory_cure))
        state, step, how = _begun(run)
        say(how)
        if not config.compile:
            stack.enter_context(jax.disable_jit())
        # From here on there is something to save.
        stop = stack.enter_context(StopSignal().watched())
        if not run.start.whole:
            # The old run is deleted now that the new one is sure to begin.
            delete_checkpoints(out_dir)
            delete_logs(out_dir)
        saver = Saver(out_dir, run.start.whole)
        stack.push(partial(_close, saver))
        text, tokenizer = run.train_text, run.start.tokenizer
        flops = flops_per_token(run.shape, params) * run.tokens_per_iteration
        tracker = stack.enter_context(
            Tracker(
                config,
                first=run.meta.iteration,
                tokens_per_iteration=run.tokens_per_iteration,
                flops_per_iteration=float(flops),
                bytes_per_token=float(np.mean(tokenizer.byte_lengths[text.tokens])),
            )
        )
        begin = time.perf_counter()
        loop = Loop(run, state, step, tracker, saver, stop)
        outcome = loop.go()
        saver.close()
        tracker.stop_bar()
        if outcome is Outcome.STOPPED:
            assert stop.received is not None
            return 128 + stop.received
        for line in _summary(run, loop, tracker, time.perf_counter() - begin):
            tracker.say(line)
        return 0


def _begun(run: Run) -> tuple[TrainState, TrainStep, str]:
    """The first state, and the training step, which is compiled meanwhile; and how that went."""
    step = make_train_step(run.config, run.devices.attention)
    if not run.config.compile:
        size = tree_bytes(run.first_state) / 2**20
        return (
            run.initial_state(),
            step,
            f"not compiled: slow, for debugging. State {size:,.0f} MiB",
        )
    with ThreadPoolExecutor(1, thread_name_prefix="compiler") as pool:
        compiling = pool.submit(_compiled, run, step)
        return (run.initial_state(), *compiling.result())


def _compiled(run: Run, step: TrainStep) -> tuple[TrainStep, str]:
    """The training step, compiled, and what that took in time and memory."""
    begin = time.perf_counter()
    config, everywhere = run.config, run.devices.everywhere
    batch = (config.gradient_accumulation_steps, config.batch_size, run.shape.block_size + 1)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        run.first_state,
    )
    windows = jax.ShapeDtypeStruct(batch, np.int32, sharding=run.devices.micro_batches)
    program = jax.jit(step, donate_argnums=0).lower(state, windows).compile()
    how = f"compiled in {time.perf_counter() - begin:.1f} s"
    if analysis := program.memory_analysis():
        estimate = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        count = run.devices.mesh.size  # on a CPU, all share one memory
        refuse_beyond_memory(run.devices.first, count * estimate, "an iteration", run.memory_cure)
        how += f"; estimated memory {estimate / 2**20:,.0f} MiB a device"
    return program, how


def _put(run: Run, windows: Int[np.ndarray, "micro batch window"]) -> Array:
    """The windows on the devices, each micro-batch divided over them."""
    return jax.device_put(windows, run.devices.micro_batches)


def _close(saver: Saver, kind: type[BaseException] | None, *_: object) -> None:
    """Closes the saver; an error that came before takes precedence over a failed save."""
    try:
        saver.close()
    except SaveFailure as failure:
        if kind is None:
            raise
        print(f"warning: {failure}", file=sys.stderr)


def _summary(run: Run, loop: "Loop", tracker: Tracker, seconds: float) -> Iterator[str]:
    best = locate(run.config.out_dir)
    for voice, score in (best.meta.scores or {}).items():
        yield (
            f"best ({best}) {voice}: loss {score['loss']:.4f}"
            f"  perplexity {score['perplexity']:.2f}  bits/byte {score['bits_per_byte']:.4f}"
        )
    yield (
        f"{duration(seconds)}, {tracker.tokens_per_second:,.0f} tokens/s while training,"
        f" peak memory {memory_peak(run.devices.first) / 2**20:,.0f} MiB"
    )
    if loop.reading is not None and best.meta.scores and loop.meta.scores:
        yield compass.verdict(
            loop.reading,
            best=best.iteration,
            best_bits_per_byte=best.meta.scores[ALL]["bits_per_byte"],
            done=loop.meta.iteration,
            bits_per_byte=loop.meta.scores[ALL]["bits_per_byte"],
            dropout=run.shape.dropout,
        )
    name = shlex.quote(f"{run.config.out_dir}/best")
    yield f"talk to it: gothic-chat --checkpoint {name} --interactive"


class Loop:
    """Owns a run's state while it is trained."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        step: TrainStep,
        tracker: Tracker,
        saver: Saver,
        stop: StopSignal,
    ) -> None:
        self._run = run
        self._state = state
        self.meta = run.meta
        self._step = step
        self._tracker = tracker
        self._saver = saver
        self._stop = stop
        model = (run.shape, run.config.compute_dtype, run.devices.attention, run.devices.divided)
        self._losses = loss_function(*model)
        self._hits = compass.hit_function(*model)
        self.reading: compass.Reading | None = None
        """The compass after the last evaluation, if this process made one."""
        self._sampler = Sampler(run.shape, dtype=decoding_dtype(default_device()))

    def go(self) -> Outcome:
        """Goes through the iterations."""
        run, config = self._run, self._run.config
        if evaluation_pending(config, self.meta):
            self._tracker.pause_clock()
            if outcome := self._pause(self.meta.iteration):
                return outcome
            self._tracker.resume_clock()
        batches = batch_iterator(run.batches, self.meta.iteration)
        windows = _put(run, next(batches))
        unread: tuple[int, Metrics] | None = None
        saved_at = time.monotonic()
        for done in range(self.meta.iteration + 1, config.max_iters + 1):
            self._state, metrics = self._step(self._state, windows)
            # While the device works on this iteration, the host prepares the next one and
            # reads the figures of the one before.
            windows = _put(run, next(batches))
            self._report(unread)
            unread = (done, metrics)
            self._report_failure(self._saver.check)
            minutes = (time.monotonic() - saved_at) / 60
            if (
                evaluation_due(config, done)
                or (config.save_interval and done % config.save_interval == 0)
                or (config.save_minutes and minutes >= config.save_minutes)
                or self._stop.received is not None
            ):
                self._report(unread)
                unread = None
                self._tracker.pause_clock()
                if outcome := self._pause(done):
                    return outcome
                saved_at = time.monotonic()
                self._tracker.resume_clock()
        raise AssertionError("the last iteration's pause ends the run")

    def _report(self, unread: tuple[int, Metrics] | None) -> None:
        """Reports an iteration's figures; raises UserError after too many that were skipped."""
        if unread is None:
            return
        done, metrics = unread
        figures = {name: float(value) for name, value in metrics.items()}
        learned = all(map(math.isfinite, figures.values()))
        in_a_row = 0 if learned else self.meta.skipped_in_a_row + 1
        total = self.meta.skipped + (not learned)
        self.meta = dataclasses.replace(self.meta, skipped=total, skipped_in_a_row=in_a_row)
        self._tracker.iteration(done, figures, skipped=total)
        if in_a_row > self._run.config.max_skipped:
            raise _diverged(
                f"the loss or gradient of {in_a_row} iterations in a row was not finite, up to"
                f" iteration {done}"
            )

    def _pause(self, done: int) -> Outcome | None:
        """Evaluates if that is due, and saves; how the run ends here, if it does."""
        config = self._run.config
        if not all_finite(self._state):
            raise _diverged(f"the weights or moments are no longer finite at iteration {done}")
        self.meta = dataclasses.replace(self.meta, iteration=done, scores=None)
        if evaluation_due(config, done):
            # Left for the resumed run if a signal comes first.
            with contextlib.suppress(Interrupted):
                self._evaluate()
        # What TensorBoard has up to here is on the disk before the checkpoint is.
        self._tracker.flush()
        self._report_failure(self._saver.wait)
        params, optimizer = self._state
        self._saver.save(params, optimizer, self.meta, self._run.start.tokenizer)
        outcome = self._outcome(done)
        if outcome is not None:
            # Raises SaveFailure if this last one cannot be written.
            self._saver.wait()
        if outcome is Outcome.STOPPED:
            self._tracker.say(f"stopped at iteration {done}; `--resume` goes on from here")
        if outcome is Outcome.NO_IMPROVEMENT:
            self._tracker.say(
                f"stopped at iteration {done}: validation has not improved for {config.patience}"
                " evaluations"
            )
        return outcome

    def _outcome(self, done: int) -> Outcome | None:
        config = self._run.config
        if done == config.max_iters and self.meta.scores is not None:
            return Outcome.COMPLETE
        if self._stop.received is not None:
            return Outcome.STOPPED
        if config.patience and self.meta.evaluations_since_best >= config.patience:
            return Outcome.NO_IMPROVEMENT
        return None

    def _report_failure(self, look: Callable[[], None]) -> None:
        """Warns that a save failed; raises SaveFailure where no earlier one is safe."""
        try:
            look()
        except SaveFailure as failure:
            if self._saver.safe is None:
                raise
            self._tracker.say(f"warning: {failure}. The run goes on")

    def _evaluate(self) -> None:
        """Scores the validation text and writes samples. Raises Interrupted, with nothing said."""
        meta = self.meta
        with self._stop.interrupts():
            params = self._state.params
            scores = self._run.evaluator(self._losses, params)
            reading = self._run.compass(self._losses, self._hits, params, scores[ALL].bits_per_byte)
            samples = self._samples()
        loss = scores[ALL].loss
        if not math.isfinite(loss):
            raise _diverged(f"the validation loss is {loss} at iteration {meta.iteration}")
        best = meta.best_val_loss is None or loss < meta.best_val_loss
        self.meta = dataclasses.replace(
            meta,
            scores={voice: score.as_dict() for voice, score in scores.items()},
            best_val_loss=loss if best else meta.best_val_loss,
            evaluations_since_best=0 if best else meta.evaluations_since_best + 1,
        )
        self.reading = reading
        self._tracker.evaluation(meta.iteration, scores, reading, best=best)
        for voice, text in samples.items():
            self._tracker.sample(meta.iteration, voice, text)
            if self._run.index is not None:
                measured = self._run.index.words.measure(text)
                self._tracker.novelty(meta.iteration, voice, measured)

    def _samples(self) -> dict[str, str]:
        """A sample of each voice that is validated, with the same random numbers each time."""
        tokenizer, config = self._run.start.tokenizer, self._run.config
        openers = self._run.evaluator.voices or {ANY: tokenizer.any_voice}
        prompt = np.array(list(openers.values()), np.int32)[:, None]
        chunks = self._sampler.stream(
            self._state.params,
            prompt,
            max_tokens=config.sample_tokens,
            sampling=Sampling(),
            seed=config.seed,
        )
        written = np.concatenate(list(chunks), axis=1)
        end = tokenizer.end_of_text
        return {
            voice: tokenizer.decode(row[: np.argmax(np.append(row, end) == end)])
            for voice, row in zip(openers, written, strict=True)
        }


def _diverged(how: str) -> UserError:
    return UserError(
        f"{how}: the run has diverged; lower --lr, and --resume from the last checkpoint or start"
        " a new run"
    )
