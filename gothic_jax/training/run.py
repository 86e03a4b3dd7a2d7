"""A run made ready: settings, texts, devices and first state; new, resumed or from old weights."""

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from gothic_jax.checkpoints.checkpoint import Checkpoint, Meta, iterations, locate, no_whole_one
from gothic_jax.checkpoints.release import refuse_released
from gothic_jax.checkpoints.saver import refuse_strangers, set_aside, survey, tidy
from gothic_jax.config import changed, changed_by, saved_config, validate
from gothic_jax.errors import UserError
from gothic_jax.machine import environment
from gothic_jax.machine.device import put, refuse_beyond_memory, tree_bytes
from gothic_jax.machine.processes import ALONE, Team
from gothic_jax.measuring import novelty
from gothic_jax.measuring.compass import Compass
from gothic_jax.measuring.scoring import Evaluator
from gothic_jax.model.attention import Implementation, choose
from gothic_jax.model.gpt import Params, abstract_params, init_params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.tokens import TokenText, cached_tokens, load_tokens
from gothic_jax.text.voices import ANY, parse_weights
from gothic_jax.text.windows import training_batches
from gothic_jax.text.works import find_text, read_text, split_works
from gothic_jax.training.optimizer import init_optimizer, make_optimizer
from gothic_jax.training.step import TrainState, data_mesh, divided


class Request(NamedTuple):
    """What the command line asks for."""

    base: ConfigDict
    """The defaults, changed by a file if one is named."""
    file: str | None
    """That file."""
    overrides: dict[str, Any]
    """Settings that change the base, or a checkpoint's settings."""
    resume: bool = False
    init_from: str | None = None
    """A checkpoint to take the weights from."""
    overwrite: bool = False
    team: Team = ALONE

    @property
    def settings(self) -> ConfigDict:
        """Those of a new run; its `out_dir` is that of any."""
        return changed_by(self.base, self.overrides)


class Start(NamedTuple):
    """What a run starts from."""

    config: ConfigDict
    tokenizer: Tokenizer
    weights: Checkpoint | None = None
    """Whose parameters it starts with; None for new ones."""
    whole: tuple[Checkpoint, ...] = ()
    """If it is resumed, the undamaged checkpoints of its folder; `weights` is the last one."""


class Devices(NamedTuple):
    """What a run computes on."""

    first: jax.Device
    """Of this process."""
    mesh: Mesh
    everywhere: NamedSharding
    """A copy on each device."""
    divided: NamedSharding
    """A batch divided over the devices."""
    micro_batches: NamedSharding
    """Several of them, each divided over the devices."""
    attention: Implementation
    attention_reason: str
    sharded: bool
    """Whether parameters and optimizer are divided over the devices, too."""

    def layout(self, tree: Any) -> Any:
        """Where each array of a state, or of a part of one, is to be."""
        if not self.sharded:
            return jax.tree.map(lambda _: self.everywhere, tree)
        return jax.tree.map(lambda leaf: divided(self.mesh, leaf), tree)


