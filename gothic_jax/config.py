"""Every setting of a training run, with its meaning and unit.

`configs/*.py` start from `get_config()` and change what differs; `--config.NAME=VALUE` and the
friendly flags of `gothic-train` change single settings on top.
"""

import dataclasses
import difflib
import runpy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from gothic_jax.errors import UserError
from gothic_jax.model.shape import INTEGER_LIMIT, ModelConfig
from gothic_jax.text.voices import parse_weights
from gothic_jax.text.works import PROCESSED

MAX_FLOAT = 1e38
"""Beyond it a float32 is infinite."""


def get_config() -> ConfigDict:
    """The default run: 35.7M parameters, 6,000 iterations of 64 windows of 384 tokens."""
    config = ConfigDict()

    # Files. A bare text name is looked up in data_dir.
    config.data_dir = str(PROCESSED)
    config.train_file = "mixed_train.txt"
    config.val_file = "mixed_val.txt"
    config.tokenizer = "data/tokenizer.json"
    config.out_dir = "checkpoints"

    # One iteration is one optimizer step, on gradient_accumulation_steps micro-batches of
    # batch_size windows (over all devices together) of model.block_size tokens.
    config.max_iters = 6000
    config.batch_size = 16
    config.gradient_accumulation_steps = 4
    # Share of the windows that open with <|any|> in place of their voice token, so that the
    # model can also write in no voice in particular, against which blends are guided, too: with
    # 0 it never sees that token.
    config.voice_dropout = 0.1
    # How often each voice's works are read, as wilde=1,lovecraft=2,rest=3, where `rest` are all
    # others; "": as much as there is.
    config.voice_weights = ""

    # The optimizer: adamw, or muon, which is Muon for the kernels and AdamW for all else. Linear
    # warmup to learning_rate, then cosine to min_lr_ratio of it at max_iters.
    config.optimizer = "adamw"
    config.learning_rate = 3e-4
    config.min_lr_ratio = 0.1
    config.warmup_iters = 500
    config.weight_decay = 0.1  # on matrices only
    config.beta1 = 0.9
    config.beta2 = 0.95
    config.grad_clip = 1.0  # global norm

    # Every eval_interval iterations: whole-file validation, a sample, a checkpoint.
    config.eval_interval = 250
    # Checkpoints besides: a killed run loses no more than what came after its last one.
    config.save_interval = 0  # iterations between two; 0: only the evaluations'
    config.save_minutes = 10.0  # minutes between two at most; 0: not by the clock
    config.max_skipped = 10  # so many iterations in a row may be not finite; one more stops
    config.patience = 0  # stop after so many evaluations without a better one; 0: never
    config.sample_tokens = 100  # length of TensorBoard's sample of each validated voice
    config.log_interval = 10  # iterations between two points in TensorBoard, two plain lines

    config.seed = 0
    config.compute_dtype = "bfloat16"  # or float32; parameters, softmax and loss are float32
    config.compile = True  # False: op by op, to debug
    # none: each device has a copy of parameters and optimizer; fsdp: each has a part of them, for
    # models that do not fit. The result is the same.
    config.shard = "none"
    # Of a run of several processes, one a host: HOST:PORT,COUNT,INDEX, where HOST is that of the
    # process with INDEX 0; "": as the environment says (srun, mpirun, JAX's variables); off: no.
    # No checkpoint keeps it.
    config.distributed = ""

    config.model = ConfigDict(dataclasses.asdict(ModelConfig()))
    return config


