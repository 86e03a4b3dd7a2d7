"""gothic-train, also `python -m gothic_jax.train`: trains, resumes and fine-tunes a model."""

import argparse
import contextlib
import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gothic_jax import checkpoint
from gothic_jax.attention import Implementation, choose
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
from gothic_jax.dataset import batch_iterator, load_tokens, training_batches
from gothic_jax.device import memory_peak, out_of_memory_told
from gothic_jax.evaluate import ALL, Evaluator, loss_function, token_losses
from gothic_jax.model import (
    GPT,
    Params,
    flops_per_token,
    graph,
    init_params,
    parameter_count,
)
from gothic_jax.optimizer import (
    apply_mean_gradient,
    init_optimizer,
    learning_rate_schedule,
    make_optimizer,
)
from gothic_jax.sampler import Sampler, Sampling, decoding_dtype
from gothic_jax.texts import find_text
from gothic_jax.tokenizer import (
    end_of_text_id,
    fingerprint,
    load_tokenizer,
    token_bytes,
    voices,
)
from gothic_jax.tracking import Tracker, duration


class TrainState(NamedTuple):
    """What training changes. The iteration is the optimizer's `gradient_step`."""

    params: Params
    optimizer: optax.MultiStepsState


Metrics = dict[str, Array]
"""`loss` (nats per token), `gradient_norm` (before clipping) and `learning_rate`."""

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_train_step(config: ConfigDict, attention: Implementation) -> TrainStep:
    """One iteration, not yet jitted: (state, windows [micro, batch, time + 1]) -> new state."""
    shape = model_config(config)
    graphdef = graph(shape, jnp.dtype(config.compute_dtype))
    optimizer = make_optimizer(config)
    schedule = learning_rate_schedule(config)
    micro_steps = config.gradient_accumulation_steps

    def loss(
        params: Params, windows: Int[Array, "batch window"], key: Array | None
    ) -> Float[Array, ""]:
        model: GPT = nnx.merge(graphdef, params)
        logits = model(windows[:, :-1], attention=attention, dropout_key=key)
        return token_losses(logits, windows[:, 1:]).mean()

    def train_step(
        state: TrainState, windows: Int[Array, "micro batch window"]
    ) -> tuple[TrainState, Metrics]:
        iteration = state.optimizer.gradient_step
        # A function of the iteration alone, so that a resumed run drops what it would have.
        key = jax.random.fold_in(jax.random.key(config.seed), iteration)

        def micro_step(
            total: tuple[Array, Params], inputs: tuple[Array, Array]
        ) -> tuple[tuple[Array, Params], None]:
            index, batch = inputs
            dropout_key = jax.random.fold_in(key, index) if shape.dropout else None
            one = jax.value_and_grad(loss)(state.params, batch, dropout_key)
            return jax.tree.map(jnp.add, total, one), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        total, _ = jax.lax.scan(micro_step, zero, (jnp.arange(micro_steps), windows))
        mean_loss, gradient = jax.tree.map(lambda leaf: leaf / micro_steps, total)
        params, optimizer_state = apply_mean_gradient(
            optimizer, micro_steps, gradient, state.optimizer, state.params
        )
        metrics = {
            "loss": mean_loss,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(iteration),
        }
        return TrainState(params, optimizer_state), metrics

    return train_step


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of one axis, `data`, over which each micro-batch is divided."""
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=list(devices)
    )


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
        data_dir = Path(config.data_dir)
        self.train_text = load_tokens(find_text(config.train_file, data_dir), tokenizer)
        val_text = load_tokens(find_text(config.val_file, data_dir), tokenizer)
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
        self.state = jax.device_put(
            TrainState(params, init_optimizer(optimizer, params)), self.everywhere
        )
        if start is not None and resume:
            restored = checkpoint.load_optimizer(start, self.state.optimizer, self.everywhere)
            self.state = TrainState(params, restored)

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
            voice: self.tokenizer.decode(list(row[: (row == end).argmax() or None]))
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
            for line in self._summary(tracker, time.perf_counter() - begin):
                tracker.say(line)
        return 0 if stop.received is None else 128 + stop.received

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
        sampler = Sampler(self.shape, dtype=decoding_dtype(self.device.platform))
        batches = batch_iterator(self.batches, self.meta.iteration)
        windows = self.put(next(batches))
        unread: tuple[int, Metrics] | None = None

        def read() -> None:
            if unread is not None:
                done, metrics = unread
                tracker.iteration(done, {name: float(value) for name, value in metrics.items()})

        for done in range(self.meta.iteration + 1, config.max_iters + 1):
            self.state, metrics = step(self.state, windows)
            # While the device works on this iteration, the host prepares the next one and
            # reads the figures of the one before.
            windows = self.put(next(batches))
            read()
            unread = (done, metrics)
            last = done == config.max_iters
            if not (last or done % config.eval_interval == 0 or stop.received is not None):
                continue
            read()
            unread = None
            tracker.pause_clock()
            self.meta = dataclasses.replace(self.meta, iteration=done)
            evaluated = stop.received is None and self._evaluate(tracker, losses, sampler)
            val_loss = self.meta.scores[ALL]["loss"] if evaluated and self.meta.scores else None
            saver.save(self.state.params, self.state.optimizer, self.meta, self.tokenizer, val_loss)
            tracker.flush()
            if stop.received is not None:
                tracker.say(f"stopped at iteration {done}; `--resume` goes on from here")
                return
            if config.patience and self.meta.evaluations_since_best >= config.patience:
                tracker.say(
                    f"stopped at iteration {done}: validation has not improved for"
                    f" {config.patience} evaluations"
                )
                return
            tracker.resume_clock()

    def _evaluate(self, tracker: Tracker, losses: Any, sampler: Sampler) -> bool:
        """Scores the validation text and writes samples; says that it did."""
        scores = self.evaluator(losses, self.state.params)
        loss = scores[ALL].loss
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
        return True

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
    """Raises UserError, by name, where a resumed run would read other data."""
    for name, setting in (
        ("tokenizer", "tokenizer"),
        ("train", "train_file"),
        ("val", "val_file"),
    ):
        if getattr(old, f"{name}_sha256") != getattr(new, f"{name}_sha256"):
            raise UserError(
                f"{location} was trained with another {setting} than {new.config[setting]};"
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
    if start is not None:
        config = _settings_from(start, config, arguments, overrides)
    validate(config)
    tokenizer = _load_tokenizer(config, arguments, start)
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
    run = Run(config, tokenizer, start=start, resume=arguments.resume)
    if run.meta.iteration >= config.max_iters:
        raise UserError(
            f"{start} has done its {config.max_iters} iterations; give a larger --max-iters"
        )
    # Only now, when nothing can be wrong with the new run any more, the old one goes.
    if held and not arguments.resume:
        for path in [*(str(iteration) for iteration in held), "logs"]:
            shutil.rmtree(Path(config.out_dir) / path, ignore_errors=True)
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
        base.model.update(ConfigDict(meta.config["model"]))
    result = override(base, overrides)
    result.out_dir = config.out_dir
    refuse_other_model(meta, result, start)
    if arguments.resume:
        for name, change in changed(meta.config, result.to_dict()).items():
            print(f"changed since {start}: {name} {change}")
    return result


def _load_tokenizer(
    config: ConfigDict, arguments: argparse.Namespace, start: Location | None
) -> Tokenizer:
    """The tokenizer of the settings; for old weights their own, if none is named."""
    if start is None or arguments.resume:
        return load_tokenizer(Path(config.tokenizer))
    meta = checkpoint.load_meta(start)
    if not hasattr(arguments, "tokenizer"):
        return checkpoint.load_tokenizer_copy(start, meta)
    tokenizer = load_tokenizer(Path(config.tokenizer))
    if fingerprint(tokenizer) != meta.tokenizer_sha256:
        raise UserError(
            f"{start} was trained with another tokenizer than {config.tokenizer}; leave"
            " --tokenizer out to use its own"
        )
    return tokenizer


@command("gothic-train")
def main(argv: Sequence[str]) -> int:
    """Trains a model."""
    run = _prepare(argv)
    print(f"checkpoints and logs: {run.config.out_dir}")
    if run.meta.iteration:
        print(f"resuming at iteration {run.meta.iteration}")
    return run.train(lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
