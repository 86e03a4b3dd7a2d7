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
from typing import Any

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
from gothic_jax.model.gpt import Params, flops_per_token, parameter_count
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
    """Trains to the end, until validation no longer improves, or to a signal at any process.

    Returns the exit code: 0, or 128 + the signal's number.
    """
    config, out_dir = run.config, Path(run.config.out_dir)
    params = run.first_state.params
    say(f"model: {run.shape.architecture}, {parameter_count(params):,} parameters")
    for line in run.describe():
        say(line)
    with contextlib.ExitStack() as stack:
        stack.enter_context(out_of_memory_reported(run.memory_cure))
        if not config.compile and run.team.count > 1:
            raise UserError("--no-compile is for a run of one process; leave it out")
        state, step, how = _begun(run)
        say(how)
        if not config.compile:
            stack.enter_context(jax.disable_jit())
        # From here on there is something to save.
        stop = stack.enter_context(StopSignal().watched())
        if not run.start.whole and run.team.is_first:
            # The old run is deleted now that the new one is sure to begin.
            delete_checkpoints(out_dir)
            delete_logs(out_dir)
        saver = Saver(out_dir, run.start.whole, run.team)
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
                silent=not run.team.is_first,
            )
        )
        begin = time.perf_counter()
        loop = Loop(run, state, step, tracker, saver, stop)
        outcome = loop.go()
        saver.close()
        tracker.stop_bar()
        if outcome is Outcome.STOPPED:
            return 128 + loop.signal
        if not run.team.is_first:
            return 0
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
    config, devices = run.config, run.devices
    batch = (config.gradient_accumulation_steps, config.batch_size, run.shape.block_size + 1)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        run.first_state,
        devices.layout(run.first_state),
    )
    windows = jax.ShapeDtypeStruct(batch, np.int32, sharding=devices.micro_batches)
    # What is divided stays so; otherwise the compiler finds by itself that all is copied.
    layout = (devices.layout(run.first_state), None) if devices.sharded else None
    program = jax.jit(step, donate_argnums=0, out_shardings=layout).lower(state, windows).compile()
    how = f"compiled in {time.perf_counter() - begin:.1f} s"
    if analysis := program.memory_analysis():
        estimate = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        count = jax.local_device_count()  # on a CPU, all share one memory
        refuse_beyond_memory(run.devices.first, count * estimate, "an iteration", run.memory_cure)
        how += f"; estimated memory {estimate / 2**20:,.0f} MiB a device"
    return program, how


def _put(run: Run, windows: Int[np.ndarray, "micro batch window"]) -> Array:
    """A process's windows on its devices: each micro-batch is divided over those of all."""
    if run.team.count == 1:
        return jax.device_put(windows, run.devices.micro_batches)
    return jax.make_array_from_process_local_data(run.devices.micro_batches, windows)


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
        self.signal = 0
        """The one that stopped the run, if one did."""
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
            late = config.save_minutes and minutes >= config.save_minutes
            # A signal at any process stops all, and all save by the clock of the first that is
            # late; they do so at the same iteration.
            stopped, late = run.team.told(self._stop.received or 0, bool(late))
            if (
                evaluation_due(config, done)
                or (config.save_interval and done % config.save_interval == 0)
                or late
                or stopped
            ):
                self._report(unread)
                unread = None
                self._tracker.pause_clock()
                if outcome := self._pause(done):
                    return outcome
                saved_at = time.monotonic()
                run.team.settle()
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
        (self.signal,) = self._run.team.agree(self._stop.received or 0)
        if self.signal:
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
        meta, run = self.meta, self._run
        with self._stop.interrupts() if run.team.count == 1 else contextlib.nullcontext():
            params = self._state.params
            scores = run.evaluator(self._unless_stopped(self._losses), params)
            reading = run.compass(
                self._unless_stopped(self._losses),
                self._unless_stopped(self._hits),
                params,
                scores[ALL].bits_per_byte,
            )
            own = run.team.own(params)
            samples = self._samples(own) if run.team.is_first else {}
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

    def _unless_stopped(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """The function; with several processes it raises Interrupted in all at the same batch,
        once one of them has had a signal."""
        team = self._run.team
        if team.count == 1:
            return function

        def checked(*arguments: Any) -> Array:
            if any(team.agree(self._stop.received or 0)):
                raise Interrupted
            return function(*arguments)

        return checked

    def _samples(self, params: Params) -> dict[str, str]:
        """A sample of each voice that is validated, with the same random numbers each time."""
        tokenizer, config = self._run.start.tokenizer, self._run.config
        openers = self._run.evaluator.voices or {ANY: tokenizer.any_voice}
        prompt = np.array(list(openers.values()), np.int32)[:, None]
        chunks = self._sampler.stream(
            params,
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