def load_config(path: str) -> ConfigDict:
    """The defaults, changed by what the `get_config()` of a Python file gives.

    Raises UserError.
    """
    if not Path(path).is_file():
        raise UserError(f"--config={path}: there is no such file; the repository has configs/*.py")
    try:
        given = runpy.run_path(path)["get_config"]()
        config = get_config()
        if isinstance(given, ConfigDict):
            config.update(given)
    # Whatever goes wrong in a person's own file is theirs to mend.
    except Exception as error:
        raise UserError(f"--config={path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(given, ConfigDict):
        raise UserError(f"--config={path}: its get_config() must return a ConfigDict")
    unknown = flatten(config.to_dict()).keys() - flatten(get_config().to_dict()).keys()
    if unknown:
        raise UserError(f"--config={path} has unknown settings: {', '.join(sorted(unknown))}")
    return config


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that `--config.NAME=VALUE` arguments give, by dotted name.

    Raises UserError for an unknown or ill-typed setting, and for any other argument.
    """
    known = flatten(get_config().to_dict())
    given = []
    for before, argument in pairwise(["", *arguments]):
        is_value = before.startswith("--config.") and "=" not in before
        if argument.startswith("-") and not argument.startswith("--config.") and not is_value:
            raise UserError(f"unknown option {argument}; `gothic-train --help` lists the options")
        if not argument.startswith("--config.") or is_value:
            continue
        name = argument.removeprefix("--config.").partition("=")[0]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"did you mean {near[0]}?" if near else f"settings: {', '.join(known)}"
            raise UserError(f"unknown setting {name}; {cure}")
        given.append(name)
    parsed = get_config()
    argv = ["gothic-train", *arguments]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", parsed, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"ill-typed setting: {error}") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; settings are --config.NAME=VALUE")
    flat = flatten(parsed.to_dict())
    return {name: flat[name] for name in given}


def changed_by(config: ConfigDict, settings: dict[str, Any]) -> ConfigDict:
    """A copy of `config` with some settings, by dotted name, in place of its own."""
    result = ConfigDict(config.to_dict())
    result.update_from_flattened_dict(settings)
    return result


def saved_config(settings: dict[str, Any]) -> ConfigDict:
    """The settings that a checkpoint holds; those that it does not know have their defaults.

    Raises UserError where they cannot be settings of this version.
    """
    config = get_config()
    if unknown := flatten(settings).keys() - flatten(config.to_dict()).keys():
        raise UserError(f"it was made by another version: there is no setting {min(unknown)}")
    try:
        config.update(ConfigDict(settings))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"it has an ill-typed setting: {error}") from error
    validate(config)
    return config


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings by dotted name: {"model": {"n_layer": 8}} as {"model.n_layer": 8}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{leaf}".rstrip("."): leaf_value for leaf, leaf_value in inner.items()}
    return flat


def changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Settings that differ, by dotted name, as `old -> new`."""
    before, after = flatten(old), flatten(new)
    return {
        name: f"{before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first setting whose value cannot work."""
    positive = (
        "max_iters batch_size gradient_accumulation_steps learning_rate grad_clip eval_interval "
        "log_interval sample_tokens"
    )
    shares = "voice_dropout min_lr_ratio model.dropout"
    flat = flatten(config.to_dict())
    kinds = {name: type(value) for name, value in flatten(get_config().to_dict()).items()}
    for name, value in flat.items():
        if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
            raise UserError(f"{name} must be of type {kinds[name].__name__}, not {value!r}")
        if isinstance(value, float) and not abs(value) < MAX_FLOAT:
            raise UserError(f"{name} must be a finite number below {MAX_FLOAT:g}, not {value}")
        if isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
            raise UserError(f"{name} must be below {INTEGER_LIMIT:,}, and is {value}")
    for name in positive.split():
        if not flat[name] > 0:
            raise UserError(f"{name} must be above 0, and is {flat[name]}")
    not_negative = "warmup_iters weight_decay patience seed save_interval save_minutes max_skipped"
    for name in not_negative.split():
        if flat[name] < 0:
            raise UserError(f"{name} must not be below 0, and is {flat[name]}")
    for name in ("beta1", "beta2", *shares.split()):
        if not 0 <= flat[name] <= 1 or (flat[name] == 1 and name not in shares):
            raise UserError(f"{name} must be between 0 and 1, and is {flat[name]}")
    if config.voice_weights:
        weights = parse_weights(config.voice_weights, name="voice_weights")
        if min(weights.values()) < 0:
            raise UserError(f"voice_weights must not be below 0: {config.voice_weights}")
    if config.optimizer not in ("adamw", "muon"):
        raise UserError(f"optimizer must be adamw or muon, not {config.optimizer}")
    if config.shard not in ("none", "fsdp"):
        raise UserError(f"shard must be none or fsdp, not {config.shard}")
    if config.compute_dtype not in ("bfloat16", "float32"):
        raise UserError(f"compute_dtype must be bfloat16 or float32, not {config.compute_dtype}")
    ModelConfig(**config.model).validate()
