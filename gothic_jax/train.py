"""gothic-train, also `python -m gothic_jax.train`: trains, resumes and fine-tunes a model."""

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gothic_jax import checkpoint
from gothic_jax.attention import choose
from gothic_jax.checkpoint import Location, Meta
from gothic_jax.cli import ArgumentParser, UserError, command
from gothic_jax.config import (
    changed,
    get_config,
    load_config,
    model_config,
    override,
    validate,
)
from gothic_jax.dataset import (
    batch_iterator,
    load_tokens,
    training_batches,
)
from gothic_jax.device import memory_peak, out_of_memory_told, use_huge_pages
from gothic_jax.evaluate import ALL, Evaluator, LossFunction, loss_function
from gothic_jax.model import (
    flops_per_token,
    graph,
    init_params,
    parameter_count,
)
from gothic_jax.optimizer import (
    init_optimizer,
    make_optimizer,
)
from gothic_jax.sampler import Sampler, Sampling
from gothic_jax.step import Metrics, TrainState, TrainStep, data_mesh, make_train_step
from gothic_jax.texts import find_text
from gothic_jax.tokenizer import (
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    token_bytes,
    voices,
)
from gothic_jax.tracking import Tracker, duration


class StopSignal:
    """Notes SIGINT or SIGTERM, so that the loop can save and leave; a second one leaves at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator["StopSignal"]:
        """Watches for the signals within the block."""
        previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping after this iteration; again to stop at once", file=sys.stderr)


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
        self.batches = training_batches(
            self.train_text,
            shape=(config.gradient_accumulation_steps, config.batch_size),
            block_size=self.shape.block_size,
            voice_dropout=config.voice_dropout,
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
        )
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
            self.meta = dataclasses.replace(old, config=config.to_dict())
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
        """Tokens predicted in one iteration."""
        config = self.config
        return config.gradient_accumulation_steps * config.batch_size * self.shape.block_size

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
        count = jax.local_device_count()
        name = f"{count} x {self.device.device_kind}" if count > 1 else self.device.device_kind
        yield f"device: {name} ({self.device.platform}), computing in {config.compute_dtype}"
        yield f"attention: {self.attention} ({self.attention_reason})"

    def compile(self) -> tuple[TrainStep, str]:
        """The training step, compiled, and what that took in time and memory."""
        step = make_train_step(self.config, self.attention)
        if not self.config.compile:
            state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
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
            told += f"; estimated memory {estimate / 2**20:,.0f} MiB a device"
        return program, told

    def put(self, windows: Int[np.ndarray, "micro batch window"]) -> Array:
        """The windows on the devices, each micro-batch divided over them."""
        return jax.device_put(windows, NamedSharding(self.mesh, PartitionSpec(None, "data")))

    def samples(self, sampler: Sampler) -> dict[str, str]:
        """A sample of each voice, the same random numbers each time."""
        end = end_of_text_id(self.tokenizer)
        openers = voices(self.tokenizer) or {"text": end}
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

    def train(self, say: Callable[[str], None]) -> int:
        """Trains to the end, to a stop for lack of improvement, or to a signal.

        Returns the exit code: 0, or 128 + the signal's number.
        """
        for line in self.describe():
            say(line)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopSignal().watched())
            if not self.config.compile:
                stack.enter_context(jax.disable_jit())
            stack.enter_context(out_of_memory_told(MEMORY_CURE))
            step, how = self.compile()
            say(how)
            if not self.meta.iteration:
                # An old run, if there is one, goes now that the new one is sure to begin.
                checkpoint.delete_run(Path(self.config.out_dir))
            saver = checkpoint.Saver(Path(self.config.out_dir))
            stack.callback(saver.close)
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
            self._loop(step, tracker, saver, stop)
            saver.close()
            tracker.stop_bar()
            for line in self._summary(tracker, time.perf_counter() - begin):
                tracker.say(line)
        if stop.received is None or self.meta.iteration == self.config.max_iters:
            return 0
        return 128 + stop.received

    def _loop(
        self, step: TrainStep, tracker: Tracker, saver: checkpoint.Saver, stop: StopSignal
    ) -> None:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        losses = loss_function(
            graph(self.shape, dtype),
            self.attention,
            NamedSharding(self.mesh, PartitionSpec("data")),
        )
        sampler = Sampler(self.shape)
        batches = batch_iterator(self.batches, self.meta.iteration)
        windows = self.put(next(batches))
        unread: tuple[int, Metrics] | None = None

        def read() -> None:
            if unread is not None:
                done, metrics = unread
                figures = {name: float(value) for name, value in metrics.items()}
                refuse_divergence(done, figures)
                tracker.iteration(done, figures)

        for done in range(self.meta.iteration + 1, config.max_iters + 1):
            self.state, metrics = step(self.state, windows)
            # While the device works on this iteration, the host prepares the next one and
            # reads the figures of the one before.
            windows = self.put(next(batches))
            read()
            unread = (done, metrics)
            last = done == config.max_iters
            evaluation_due = last or done % config.eval_interval == 0
            if not evaluation_due and stop.received is None:
                continue
            read()
            unread = None
            tracker.pause_clock()
            self.meta = dataclasses.replace(self.meta, iteration=done)
            # Also after a signal: a resumed run would not come back to this evaluation.
            val_loss = self._evaluate(tracker, losses, sampler) if evaluation_due else None
            saver.save(self.state.params, self.state.optimizer, self.meta, self.tokenizer, val_loss)
            tracker.flush()
            if stop.received is not None and not last:
                tracker.say(f"stopped at iteration {done}; `--resume` goes on from here")
                return
            if config.patience and self.meta.evaluations_since_best >= config.patience:
                tracker.say(
                    f"stopped at iteration {done}: validation has not improved for"
                    f" {config.patience} evaluations"
                )
                return
            tracker.resume_clock()

    def _evaluate(self, tracker: Tracker, losses: LossFunction, sampler: Sampler) -> float:
        """Scores the validation text and writes samples; the validation loss."""
        scores = self.evaluator(losses, self.state.params)
        loss = scores[ALL].loss
        refuse_divergence(self.meta.iteration, {"validation loss": loss})
        best = self.meta.best_val_loss is None or loss < self.meta.best_val_loss
        self.meta = dataclasses.replace(
            self.meta,
            scores={voice: score.as_dict() for voice, score in scores.items()},
            best_val_loss=loss if best else self.meta.best_val_loss,
            evaluations_since_best=0 if best else self.meta.evaluations_since_best + 1,
        )
        tracker.evaluation(self.meta.iteration, scores, best=best)
        for voice, text in self.samples(sampler).items():
            tracker.sample(self.meta.iteration, voice, text)
        return loss

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


MEMORY_CURE = (
    "halve --batch-size and double --grad-accum, which gives the same result, or shrink the model"
)


def refuse_divergence(done: int, figures: dict[str, float]) -> None:
    """Raises UserError where a figure of iteration `done` is no number any more."""
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name.replace('_', ' ')} is {value} at iteration {done}: the run has diverged;"
                " lower --lr, and --resume from the last checkpoint or start anew"
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


@dataclasses.dataclass(frozen=True)
class _Flag:
    setting: str
    type: Callable[[str], Any]
    help: str


FLAGS = {
    "--data-dir": _Flag("data_dir", str, "where the texts lie"),
    "--train-file": _Flag("train_file", str, "text to learn from"),
    "--val-file": _Flag("val_file", str, "text to validate on"),
    "--tokenizer": _Flag("tokenizer", str, "tokenizer"),
    "--out-dir": _Flag("out_dir", str, "where checkpoints and logs go"),
    "--max-iters": _Flag("max_iters", int, "iterations"),
    "--batch-size": _Flag("batch_size", int, "windows in a micro-batch"),
    "--grad-accum": _Flag("gradient_accumulation_steps", int, "micro-batches in an iteration"),
    "--lr": _Flag("learning_rate", float, "peak learning rate"),
}


def _parser() -> ArgumentParser:
    defaults = get_config()
    parser = ArgumentParser(
        prog="gothic-train",
        description="Train a GPT. Any setting: --config.NAME=VALUE (--config.model.n_layer=6).",
    )
    for name, flag in FLAGS.items():
        parser.add_argument(
            name,
            type=flag.type,
            default=argparse.SUPPRESS,
            dest=flag.setting,
            help=f"{flag.help} (default: {defaults[flag.setting]})",
        )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help=f"--no-compile runs op by op, to debug (default: {defaults.compile})",
    )
    parser.add_argument(
        "--config", metavar="FILE", default=None, help="a file of settings; flags override it"
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume", action="store_true", help="go on from the latest checkpoint in --out-dir"
    )
    begin.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        default=None,
        help="start a new run from a checkpoint's weights (fine-tuning)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the run that --out-dir already holds"
    )
    return parser


def _overrides(arguments: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """The friendly flags as --config.NAME=VALUE, and then those given so."""
    settings = [*(flag.setting for flag in FLAGS.values()), "compile"]
    given = {name: getattr(arguments, name) for name in settings if hasattr(arguments, name)}
    return [*(f"--config.{name}={value}" for name, value in given.items()), *rest]


def _prepare(argv: Sequence[str]) -> Run:
    """From the command line to a run that is ready to go; raises UserError."""
    arguments, rest = _parser().parse_known_args(argv)
    overrides = _overrides(arguments, rest)
    base = load_config(arguments.config) if arguments.config else get_config()
    config = override(base, overrides)
    held = checkpoint.iterations(Path(config.out_dir))
    start = None
    if arguments.resume:
        if not held:
            raise UserError(
                f"--out-dir {config.out_dir} holds no checkpoint to resume; leave --resume out"
                " to start there"
            )
        start = Location(Path(config.out_dir), held[-1])
    elif arguments.init_from:
        start = checkpoint.locate(arguments.init_from)
        if start.run.resolve() == Path(config.out_dir).resolve():
            raise UserError(
                f"--out-dir {config.out_dir} holds the checkpoint to start from; name another"
            )
    if start is not None:
        config = _settings_from(start, config, arguments, overrides)
    validate(config)
    tokenizer = _load_tokenizer(config, arguments, overrides, start)
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
    if run.meta.iteration >= config.max_iters:
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
    config: ConfigDict,
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    start: Location | None,
) -> Tokenizer:
    """The tokenizer of the settings, which must be that of the old weights if there are any.

    Where none is named, old weights bring their own: always to a new run, and to a resumed one
    if its file is gone.
    """
    path = Path(config.tokenizer)
    if start is None:
        return load_tokenizer(path)
    meta = checkpoint.load_meta(start)
    is_named = any(setting.startswith("--config.tokenizer") for setting in overrides)
    if not is_named and (arguments.init_from or not path.exists()):
        return checkpoint.load_tokenizer_copy(start, meta)
    return checkpoint.load_same_tokenizer(path, start, meta)


@command("gothic-train", before=use_huge_pages)
def main(argv: Sequence[str]) -> int:
    """Trains a model."""
    run = _prepare(argv)
    print(f"checkpoints and logs: {run.config.out_dir}")
    if run.meta.iteration:
        print(f"resuming at iteration {run.meta.iteration}")
    return run.train(lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
