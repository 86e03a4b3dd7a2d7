"""A training run: made ready from settings and texts, gone through with, stopped and resumed."""

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gothic_jax import checkpoint, novelty, seal
from gothic_jax.attention import choose
from gothic_jax.checkpoint import Location, Meta, SaveFailure, Saver
from gothic_jax.config import changed, get_config, model_config, override, validate
from gothic_jax.dataset import batch_iterator, load_tokens, training_batches
from gothic_jax.device import memory_peak, out_of_memory_told, refuse_beyond_memory, tree_bytes
from gothic_jax.errors import UserError
from gothic_jax.model import (
    abstract_params,
    flops_per_token,
    graph,
    init_params,
    parameter_count,
)
from gothic_jax.optimizer import init_optimizer, make_optimizer
from gothic_jax.process import Interrupted, StopSignal
from gothic_jax.sampler import Sampler, Sampling
from gothic_jax.scoring import ALL, Evaluator, loss_function
from gothic_jax.step import Metrics, TrainState, TrainStep, all_finite, data_mesh, make_train_step
from gothic_jax.texts import ANY, find_text, parse_weights
from gothic_jax.tokenizer import (
    any_voice_id,
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    token_bytes,
    voices,
)
from gothic_jax.tracking import Tracker, duration


class Run:
    """A training run made ready: data, model, step; `train()` goes through with it."""

    def __init__(
        self, config: ConfigDict, tokenizer: Tokenizer, *, start: Location | None, resume: bool
    ) -> None:
        """Goes on from `start` with its optimizer and data position if `resume`, else only
        from its weights; without `start`, from new weights. Raises UserError."""
        self.config = config
        self.tokenizer = tokenizer
        self.shape = model_config(config)
        train_path, val_path = (
            find_text(name, Path(config.data_dir)) for name in (config.train_file, config.val_file)
        )
        self.train_text = load_tokens(train_path, tokenizer)
        val_text = load_tokens(val_path, tokenizer)
        if unknown := self.train_text.unknown_voices:
            if start is None:
                raise UserError(
                    f"{train_path} has voices that the tokenizer does not know:"
                    f" {', '.join(unknown)}; train it anew: `gothic-tokenize --files {train_path}"
                    f" --output {config.tokenizer}`"
                )
            print(
                f"the checkpoint has no voice {', '.join(unknown)}: the model will learn these"
                " works as words of no voice"
            )
        self.voice_weights = (
            parse_weights(config.voice_weights, name="voice_weights")
            if config.voice_weights
            else None
        )
        self.batches = training_batches(
            self.train_text,
            shape=(config.gradient_accumulation_steps, config.batch_size),
            block_size=self.shape.block_size,
            voice_dropout=config.voice_dropout,
            voice_weights=self.voice_weights,
            seed=config.seed,
        )
        self.evaluator = Evaluator(
            val_text,
            tokenizer,
            block_size=self.shape.block_size,
            batch_size=config.batch_size,
        )
        self.meta = Meta(
            iteration=0,
            config=config.to_dict(),
            tokenizer_sha256=fingerprint(tokenizer),
            train_sha256=self.train_text.sha256,
            val_sha256=val_text.sha256,
            environment=seal.environment(),
        )
        try:
            self.index: novelty.Loaded | None = novelty.load_for(
                self.meta.config, self.meta.train_sha256
            )
        except UserError as error:
            self.index = None
            print(f"TensorBoard will not show what samples copy: {error}")
        devices = jax.local_devices()
        if config.batch_size % len(devices):
            raise UserError(
                f"--batch-size {config.batch_size} cannot be divided over {len(devices)} devices;"
                " make it a multiple of them"
            )
        self.mesh = data_mesh(devices)
        self.device = devices[0]
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.attention, self.attention_reason = choose(
            self.device, self.shape.n_embd // self.shape.n_head, jnp.dtype(config.compute_dtype)
        )
        if start is not None and resume:
            old = checkpoint.load_meta(start)
            refuse_other_data(old, self.meta, start)
            now = self.meta.environment
            if differences := seal.differences(old.environment, now):
                print(
                    f"warning: {start} was written elsewhere ({'; '.join(differences)}): the run"
                    " goes on, but may not end bit for bit as it would have there",
                    file=sys.stderr,
                )
            self.meta = dataclasses.replace(old, config=config.to_dict(), environment=now)
        # The weights, their two moments and a gradient.
        n_bytes = 4 * tree_bytes(abstract_params(self.shape))
        refuse_beyond_memory(n_bytes, "this model with its optimizer")
        optimizer = make_optimizer(config)
        if start is None:
            params = init_params(self.shape, config.seed)
        else:
            params = checkpoint.load_params(start, self.shape, self.everywhere)
        if start is not None and resume:
            like = jax.eval_shape(partial(init_optimizer, optimizer), params)
            state = TrainState(params, checkpoint.load_optimizer(start, like, self.everywhere))
        else:
            state = TrainState(params, init_optimizer(optimizer, params))
        self.state = jax.device_put(state, self.everywhere)

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens predicted in one iteration, on average: short works fill no window."""
        config, text = self.config, self.train_text
        filled = np.minimum(text.lengths, self.shape.block_size)
        in_window = float(text.shares(self.voice_weights) @ filled)
        return round(config.gradient_accumulation_steps * config.batch_size * in_window)

    def describe(self) -> Iterator[str]:
        """What a person wants to know before the wait."""
        config, text = self.config, self.train_text
        tokens = self.tokens_per_iteration * config.max_iters
        yield (
            f"model: {self.shape.architecture}, {parameter_count(self.state.params):,} parameters"
        )
        yield (
            f"data: {text.tokens.size:,} tokens to learn from; {config.max_iters:,} iterations of"
            f" {self.tokens_per_iteration:,} are {tokens:,} tokens,"
            f" {tokens / text.tokens.size:.1f} passes"
        )
        shares = text.shares(self.voice_weights)
        read = {voice: shares[np.array(text.voices) == voice].sum() for voice in text.voices}
        if len(read) > 1:
            told = ", ".join(f"{voice} {share:.0%}" for voice, share in sorted(read.items()))
            yield f"voices: {told} of the windows"
        count = jax.local_device_count()
        name = f"{count} x {self.device.device_kind}" if count > 1 else self.device.device_kind
        yield f"device: {name} ({self.device.platform}), computing in {config.compute_dtype}"
        yield f"attention: {self.attention} ({self.attention_reason})"

    def compile(self) -> tuple[TrainStep, str]:
        """The training step, compiled, and what that took in time and memory."""
        step = make_train_step(self.config, self.attention)
        if not self.config.compile:
            state_bytes = tree_bytes(self.state)
            return step, (
                f"not compiled: slow, and to debug only. State {state_bytes / 2**20:,.0f} MiB"
            )
        begin = time.perf_counter()
        windows = self.put(self.batches[0])
        with out_of_memory_told(MEMORY_CURE):
            program = jax.jit(step, donate_argnums=0).lower(self.state, windows).compile()
        told = f"compiled in {time.perf_counter() - begin:.1f} s"
        if analysis := program.memory_analysis():
            estimate = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
            if self.device.platform == "cpu":
                count = jax.local_device_count()
                refuse_beyond_memory(count * estimate, "an iteration", MEMORY_CURE)
            told += f"; estimated memory {estimate / 2**20:,.0f} MiB a device"
        return program, told

    def put(self, windows: Int[np.ndarray, "micro batch window"]) -> Array:
        """The windows on the devices, each micro-batch divided over them."""
        return jax.device_put(windows, NamedSharding(self.mesh, PartitionSpec(None, "data")))

    def samples(self, sampler: Sampler) -> dict[str, str]:
        """A sample of each voice, the same random numbers each time."""
        end = end_of_text_id(self.tokenizer)
        openers = voices(self.tokenizer) or {ANY: any_voice_id(self.tokenizer)}
        prompt = np.array(list(openers.values()), np.int32)[:, None]
        chunks = sampler.stream(
            self.state.params,
            prompt,
            max_tokens=self.config.sample_tokens,
            sampling=Sampling(),
            seed=self.config.seed,
        )
        written = np.concatenate(list(chunks), axis=1)
        return {
            voice: self.tokenizer.decode(list(row[: np.argmax(np.append(row, end) == end)]))
            for voice, row in zip(openers, written, strict=True)
        }

    @property
    def evaluation_pending(self) -> bool:
        """Whether the run was stopped before or within the evaluation of its last iteration."""
        done = self.meta.iteration
        return done > 0 and self.meta.scores is None and self.evaluation_due(done)

    def evaluation_due(self, done: int) -> bool:
        """Whether the model is to be evaluated after so many iterations."""
        return done == self.config.max_iters or done % self.config.eval_interval == 0

    def train(self, say: Callable[[str], None]) -> int:
        """Trains to the end, to a stop for lack of improvement, or to a signal.

        Returns the exit code: 0, or 128 + the signal's number.
        """
        for line in self.describe():
            say(line)
        out_dir = Path(self.config.out_dir)
        with contextlib.ExitStack() as stack:
            if not self.config.compile:
                stack.enter_context(jax.disable_jit())
            stack.enter_context(out_of_memory_told(MEMORY_CURE))
            step, how = self.compile()
            say(how)
            # From here on there is something to save.
            stop = stack.enter_context(StopSignal().watched())
            if not self.meta.iteration and checkpoint.iterations(out_dir):
                # The old run goes now that the new one is sure to begin.
                checkpoint.delete_run(out_dir)
            saver = Saver(out_dir, start=self.meta.iteration)
            stack.push(partial(_close, saver))
            bytes_per_token = np.mean(
                np.array([len(token) for token in token_bytes(self.tokenizer)])[
                    self.train_text.tokens
                ]
            )
            flops = flops_per_token(self.shape, self.state.params) * self.tokens_per_iteration
            tracker = stack.enter_context(
                Tracker(
                    self.config,
                    first=self.meta.iteration,
                    tokens_per_iteration=self.tokens_per_iteration,
                    flops_per_iteration=float(flops),
                    bytes_per_token=float(bytes_per_token),
                )
            )
            begin = time.perf_counter()
            finished = Loop(self, step, tracker, saver, stop).go()
            saver.close()
            tracker.stop_bar()
            if finished or stop.received is None:
                for line in self._summary(tracker, time.perf_counter() - begin):
                    tracker.say(line)
        if finished or stop.received is None:
            return 0
        return 128 + stop.received

    def _summary(self, tracker: Tracker, seconds: float) -> Iterator[str]:
        run = Path(self.config.out_dir)
        location = checkpoint.locate(str(run))
        scores = checkpoint.load_meta(location).scores
        if scores is not None:
            for voice, score in scores.items():
                yield (
                    f"best ({location}) {voice}: loss {score['loss']:.4f}"
                    f"  perplexity {score['perplexity']:.2f}"
                    f"  bits/byte {score['bits_per_byte']:.4f}"
                )
        yield (
            f"{duration(seconds)}, {tracker.tokens_per_second:,.0f} tokens/s while training,"
            f" peak memory {memory_peak(self.device) / 2**20:,.0f} MiB"
        )
        yield f"talk to it: gothic-chat --checkpoint {run}/best --interactive"


def _close(saver: Saver, kind: type[BaseException] | None, *_: object) -> None:
    """Closes the saver; where something else went wrong before, that is what is told."""
    try:
        saver.close()
    except SaveFailure as failure:
        if kind is None:
            raise
        print(f"warning: {failure}", file=sys.stderr)


class Loop:
    """Iteration after iteration, with the evaluations and checkpoints between them."""

    def __init__(
        self, run: Run, step: TrainStep, tracker: Tracker, saver: Saver, stop: StopSignal
    ) -> None:
        self._run = run
        self._step = step
        self._tracker = tracker
        self._saver = saver
        self._stop = stop
        self._losses = loss_function(
            graph(run.shape, jnp.dtype(run.config.compute_dtype)),
            run.attention,
            NamedSharding(run.mesh, PartitionSpec("data")),
        )
        self._sampler = Sampler(run.shape)

    def go(self) -> bool:
        """Goes through the iterations; whether the run is finished, not stopped by a signal."""
        run, config = self._run, self._run.config
        if run.evaluation_pending:
            self._tracker.pause_clock()
            if end := self._pause(run.meta.iteration):
                return self._leave(end)
            self._tracker.resume_clock()
        batches = batch_iterator(run.batches, run.meta.iteration)
        windows = run.put(next(batches))
        unread: tuple[int, Metrics] | None = None

        def read() -> None:
            if unread is not None:
                done, metrics = unread
                self._report(done, {name: float(value) for name, value in metrics.items()})

        saved_at = time.monotonic()
        for done in range(run.meta.iteration + 1, config.max_iters + 1):
            run.state, metrics = self._step(run.state, windows)
            # While the device works on this iteration, the host prepares the next one and
            # reads the figures of the one before.
            windows = run.put(next(batches))
            read()
            unread = (done, metrics)
            self._tell_failure(self._saver.check)
            minutes = (time.monotonic() - saved_at) / 60
            if (
                run.evaluation_due(done)
                or (config.save_interval and done % config.save_interval == 0)
                or (config.save_minutes and minutes >= config.save_minutes)
                or self._stop.received is not None
            ):
                read()
                unread = None
                self._tracker.pause_clock()
                if end := self._pause(done):
                    return self._leave(end)
                saved_at = time.monotonic()
                self._tracker.resume_clock()
        return True

    def _report(self, done: int, figures: dict[str, float]) -> None:
        """Tells an iteration's figures; raises UserError after too many that were skipped."""
        run = self._run
        learned = all(map(math.isfinite, figures.values()))
        in_a_row = 0 if learned else run.meta.skipped_in_a_row + 1
        total = run.meta.skipped + (not learned)
        run.meta = dataclasses.replace(run.meta, skipped=total, skipped_in_a_row=in_a_row)
        self._tracker.iteration(done, figures, skipped=total)
        if in_a_row > run.config.max_skipped:
            raise UserError(
                f"the loss or gradient of {in_a_row} iterations in a row was not finite, up to"
                f" iteration {done}: the run has diverged; lower --lr, and --resume from the last"
                " checkpoint or start anew"
            )

    def _pause(self, done: int) -> str | None:
        """Evaluates if that is due, and saves; why the run is to end here, if it is."""
        run = self._run
        if not all_finite(run.state):
            raise UserError(
                f"the weights or moments are not finite any more at iteration {done}: the run has"
                " diverged; lower --lr, and --resume from the last checkpoint or start anew"
            )
        run.meta = dataclasses.replace(run.meta, iteration=done, scores=None)
        if run.evaluation_due(done):
            # Left for the resumed run where a signal comes first.
            with contextlib.suppress(Interrupted):
                self._evaluate()
        # What TensorBoard holds up to here is on the disk before the checkpoint is.
        self._tracker.flush()
        self._tell_failure(self._saver.wait)
        self._saver.save(run.state.params, run.state.optimizer, run.meta, run.tokenizer)
        if done == run.config.max_iters and run.meta.scores is not None:
            return "finished"
        if self._stop.received is not None:
            return f"stopped at iteration {done}; `--resume` goes on from here"
        if run.config.patience and run.meta.evaluations_since_best >= run.config.patience:
            return (
                f"stopped at iteration {done}: validation has not improved for"
                f" {run.config.patience} evaluations"
            )
        return None

    def _leave(self, end: str) -> bool:
        # Raises SaveFailure if this last one is not to be had.
        self._saver.wait()
        if end != "finished":
            self._tracker.say(end)
        return self._stop.received is None or end == "finished"

    def _tell_failure(self, look: Callable[[], None]) -> None:
        """Says that a save failed; raises SaveFailure where no earlier one is safe."""
        try:
            look()
        except SaveFailure as failure:
            if self._saver.safe is None:
                raise
            self._tracker.say(f"warning: {failure}. The run goes on")

    def _evaluate(self) -> None:
        """Scores the validation text and writes samples. Raises Interrupted, with nothing told."""
        run = self._run
        with self._stop.interrupts():
            scores = run.evaluator(self._losses, run.state.params)
            samples = run.samples(self._sampler)
        loss = scores[ALL].loss
        if not math.isfinite(loss):
            raise UserError(
                f"the validation loss is {loss} at iteration {run.meta.iteration}: the run has"
                " diverged; lower --lr, and --resume from the last checkpoint or start anew"
            )
        best = run.meta.best_val_loss is None or loss < run.meta.best_val_loss
        run.meta = dataclasses.replace(
            run.meta,
            scores={voice: score.as_dict() for voice, score in scores.items()},
            best_val_loss=loss if best else run.meta.best_val_loss,
            evaluations_since_best=0 if best else run.meta.evaluations_since_best + 1,
        )
        self._tracker.evaluation(run.meta.iteration, scores, best=best)
        for voice, text in samples.items():
            self._tracker.sample(run.meta.iteration, voice, text)
            if run.index is not None:
                measured = run.index.words.measure(text)
                self._tracker.novelty(run.meta.iteration, voice, measured)


