"""Checkpoints of a run: their names, what is in them, and how one is opened.

A run's folder has a numbered folder for each iteration that is kept:

    params/, optimizer/   arrays, written by Orbax; in a released model model.safetensors alone
    meta.json             settings, data position, scores, hashes, environment
    tokenizer.json
    manifest.json         size and SHA-256 of all these, written last

`saver.py` writes it under a temporary name and renames it when all of it is on the disk, so a
numbered folder is complete.
"""

import contextlib
import dataclasses
import math
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from gothic_jax.checkpoints.arrays import WEIGHTS, read_orbax, read_safetensors
from gothic_jax.checkpoints.foreign import Foreign, is_foreign, open_foreign
from gothic_jax.config import get_config, saved_config
from gothic_jax.errors import UserError
from gothic_jax.machine import environment, manifest
from gothic_jax.machine.device import put, refuse_beyond_memory, tree_bytes
from gothic_jax.machine.files import UNSOUND, parse_json, read_regular
from gothic_jax.model.gpt import Params, abstract_params
from gothic_jax.model.shape import ModelConfig
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import ALL

META, TOKENIZER = "meta.json", "tokenizer.json"
FIGURES = ("loss", "perplexity", "bits_per_byte")
"""Of a score, those that others read."""
RETRAIN = "try another, or train again"
"""What to do about a checkpoint that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint knows besides arrays; all of it is JSON."""

    iteration: int
    """Iterations done. It is also the index of the next batch."""
    config: dict[str, Any]
    tokenizer_sha256: str
    train_sha256: str
    val_sha256: str
    environment: dict[str, str]
    """As `environment.environment` gives it."""
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    skipped: int = 0
    """Iterations that changed nothing, since their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those up to this iteration without one that learned."""
    scores: dict[str, dict[str, float]] | None = None
    """Of this iteration's evaluation, if it had one: per voice and `all`, by `Score.as_dict`."""

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return ModelConfig(**self.config["model"])

    @property
    def val_loss(self) -> float:
        """Of this iteration's evaluation; infinite if it had none."""
        return math.inf if self.scores is None else self.scores[ALL]["loss"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened: all its files were as they were written."""

    run: Path
    meta: Meta
    seal: str
    """The manifest's own SHA-256, which identifies all of the checkpoint."""
    _tokenizer_json: bytes = dataclasses.field(repr=False)
    _foreign: Foreign | None = dataclasses.field(default=None, repr=False)
    """What it is read from, where that is a folder of another program."""

    @classmethod
    def open(cls, run: Path, iteration: int) -> "Checkpoint":
        """Checks every file of a checkpoint, once. Raises UserError where one is damaged."""
        path = run / str(iteration)
        seal, kept = manifest.verify(path, keep=(META, TOKENIZER))
        with unreadable_reported(path):
            meta = _parse_meta(kept[META], path)
            if meta.iteration != iteration:
                raise ValueError(f"it is of iteration {meta.iteration}")
            return cls(run, meta, seal, kept[TOKENIZER])

    @classmethod
    def of_foreign(cls, folder: Path) -> "Checkpoint":
        """A folder of Hugging Face's transformers as a checkpoint before its first iteration.

        Raises UserError where it is damaged, or its model none of ours.
        """
        foreign = open_foreign(folder)
        config = get_config()
        config.model = ConfigDict(dataclasses.asdict(foreign.shape))
        tokenizer = Tokenizer.parse(
            foreign.tokenizer_json,
            f"{folder}/{TOKENIZER}",
            "take a model with a byte-level BPE, as GPT-2 has",
        )
        unknown = "0" * 64  # nobody says what it was trained on
        meta = Meta(0, config.to_dict(), tokenizer.sha256, unknown, unknown, environment.facts())
        return cls(folder, meta, foreign.seal, foreign.tokenizer_json, foreign)

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.meta.iteration

    @property
    def is_foreign(self) -> bool:
        """Whether it is a folder of another program: nobody says what it was trained on."""
        return self._foreign is not None

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.run if self._foreign else self.run / str(self.iteration)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its own copy of the tokenizer. Raises UserError where that does not fit the model."""
        source = f"the tokenizer of {self}"
        tokenizer = Tokenizer.parse(self._tokenizer_json, source, "try another checkpoint")
        if tokenizer.sha256 != self.meta.tokenizer_sha256:
            raise UserError(f"the tokenizer of {self} is not the one it was saved with")
        if tokenizer.vocab_size != self.meta.model_config.vocab_size:
            raise UserError(f"the tokenizer of {self} has another vocabulary than its model")
        return tokenizer

    def same_tokenizer(self, path: Path) -> Tokenizer:
        """The tokenizer of a file. Raises UserError where the checkpoint was made with another."""
        tokenizer = Tokenizer.load(path)
        if tokenizer.sha256 != self.meta.tokenizer_sha256:
            raise UserError(
                f"{self} was trained with another tokenizer than {path}; give that one, or use the"
                " checkpoint's own: leave --tokenizer out, or move the file away"
            )
        return tokenizer

    def params(self, shardings: Any) -> Params:
        """The parameters, laid out by a sharding, or a tree of one for each. Raises UserError."""
        return self._restore("params", abstract_params(self.meta.model_config), shardings)

    def named_params(self) -> dict[str, np.ndarray]:
        """The parameters in float32 on the host, by their names in the files. Raises UserError."""
        params = self.params(SingleDeviceSharding(jax.devices("cpu")[0]))
        leaves = jax.tree.leaves_with_path(params)
        return {leaf_name(path): np.asarray(leaf) for path, leaf in leaves}

    def optimizer(self, like: Any, shardings: Any) -> Any:
        """The optimizer's state, of the same structure as `like`. Raises UserError."""
        return self._restore("optimizer", like, shardings)

    def _restore(self, item: str, like: Any, shardings: Any) -> Any:
        refuse_beyond_memory(
            next(iter(jax.tree.leaves(shardings)[0].addressable_devices)),
            tree_bytes(like),
            f"{self}/{item}",
        )
        wanted = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(like)}
        cure = "save it again with save_pretrained" if self._foreign else RETRAIN
        with unreadable_reported(self.path, cure):
            if self._foreign is not None:
                arrays = self._foreign.params(wanted)
            elif item == "params" and (self.path / WEIGHTS).is_file():
                arrays = read_safetensors(self.path, wanted)
            else:
                arrays = read_orbax((self.path / item).resolve(), wanted)
        tree = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
        return put(tree, shardings)