FEW_VOICES = 8
"""Of more voices only those with a weight are listed."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run made ready; `loop.train` goes through with it."""

    team: Team
    start: Start
    shape: ModelConfig
    devices: Devices
    train_text: TokenText
    voice_weights: Mapping[str, float] | None
    batches: grain.MapDataset
    evaluator: Evaluator
    compass: Compass
    index: novelty.Loaded | None
    """Finds what samples copy; None where the training text was not indexed."""
    meta: Meta
    """What its next checkpoint begins with."""

    @property
    def config(self) -> ConfigDict:
        """Its settings."""
        return self.start.config

    @property
    def memory_cure(self) -> str:
        """What to change where memory does not suffice; the model only where it is a new one."""
        cure = "halve --batch-size and double --grad-accum, which gives the same result"
        smaller = ", or lower --config.model.block_size, n_layer or n_embd"
        return cure + ("" if self.start.weights else smaller)

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens predicted in one iteration, on average: short works do not fill a window."""
        config, text = self.config, self.train_text
        filled = np.minimum(text.lengths, self.shape.block_size)
        in_window = float(text.shares(self.voice_weights) @ filled)
        return round(config.gradient_accumulation_steps * config.batch_size * in_window)

    def describe(self) -> Iterator[str]:
        """What a person wants to know before the wait."""
        config, text, devices = self.config, self.train_text, self.devices
        left = config.max_iters - self.meta.iteration
        tokens = self.tokens_per_iteration * left
        yield (
            f"data: {text.tokens.size:,} tokens; {left:,}{' more' if self.meta.iteration else ''}"
            f" iterations of {self.tokens_per_iteration:,} are {tokens:,} tokens,"
            f" {tokens / text.tokens.size:.1f} passes"
        )
        shares = text.shares(self.voice_weights)
        read = {voice: shares[np.array(text.voices) == voice].sum() for voice in text.voices}
        if len(read) > 1:
            weights = self.voice_weights or {}
            few = {v: s for v, s in read.items() if v in weights or len(read) <= FEW_VOICES}
            listed = ", ".join(f"{voice} {share:.0%}" for voice, share in sorted(few.items()))
            if others := len(read) - len(few):
                left_over = sum(read.values()) - sum(few.values())
                listed += f"{', ' if few else ''}{others} other voices {left_over:.0%}"
            yield f"voices: {listed} of the windows"
        count, kind = devices.mesh.size, devices.first.device_kind
        name = f"{count} x {kind}" if count > 1 else kind
        if self.team.count > 1:
            name += f" in {self.team.count} processes"
        if devices.sharded:
            name += ", with a part of the state each"
        yield f"device: {name} ({devices.first.platform}), computing in {config.compute_dtype}"
        yield f"attention: {devices.attention} ({devices.attention_reason})"

    @cached_property
    def first_state(self) -> TrainState:
        """The shapes and types of `initial_state`. Raises UserError where it is too large."""
        params = abstract_params(self.shape)
        if not self.devices.sharded:
            # The weights, their two moments and a gradient.
            refuse_beyond_memory(
                self.devices.first, 4 * tree_bytes(params), "this model with its optimizer"
            )
        init = partial(init_optimizer, make_optimizer(self.config))
        return TrainState(params, jax.eval_shape(init, params))

    def initial_state(self) -> TrainState:
        """The state before its first iteration. Raises UserError."""
        if self.devices.sharded:
            return self._initial_parts()
        weights, everywhere = self.start.weights, self.devices.everywhere
        if weights is None:
            params = init_params(self.shape, self.config.seed)
        else:
            params = _with_new_voices(weights.params(everywhere), self.start.tokenizer)
        if weights is not None and self.start.whole:
            optimizer = weights.optimizer(self.first_state.optimizer, everywhere)
        else:
            optimizer = init_optimizer(make_optimizer(self.config), params)
        return cast(TrainState, put(TrainState(params, optimizer), everywhere))

    def _initial_parts(self) -> TrainState:
        """The same, divided over the devices: it may fit into none of them as a whole."""
        weights, layout = self.start.weights, self.devices.layout
        host = jax.local_devices(backend="cpu")[0]
        if weights is None:
            with jax.default_device(host):
                params = init_params(self.shape, self.config.seed)
        else:
            whole = weights.params(SingleDeviceSharding(host))
            params = _with_new_voices(whole, self.start.tokenizer)
        params = put(params, layout(params))
        like = self.first_state.optimizer
        if weights is not None and self.start.whole:
            return TrainState(params, weights.optimizer(like, layout(like)))
        begin = partial(init_optimizer, make_optimizer(self.config))
        return TrainState(params, jax.jit(begin, out_shardings=layout(like))(params))


def _with_new_voices(params: Params, tokenizer: Tokenizer) -> Params:
    """The parameters with a row of the embedding for each new voice: that of no voice."""
    table = params["token_embedding"]
    new = tokenizer.vocab_size - len(table)
    if not new:
        return params
    rows = jnp.repeat(table[tokenizer.any_voice][None], new, axis=0)
    return params | {"token_embedding": jnp.concatenate([table, rows])}


def prepare(request: Request) -> Run:
    """From what was asked for to a run that is ready to go. Raises UserError.

    Only for the process that holds the lock of the run's folder, and the others of its run.
    """
    team = request.team
    with team.first_goes_ahead():  # it writes what the others then find as it is
        run = _prepared(request)
    ready = (run.config.to_json(), run.meta, run.start.weights and run.start.weights.seal)
    if not team.same(repr(ready)):
        raise UserError(
            "the processes were started with different settings, texts or checkpoints; give all"
            " the same options, and files that all of them can read"
        )
    return run


def _prepared(request: Request) -> Run:
    out_dir = Path(request.settings.out_dir)
    refuse_released(out_dir)
    if request.team.is_first:
        tidy(out_dir)
    refuse_strangers(out_dir)
    start = _start(request, out_dir)
    train_path = find_text(start.config.train_file, Path(start.config.data_dir))
    text = read_text(train_path)
    if start.weights and not start.whole:
        start = _knowing_voices(start, text)
    config, tokenizer = start.config, start.tokenizer
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model"
            f" {config.model.vocab_size}; give --config.model.vocab_size={tokenizer.vocab_size}, or"
            f" train a tokenizer with `gothic-tokenize --vocab-size {config.model.vocab_size}`"
        )
    held = iterations(out_dir)
    if held and not request.resume and not request.overwrite:
        raise UserError(
            f"--out-dir {out_dir} already holds a run ({held[-1]} iterations): --resume goes on"
            " with it, --overwrite deletes it, another --out-dir keeps both"
        )
    run = _made_ready(start, cached_tokens(train_path, text, tokenizer), train_path, request.team)
    _refuse_if_ended(run)
    return run


def evaluation_due(config: ConfigDict, done: int) -> bool:
    """Whether the model is to be evaluated after so many iterations."""
    return done == config.max_iters or done % config.eval_interval == 0


def evaluation_pending(config: ConfigDict, meta: Meta) -> bool:
    """Whether the run was stopped before or within the evaluation of its last iteration."""
    return meta.iteration > 0 and meta.scores is None and evaluation_due(config, meta.iteration)


def _start(request: Request, out_dir: Path) -> Start:
    """A new run has the settings asked for, a resumed one its checkpoint's unless a file names
    others, one from old weights at least their model; overrides change any of these."""
    weights: Checkpoint | None = None
    whole: tuple[Checkpoint, ...] = ()
    if request.resume:
        whole = _undamaged(out_dir)
        weights = whole[-1]
        base = request.base if request.file else saved_config(weights.meta.config)
    elif request.init_from:
        weights = locate(request.init_from)
        if weights.run.resolve() == out_dir.resolve():
            raise UserError(f"--out-dir {out_dir} holds the checkpoint to start from; name another")
        base = ConfigDict(request.base.to_dict())
        base.model.update(ConfigDict(weights.meta.config["model"]))
        if request.file:
            base.model.dropout = request.base.model.dropout  # the only part that may change
    else:
        base = request.base
    config = changed_by(base, request.overrides)
    config.out_dir = str(out_dir)
    if weights is not None:
        _refuse_other_model(weights, config)
        if "tokenizer" in request.overrides:
            weights.same_tokenizer(Path(config.tokenizer))
    if whole:
        for name, change in changed(whole[-1].meta.config, config.to_dict()).items():
            print(f"changed since {whole[-1]}: {name} {change}")
    validate(config)
    tokenizer = weights.tokenizer if weights else Tokenizer.load(Path(config.tokenizer))
    return Start(config, tokenizer, weights, whole)


def _knowing_voices(start: Start, text: str) -> Start:
    """The start with a token for each voice of the training text."""
    named = {work.voice for work in split_works(text)} - {""}
    new = sorted(named - start.tokenizer.openers.keys())
    if not new:
        return start
    tokenizer = start.tokenizer.with_voices(new)
    start.config.model.vocab_size = tokenizer.vocab_size
    print(f"new voices: {', '.join(new)}; each begins as <|{ANY}|>")
    return start._replace(tokenizer=tokenizer)


def _undamaged(out_dir: Path) -> tuple[Checkpoint, ...]:
    """The undamaged checkpoints of a run to resume; warns of each of the others."""
    whole, damaged = survey(out_dir)
    if not whole and not damaged:
        raise UserError(
            f"--out-dir {out_dir} holds no checkpoint to resume; leave --resume out to start there"
        )
    if not whole:
        raise no_whole_one(out_dir, damaged.values())
    for iteration, damage in damaged.items():
        kept = f"it will be moved to {set_aside(out_dir, iteration)}"
        back = f"; going back to {whole[-1]}" if iteration > whole[-1].iteration else ""
        print(f"warning: {damage}; {kept}{back}", file=sys.stderr)
    return tuple(whole)


def _refuse_other_model(weights: Checkpoint, config: ConfigDict) -> None:
    """Raises UserError, by name, where the checkpoint's parameters do not fit the settings."""
    for name, after in config.model.items():
        before = weights.meta.config["model"][name]
        if before != after and name != "dropout":
            raise UserError(
                f"{weights} has model.{name} {before}, this run {after}; leave the setting out to"
                " go on with the checkpoint's model, or train another in another --out-dir"
            )