MEMORY_CURE = (
    "halve --batch-size and double --grad-accum, which gives the same result, or shrink the model"
)


def refuse_other_model(old: Meta, new: ConfigDict, location: Location) -> None:
    """Raises UserError, by name, where the checkpoint's parameters do not fit the settings."""
    for name, after in new.model.items():
        before = old.config["model"][name]
        if before != after and name != "dropout":
            raise UserError(
                f"{location} has model.{name} {before}, this run {after}; leave the setting out to"
                " go on with the checkpoint's model, or train another in another --out-dir"
            )


def refuse_other_data(old: Meta, new: Meta, location: Location) -> None:
    """Raises UserError, by name, where a resumed run would read other texts."""
    for name, before, after in (
        ("train_file", old.train_sha256, new.train_sha256),
        ("val_file", old.val_sha256, new.val_sha256),
    ):
        if before != after:
            raise UserError(
                f"{location} was trained with another {name} than {new.config[name]};"
                f" give the old one, or start anew with --init-from {location}"
            )


def prepare(config: ConfigDict, arguments: argparse.Namespace, overrides: Sequence[str]) -> Run:
    """From the command line to a run that is ready to go; raises UserError.

    Only for who holds the lock of `config.out_dir`. `config` is what defaults, file and
    `overrides` make; a checkpoint to start from may bring settings of its own.
    """
    checkpoint.tidy(Path(config.out_dir))
    checkpoint.refuse_strangers(Path(config.out_dir))
    held = checkpoint.iterations(Path(config.out_dir))
    start = None
    if arguments.resume:
        if not held:
            raise UserError(
                f"--out-dir {config.out_dir} holds no checkpoint to resume; leave --resume out"
                " to start there"
            )
        start = checkpoint.latest_whole(Path(config.out_dir))
    elif arguments.init_from:
        start = checkpoint.locate(arguments.init_from)
        if start.run.resolve() == Path(config.out_dir).resolve():
            raise UserError(
                f"--out-dir {config.out_dir} holds the checkpoint to start from; name another"
            )
    if start is not None:
        config = _settings_from(start, config, arguments, overrides)
    validate(config)
    tokenizer = _load_tokenizer(config, overrides, start)
    if tokenizer.get_vocab_size() != config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model"
            f" {config.model.vocab_size}; give"
            f" --config.model.vocab_size={tokenizer.get_vocab_size()}, or train a tokenizer with"
            f" `gothic-tokenize --vocab-size {config.model.vocab_size}`"
        )
    if held and not arguments.resume and not arguments.overwrite:
        raise UserError(
            f"--out-dir {config.out_dir} already holds a run ({held[-1]} iterations): --resume"
            " goes on with it, --overwrite deletes it, another --out-dir keeps both"
        )
    with out_of_memory_told(MEMORY_CURE):
        run = Run(config, tokenizer, start=start, resume=arguments.resume)
    since_best = run.meta.evaluations_since_best
    if config.patience and since_best >= config.patience and not run.evaluation_pending:
        raise UserError(
            f"{start} has ended: validation has not improved for {since_best} evaluations; give a"
            " larger --config.patience"
        )
    if run.meta.iteration >= config.max_iters and not run.evaluation_pending:
        raise UserError(
            f"{start} has done its {config.max_iters} iterations; give a larger --max-iters"
        )
    return run


