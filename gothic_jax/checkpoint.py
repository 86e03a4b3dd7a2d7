"""Orbax checkpoints of a run: the latest and the best, and the names that lead to them.

A run's folder holds one numbered folder for each kept iteration, with four items: `params`,
`optimizer`, `meta` (settings, data position, scores, hashes) and `tokenizer`.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from tokenizers import Tokenizer

from gothic_jax.cli import UserError
from gothic_jax.model import ModelConfig, Params, abstract_params
from gothic_jax.tokenizer import fingerprint, load_tokenizer, parse_tokenizer

# Orbax tells of every save and restore at warning level.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint knows besides arrays; all of it is JSON."""

    iteration: int
    """Iterations done. It is also the index of the next batch."""
    config: dict[str, Any]
    tokenizer_sha256: str
    train_sha256: str
    val_sha256: str
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    scores: dict[str, dict[str, float]] | None = None
    """Of the latest evaluation: per voice and `all`, as `Score.as_dict` gives them."""

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return ModelConfig(**self.config["model"])


@dataclasses.dataclass(frozen=True)
class Location:
    """One checkpoint: a run's folder and the iteration within it."""

    run: Path
    iteration: int

    def __str__(self) -> str:
        return str(self.run / str(self.iteration))


def _val_loss(metrics: dict[str, float]) -> float:
    loss = metrics["val_loss"]
    return math.inf if math.isnan(loss) else loss  # NaN compares as neither better nor worse


def _manager(run: Path, *, read_only: bool) -> ocp.CheckpointManager:
    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(1),
            policies.BestN(
                get_metric_fn=_val_loss,
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=_val_loss,
        best_mode="min",
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
    )
    return ocp.CheckpointManager(run.resolve(), options=options)


class Saver:
    """Writes a run's checkpoints in the background; close() waits for the last."""

    def __init__(self, run: Path) -> None:
        # Orbax takes any folder with a number for a name for a step, and may delete it.
        strangers = {int(path.name) for path in run.glob("*/") if path.name.isdecimal()}
        if strangers := strangers.difference(iterations(run)):
            raise UserError(
                f"--out-dir {run} holds {min(strangers)}/, which is no checkpoint; name another"
            )
        try:
            self._orbax = _manager(run, read_only=False)
        except OSError as error:
            raise UserError(f"--out-dir {run} cannot be written: {error.strerror}") from error

    def save(
        self,
        params: Params,
        optimizer: optax.OptState,
        meta: Meta,
        tokenizer: Tokenizer,
        val_loss: float | None,
    ) -> None:
        """Saves an iteration; `val_loss` is None where it was not evaluated.

        Returns once the arrays are copied to the host; the files are written meanwhile.
        """
        saved = self._orbax.save(
            meta.iteration,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                meta=ocp.args.JsonSave(dataclasses.asdict(meta)),
                tokenizer=ocp.args.JsonSave({"json": tokenizer.to_str()}),
            ),
            metrics=None if val_loss is None else {"val_loss": val_loss},
            force=True,
        )
        if not saved:
            raise RuntimeError(f"Orbax did not save iteration {meta.iteration}")

    def close(self) -> None:
        """Waits until everything is on disk; raises what went wrong on the way."""
        self._orbax.wait_until_finished()
        self._orbax.close()


def iterations(run: Path) -> list[int]:
    """The iterations that a run's folder holds checkpoints of, in order."""
    if not run.is_dir():
        return []
    # Any folder may have a number for a name; Orbax's have this file.
    steps = [path.parent.name for path in run.glob("*/_CHECKPOINT_METADATA")]
    return sorted(int(step) for step in steps if step.isdecimal())


def delete_run(run: Path) -> None:
    """Deletes a run's checkpoints and logs, and nothing else that lies in its folder."""
    try:
        for iteration in iterations(run):
            shutil.rmtree(run / str(iteration))
        if (run / "logs").is_dir():
            shutil.rmtree(run / "logs")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be deleted: {error.strerror}") from error


def locate(name: str) -> Location:
    """The checkpoint of a name: RUN/best, RUN/latest, RUN (its best), or RUN/ITERATION.

    Raises UserError where there is none.
    """
    path = Path(name)
    run, which = path, "best"
    if not iterations(path) and (path.name in ("best", "latest") or path.name.isdecimal()):
        run, which = path.parent, path.name
    held = iterations(run)
    if not held:
        raise UserError(f"there is no checkpoint at {name}; `gothic-train` makes one")
    if which.isdecimal():
        if int(which) not in held:
            raise UserError(f"{run} holds iterations {', '.join(map(str, held))}, not {which}")
        return Location(run, int(which))
    if which == "latest":
        return Location(run, held[-1])
    with _unreadable_told(run), _manager(run, read_only=True) as orbax:
        best = orbax.best_step()
    # A run that was stopped before its first evaluation has no best.
    return Location(run, held[-1] if best is None else best)


@contextlib.contextmanager
def _unreadable_told(what: Location | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = textwrap.shorten(str(error), 160)
        raise UserError(
            f"the checkpoint {what} cannot be read; try another, or train anew ({reason})"
        ) from error


def _restore(location: Location, **items: Any) -> Any:
    with _unreadable_told(location), _manager(location.run, read_only=True) as orbax:
        return orbax.restore(location.iteration, args=ocp.args.Composite(**items))


def load_meta(location: Location) -> Meta:
    """What the checkpoint says of itself; raises UserError where it is damaged."""
    restored = _restore(location, meta=ocp.args.JsonRestore())
    try:
        return Meta(**restored["meta"])
    except TypeError as error:
        raise UserError(f"{location} was written by another version: {error}") from error


def load_same_tokenizer(path: Path, location: Location, meta: Meta) -> Tokenizer:
    """The tokenizer of a file; raises UserError where the checkpoint was trained with another."""
    tokenizer = load_tokenizer(path)
    if fingerprint(tokenizer) != meta.tokenizer_sha256:
        raise UserError(
            f"{location} was trained with another tokenizer than {path}; give that one, or use the"
            " checkpoint's own: leave --tokenizer out, or move the file away"
        )
    return tokenizer


def load_tokenizer_copy(location: Location, meta: Meta) -> Tokenizer:
    """The tokenizer kept in the checkpoint; raises UserError where its hash is not as saved."""
    restored = _restore(location, tokenizer=ocp.args.JsonRestore())
    with _unreadable_told(location):
        content = restored["tokenizer"]["json"]
    tokenizer = parse_tokenizer(content, f"the tokenizer of {location}")
    if fingerprint(tokenizer) != meta.tokenizer_sha256:
        raise UserError(f"the tokenizer of {location} is not the one it was saved with")
    return tokenizer


def _abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def load_params(location: Location, config: ModelConfig, sharding: jax.sharding.Sharding) -> Params:
    """The parameters, laid out by `sharding`."""
    target = _abstract(abstract_params(config), sharding)
    return _restore(location, params=ocp.args.StandardRestore(target))["params"]


def load_optimizer(
    location: Location, like: optax.OptState, sharding: jax.sharding.Sharding
) -> optax.OptState:
    """The optimizer's state, of the same structure as `like`."""
    target = _abstract(like, sharding)
    return _restore(location, optimizer=ocp.args.StandardRestore(target))["optimizer"]