def _made_ready(start: Start, train_text: TokenText, train_path: Path, team: Team) -> Run:
    config, tokenizer = start.config, start.tokenizer
    shape = ModelConfig(**config.model)
    val_text = load_tokens(find_text(config.val_file, Path(config.data_dir)), tokenizer)
    if unknown := ", ".join(train_text.unknown_voices):
        if start.weights is None:
            command = ["gothic-tokenize", "--files", str(train_path), "--output", config.tokenizer]
            raise UserError(
                f"{train_path} has voices that the tokenizer does not know: {unknown}; train it"
                f" again: `{shlex.join(command)}`"
            )
        print(f"{train_path} is trained under <|{ANY}|> where its voice is {unknown}")
    weights = config.voice_weights
    voice_weights = parse_weights(weights, name="voice_weights") if weights else None
    devices = _devices(config, shape)
    batches = training_batches(
        train_text,
        shape=(config.gradient_accumulation_steps, config.batch_size),
        rows=_rows(devices.divided, config.batch_size),
        block_size=shape.block_size,
        voice_dropout=config.voice_dropout,
        voice_weights=voice_weights,
        seed=config.seed,
    )
    evaluator = Evaluator(
        val_text.works(), tokenizer, block_size=shape.block_size, batch_size=config.batch_size
    )
    compass = Compass(
        train_text, val_text, tokenizer, block_size=shape.block_size, batch_size=config.batch_size
    )
    meta = Meta(
        iteration=0,
        config=config.to_dict(),
        tokenizer_sha256=tokenizer.sha256,
        train_sha256=train_text.sha256,
        val_sha256=val_text.sha256,
        environment=environment.facts(),
    )
    try:
        index = novelty.load(train_path, train_text.sha256)
    except UserError as error:
        index = None
        print(f"TensorBoard will not show what samples copy: {error}")
    if start.whole:
        meta = _resumed(start, meta)
    return Run(
        team, start, shape, devices, train_text, voice_weights, batches, evaluator, compass, index,
        meta,
    )  # fmt: skip