def iterations(run: Path) -> list[int]:
    """The iterations that a run's folder has checkpoints of, complete or damaged, in order."""
    try:
        if not run.is_dir():
            return []
    except OSError as error:  # no permission, or too long a name
        raise UserError(f"{run} cannot be read: {error.strerror}") from error
    # Any folder may have a number for a name; ours have these files, or have lost one of them.
    marks = [*run.glob(f"*/{manifest.NAME}"), *run.glob(f"*/{META}")]
    names = {mark.parent.name for mark in marks}
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))


def first_whole(run: Path, candidates: Iterable[int]) -> Checkpoint:
    """The first of these iterations whose checkpoint is as it was written.

    Reports on stderr which ones before it are damaged. Raises UserError where all are.
    """
    damage = []
    for iteration in candidates:
        try:
            checkpoint = Checkpoint.open(run, iteration)
        except UserError as error:
            damage.append(str(error))
        else:
            for line in damage:
                print(f"warning: {line}; going back to {checkpoint}", file=sys.stderr)
            return checkpoint
    raise no_whole_one(run, damage)


def no_whole_one(run: Path, damage: Iterable[str]) -> UserError:
    """What to raise where every checkpoint of a run is damaged, in these ways."""
    return UserError(
        f"{run} has no undamaged checkpoint: {'; '.join(damage)}. Put a copy back in its place, or"
        " train again in another --out-dir"
    )


def locate(name: str, *, exact: bool = False) -> Checkpoint:
    """The checkpoint of a name: RUN/best, RUN/latest, RUN (its best), or RUN/ITERATION, opened.

    A folder of Hugging Face's transformers is one, too.

    Where it is damaged, that is reported on stderr and the next best one, or the one before the
    latest, takes its place; but one that was asked for by its iteration is refused, and with
    `exact` any. Raises UserError where there is none.
    """
    path = Path(name)
    run, which = path, "best"
    if not iterations(path) and (path.name in ("best", "latest") or path.name.isdecimal()):
        run, which = path.parent, path.name
    held = iterations(run)
    if not held and is_foreign(path):
        return Checkpoint.of_foreign(path)
    if not held:
        raise UserError(f"there is no checkpoint at {name}; `gothic-train` makes one")
    if which.isdecimal():
        if int(which) not in held:
            raise UserError(f"{run} holds iterations {', '.join(map(str, held))}, not {which}")
        candidates = [int(which)]
    elif which == "latest":
        candidates = sorted(held, reverse=True)
    else:
        candidates = sorted(held, key=lambda n: (_stated_val_loss(run / str(n)), -n))
    return first_whole(run, candidates[:1] if exact else candidates)


def _stated_val_loss(path: Path) -> float:
    """For an order only: nothing has been checked yet."""
    with contextlib.suppress(OSError, UserError, *UNSOUND):
        return _parse_meta(read_regular(path / META), path).val_loss
    return -math.inf  # its damage is reported first


@contextlib.contextmanager
def unreadable_reported(path: Path, cure: str = RETRAIN) -> Iterator[None]:
    """Turns what reading an unsound checkpoint may raise into a UserError that names it."""
    try:
        yield
    except (OSError, *UNSOUND) as error:
        reason = textwrap.shorten(str(error), 160)
        raise UserError(f"the checkpoint {path} cannot be read; {cure} ({reason})") from error


def _parse_meta(content: bytes, path: Path) -> Meta:
    """A Meta from JSON of any origin; raises UserError or one of UNSOUND."""
    value = parse_json(content)
    hints = get_type_hints(Meta)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        raise ValueError(f"its {META} is not as this version writes it")
    for name, hint in hints.items():
        if not _is_of(value[name], hint):
            raise ValueError(f"its {name} is {value[name]!r}")
    for name in ("tokenizer_sha256", "train_sha256", "val_sha256"):
        if not re.fullmatch("[0-9a-f]{64}", value[name]):
            raise ValueError(f"its {name} is not a SHA-256")
    if (scores := value["scores"]) is not None:
        figures = [score[name] for score in scores.values() for name in FIGURES]
        if ALL not in scores or not all(isinstance(figure, float | int) for figure in figures):
            raise ValueError("its scores are not numbers")
    if not all(isinstance(fact, str) for fact in value["environment"].values()):
        raise ValueError("its environment is not a list of facts")
    try:
        config = saved_config(value["config"]).to_dict()
    except UserError as error:
        raise UserError(f"the checkpoint {path} cannot be used: {error}") from error
    return Meta(**value | {"config": config})


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; what containers hold is not looked at."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, part) for part in get_args(hint))
    return type(value) in ((int, float) if hint is float else (get_origin(hint) or hint,))


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's name as Orbax gives it: inner_opt_state.1.0.mu.embedding."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