def _settings_from(
    start: Location, config: ConfigDict, arguments: argparse.Namespace, overrides: Sequence[str]
) -> ConfigDict:
    """The settings of a run that starts from a checkpoint.

    A resumed run has the checkpoint's, unless a file names others; a new run from old weights
    has at least its model. Flags override both.
    """
    meta = checkpoint.load_meta(start)
    base = ConfigDict(config.to_dict())
    if arguments.resume and not arguments.config:
        base = get_config()
        base.update(ConfigDict(meta.config))
    elif arguments.init_from:
        dropout = base.model.dropout
        base.model.update(ConfigDict(meta.config["model"]))
        if arguments.config:
            base.model.dropout = dropout  # the one setting of a model that may change
    result = override(base, overrides)
    result.out_dir = config.out_dir
    refuse_other_model(meta, result, start)
    if arguments.resume:
        for name, change in changed(meta.config, result.to_dict()).items():
            print(f"changed since {start}: {name} {change}")
    return result


def _load_tokenizer(
    config: ConfigDict, overrides: Sequence[str], start: Location | None
) -> Tokenizer:
    """The tokenizer of the settings, which must be that of the old weights if there are any.

    Where the command line names none, old weights bring their own.
    """
    path = Path(config.tokenizer)
    if start is None:
        return load_tokenizer(path)
    meta = checkpoint.load_meta(start)
    if any(setting.startswith("--config.tokenizer") for setting in overrides):
        return checkpoint.load_same_tokenizer(path, start, meta)
    return checkpoint.load_tokenizer_copy(start, meta)