def _devices(config: ConfigDict, shape: ModelConfig) -> Devices:
    devices, first = jax.devices(), jax.local_devices()[0]
    if config.batch_size % len(devices):
        raise UserError(
            f"--batch-size {config.batch_size} cannot be divided over {len(devices)} devices;"
            " make it a multiple of them"
        )
    mesh = data_mesh(devices)
    attention, reason = choose(first, shape.head_dim, jnp.dtype(config.compute_dtype))
    return Devices(
        first,
        mesh,
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
        NamedSharding(mesh, PartitionSpec(None, "data")),
        attention,
        reason,
        config.shard == "fsdp",
    )


def _rows(divided: NamedSharding, batch_size: int) -> slice:
    """The windows of a batch that this process's devices take: they lie side by side."""
    parts = divided.addressable_devices_indices_map((batch_size,)).values()
    ends = [part[0].indices(batch_size) for part in parts if part is not None]
    return slice(min(start for start, *_ in ends), max(stop for _, stop, _ in ends))


def _resumed(start: Start, new: Meta) -> Meta:
    """What a resumed run's next checkpoint begins with; raises UserError for other texts."""
    last = start.whole[-1]
    for name, before, after in (
        ("train_file", last.meta.train_sha256, new.train_sha256),
        ("val_file", last.meta.val_sha256, new.val_sha256),
    ):
        if before != after:
            raise UserError(
                f"{last} was trained with another {name} than {new.config[name]}; give the old one,"
                f" or start a new run from its weights: --init-from {shlex.quote(str(last))}"
            )
    if differences := environment.differences(last.meta.environment, new.environment):
        print(
            f"warning: {last} was written elsewhere ({'; '.join(differences)}): the run goes on,"
            " but may not end bit for bit as it would have there",
            file=sys.stderr,
        )
    meta = dataclasses.replace(last.meta, config=new.config, environment=new.environment)
    best = min(start.whole, key=lambda each: (each.meta.val_loss, -each.iteration)).meta
    if meta.best_val_loss is None or meta.best_val_loss >= best.val_loss:
        return meta
    # The best one so far was damaged or could not be saved: the best is what is there.
    since = range(best.iteration + 1, meta.iteration + 1)
    return dataclasses.replace(
        meta,
        best_val_loss=None if best.scores is None else best.val_loss,
        evaluations_since_best=sum(evaluation_due(start.config, done) for done in since),
    )


def _refuse_if_ended(run: Run) -> None:
    config, meta = run.config, run.meta
    if evaluation_pending(config, meta):
        return
    if config.patience and meta.evaluations_since_best >= config.patience:
        raise UserError(
            f"{run.start.weights} has ended: validation has not improved for"
            f" {meta.evaluations_since_best} evaluations; give a larger --config.patience"
        )
    if meta.iteration >= config.max_iters:
        raise UserError(
            f"{run.start.weights} has done {meta.iteration:,} iterations, and --max-iters is"
            f" {config.max_iters:,}; give a larger one"
        )
