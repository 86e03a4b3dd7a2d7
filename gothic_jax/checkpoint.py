"""Checkpoints of a run: what is kept, how it gets onto the disk, and the names that lead to it.

A run's folder holds one numbered folder for each kept iteration:

    params/, optimizer/   arrays, written by Orbax
    meta.json             settings, data position, scores, hashes, environment
    tokenizer.json
    manifest.json         size and SHA-256 of all these, written last

It is made under a temporary name and renamed when all of it is on the disk, so that a numbered
folder is whole. Names that begin with a dot are work in hand; `tidy` clears them away.
"""

import contextlib
import dataclasses
import json
import logging
import math
import operator
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from gothic_jax import manifest
from gothic_jax.config import ModelConfig, saved_config
from gothic_jax.device import refuse_beyond_memory, tree_bytes
from gothic_jax.errors import UserError
from gothic_jax.files import UNSOUND, parse_json, read_regular, sync
from gothic_jax.model import Params, abstract_params
from gothic_jax.tokenizer import fingerprint, load_tokenizer, parse_tokenizer

# Orbax tells of every save and restore at warning level.
logging.getLogger("absl").setLevel(logging.ERROR)

KEPT = 2
"""So many of the latest checkpoints stay, and the best: should one be damaged, one is left."""


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
    """As `seal.environment` gives it."""
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
        return math.inf if self.scores is None else self.scores["all"]["loss"]


@dataclasses.dataclass(frozen=True)
class Location:
    """One checkpoint: a run's folder and the iteration within it."""

    run: Path
    iteration: int

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.run / str(self.iteration)

    def __str__(self) -> str:
        return str(self.path)


def iterations(run: Path) -> list[int]:
    """The iterations that a run's folder holds checkpoints of, whole or damaged, in order."""
    try:
        if not run.is_dir():
            return []
    except OSError as error:  # no permission, or a name beyond all length
        raise UserError(f"{run} cannot be read: {error.strerror}") from error
    # Any folder may have a number for a name; ours have these files, or have lost one of them.
    marks = [*run.glob(f"*/{manifest.NAME}"), *run.glob("*/meta.json")]
    names = {mark.parent.name for mark in marks}
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))


def tidy(run: Path) -> None:
    """Ends what a killed trainer left half done; only for who holds the run's lock."""
    # A person's folder may hold hidden folders of their own.
    ours = re.compile(r"\.([0-9]+(?:\.damaged)?)\.(old|tmp)")
    for path in [*run.glob(".*")]:
        if (name := ours.fullmatch(path.name)) is None or path.is_symlink() or not path.is_dir():
            continue
        if name[2] == "old" and not (run / name[1]).exists():
            path.rename(run / name[1])
        else:
            shutil.rmtree(path)


def refuse_strangers(run: Path) -> None:
    """Raises UserError where a run's folder has a numbered folder that is no checkpoint."""
    strangers = {path.name for path in run.glob("*/") if path.name.isdecimal()}
    if strangers := strangers.difference(map(str, iterations(run))):
        raise UserError(
            f"--out-dir {run} holds {min(strangers)}/, which is no checkpoint; name another"
        )


class SaveFailure(UserError):
    """A checkpoint could not be written; what was there before is as it was."""


class Saver:
    """Writes a run's checkpoints in the background, one at a time.

    Only for who holds the run's lock. `close()` waits for the last one.
    """

    def __init__(self, run: Path, start: int) -> None:
        """`start` is the iteration that the run goes on from.

        Checkpoints of later ones, which only a damaged run has, are set aside.
        """
        held = iterations(run)
        self._run = run
        self._val_losses: dict[int, float] = {}
        for iteration in held:
            if iteration > start:
                _replace(run / str(iteration), run / f"{iteration}.damaged")
                continue
            with contextlib.suppress(UserError):  # it is not safe to rely on, and so not counted
                self._val_losses[iteration] = load_meta(Location(run, iteration)).val_loss
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._save: Future[None] | None = None

    @property
    def safe(self) -> int | None:
        """The latest iteration whose checkpoint is on the disk."""
        return max(self._val_losses, default=None)

    def save(
        self, params: Params, optimizer: optax.OptState, meta: Meta, tokenizer: Tokenizer
    ) -> None:
        """Starts to save an iteration; waits for the save before it, but not for this one.

        The arrays are copied on their device first, so that they may be donated to the next
        step. Raises SaveFailure if the save before failed and was not yet told.
        """
        self.wait()
        # The larger part first: it is hashed while the other one is written.
        arrays = {"optimizer": optimizer, "params": params}
        copies = jax.tree.map(jnp.copy, arrays)
        self._save = self._pool.submit(self._write, copies, meta, tokenizer)

    def wait(self) -> None:
        """Waits until the last save is on the disk; raises SaveFailure if it is not."""
        if self._save is not None:
            save, self._save = self._save, None
            save.result()

    def check(self) -> None:
        """Raises SaveFailure if the last save has ended and failed; does not wait."""
        if self._save is not None and self._save.done():
            self.wait()

    def close(self) -> None:
        """Waits until everything is on disk; raises SaveFailure if it is not."""
        self._pool.shutdown()
        self.wait()

    def _write(self, arrays: dict[str, Any], meta: Meta, tokenizer: Tokenizer) -> None:
        folder = self._run / f".{meta.iteration}.tmp"
        final = self._run / str(meta.iteration)
        try:
            with _disk_errors_raised(), ThreadPoolExecutor(manifest.HASHERS) as hashers:
                folder.mkdir()
                hashed: manifest.Entries = {}
                # Trained numbers are noise: to compress them takes longer than to write them.
                handler = ocp.PyTreeCheckpointHandler(use_compression=False)
                with ocp.Checkpointer(handler) as orbax:
                    for name, tree in arrays.items():
                        orbax.save(folder.resolve() / name, args=ocp.args.PyTreeSave(tree))
                        hashed |= manifest.entries(folder, f"{name}/", hashers)
                (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
                content = json.dumps(dataclasses.asdict(meta), indent=1)
                (folder / "meta.json").write_text(content)
                manifest.write(folder, hashed, hashers)
                _replace(folder, final)
        except BaseException as error:
            _discard(folder)
            if not isinstance(error, OSError):
                raise
            kept = "nothing is saved" if self.safe is None else f"{self._run / str(self.safe)} is"
            raise SaveFailure(
                f"checkpoint {final} cannot be written: {error.strerror}; {kept}"
                f"{'' if self.safe is None else ' safe'}; make room, or mend the disk"
            ) from error
        self._val_losses[meta.iteration] = meta.val_loss
        self._prune()

    def _prune(self) -> None:
        with contextlib.suppress(OSError):
            # What TensorStore may have put there after a failed save was discarded.
            tidy(self._run)
        best = min(sorted(self._val_losses, reverse=True), key=self._val_losses.__getitem__)
        keep = {best, *sorted(self._val_losses)[-KEPT:]}
        for iteration in iterations(self._run):
            if iteration not in keep:
                self._val_losses.pop(iteration, None)
                # Under another name first: no numbered folder is ever half deleted.
                trash = self._run / f".{iteration}.tmp"
                with contextlib.suppress(OSError):  # tried again after the next save
                    (self._run / str(iteration)).rename(trash)
                    shutil.rmtree(trash)


def _discard(folder: Path) -> None:
    """Deletes the folder of a failed save. TensorStore still writes to it for a moment: where one
    array's file fails, those of others are under way."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def _replace(source: Path, target: Path) -> None:
    """Renames a folder, in place of what had the name; `tidy` completes it if it is cut off."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def _disk_errors_raised() -> Iterator[None]:
    """Turns what TensorStore says of a failed system call into the OSError that it was."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def delete_run(run: Path) -> None:
    """Deletes a run's checkpoints and logs, and nothing else that lies in its folder."""
    damaged = [path for path in run.glob("*.damaged") if path.stem.isdecimal()]
    try:
        for path in [*damaged, *(run / str(iteration) for iteration in iterations(run))]:
            # Under another name first: no numbered folder is ever half deleted.
            trash = run / f".{path.name.partition('.')[0]}.tmp"
            path.rename(trash)
            shutil.rmtree(trash)
        for path in (run / "logs").glob("events.out.tfevents.*"):
            path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be deleted: {error.strerror}") from error


def latest_whole(run: Path) -> Location:
    """The latest checkpoint of a run that is as it was written.

    Says on stderr which later ones are damaged, and where. Raises UserError where none is whole.
    """
    return _first_whole(run, sorted(iterations(run), reverse=True))


def _first_whole(run: Path, candidates: list[int]) -> Location:
    damage = []
    for iteration in candidates:
        location = Location(run, iteration)
        try:
            manifest.verify(location.path)
            load_meta(location)
        except UserError as error:
            damage.append(str(error))
        else:
            for line in damage:
                print(f"warning: {line}; going back to {location}", file=sys.stderr)
            return location
    raise UserError(
        f"{run} has no checkpoint that is whole: {'; '.join(damage)}. Put a copy back in its"
        " place, or train anew in another --out-dir"
    )


def locate(name: str, *, exact: bool = False) -> Location:
    """The checkpoint of a name: RUN/best, RUN/latest, RUN (its best), or RUN/ITERATION.

    All its files are checked against its manifest. Where one is damaged, that is said on stderr
    and the next best one, or the one before the latest, takes its place; one that was asked for
    by its iteration is refused, and with `exact` any. Raises UserError where there is none.
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
        return _first_whole(run, [int(which)])
    if which == "latest":
        candidates = sorted(held, reverse=True)
    else:
        candidates = sorted(held, key=lambda n: (_val_loss(run, n), -n))
    return _first_whole(run, candidates[:1] if exact else candidates)


def _val_loss(run: Path, iteration: int) -> float:
    """For an order only: nothing has been checked yet."""
    with contextlib.suppress(UserError):
        return load_meta(Location(run, iteration)).val_loss
    return -math.inf  # its damage is told first


@contextlib.contextmanager
def _unreadable_told(what: Location | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, *UNSOUND) as error:
        reason = textwrap.shorten(str(error), 160)
        raise UserError(
            f"the checkpoint {what} cannot be read; try another, or train anew ({reason})"
        ) from error


def load_meta(location: Location) -> Meta:
    """What the checkpoint says of itself; raises UserError where that cannot be."""
    with _unreadable_told(location):
        if location.path.is_symlink():
            raise OSError(f"{location} is a link")
        content = parse_json(read_regular(location.path / "meta.json"))
        try:
            meta = _checked(content)
        except UserError as error:
            raise UserError(f"the checkpoint {location} cannot be used: {error}") from error
        if meta.iteration != location.iteration:
            raise ValueError(f"it is of iteration {meta.iteration}")
        return meta


_KINDS: dict[str, tuple[type, ...]] = {
    "iteration": (int,),
    "config": (dict,),
    "tokenizer_sha256": (str,),
    "train_sha256": (str,),
    "val_sha256": (str,),
    "environment": (dict,),
    "best_val_loss": (float, int, type(None)),
    "evaluations_since_best": (int,),
    "skipped": (int,),
    "skipped_in_a_row": (int,),
    "scores": (dict, type(None)),
}


def _checked(value: Any) -> Meta:
    """A Meta from JSON of whatever origin; raises ValueError, TypeError or UserError."""
    if not isinstance(value, dict) or value.keys() != _KINDS.keys():
        raise ValueError("its meta.json is not as this version writes it")
    for name, kinds in _KINDS.items():
        if not isinstance(value[name], kinds):
            raise ValueError(f"its {name} is {value[name]!r}")
    for name in ("tokenizer_sha256", "train_sha256", "val_sha256"):
        if not re.fullmatch("[0-9a-f]{64}", value[name]):
            raise ValueError(f"its {name} is no SHA-256")
    if (scores := value["scores"]) is not None:
        figures = [scores["all"]["loss"], *(f for score in scores.values() for f in score.values())]
        if not all(isinstance(figure, float | int) for figure in figures):
            raise ValueError("its scores are no numbers")
    if not all(isinstance(fact, str) for fact in value["environment"].values()):
        raise ValueError("its environment is no list of facts")
    return Meta(**value | {"config": saved_config(value["config"]).to_dict()})


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
    with _unreadable_told(location):
        content = read_regular(location.path / "tokenizer.json")
    tokenizer = parse_tokenizer(content, f"the tokenizer of {location}")
    if fingerprint(tokenizer) != meta.tokenizer_sha256:
        raise UserError(f"the tokenizer of {location} is not the one it was saved with")
    if tokenizer.get_vocab_size() != meta.model_config.vocab_size:
        raise UserError(f"the tokenizer of {location} has another vocabulary than its model")
    return tokenizer


def load_params(location: Location, config: ModelConfig, sharding: jax.sharding.Sharding) -> Params:
    """The parameters, laid out by `sharding`. Raises UserError."""
    return _restore(location, "params", abstract_params(config), sharding)


def load_optimizer(
    location: Location, like: optax.OptState, sharding: jax.sharding.Sharding
) -> optax.OptState:
    """The optimizer's state, of the same structure as `like`. Raises UserError."""
    return _restore(location, "optimizer", like, sharding)


def _restore(location: Location, item: str, like: Any, sharding: jax.sharding.Sharding) -> Any:
    refuse_beyond_memory(tree_bytes(like), f"{location}/{item}")
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
    )
    with (
        _unreadable_told(location),
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax,
    ):
        folder = (location.path / item).resolve()
        _refuse_other_arrays(orbax.metadata(folder), target)
        return orbax.restore(folder, args=ocp.args.StandardRestore(target))


def _refuse_other_arrays(found: Any, target: Any) -> None:
    """Raises ValueError where what is stored has other shapes, or chunks beyond them.

    Reading allocates whole chunks: a small file could ask for any amount of memory.
    """
    stored = {leaf.name: leaf for leaf in jax.tree.leaves(found.item_metadata.tree)}
    wanted = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(target)}
    if stored.keys() != wanted.keys():
        odd = min(stored.keys() ^ wanted.keys())
        raise ValueError(f"{odd} is {'not expected' if odd in stored else 'missing'}")
    for name, leaf in wanted.items():
        there = stored[name]
        chunk = there.storage.chunk_shape
        if (there.shape, there.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} is {there.dtype}{list(there.shape)}")
        if len(chunk) != leaf.ndim or any(map(operator.gt, chunk, leaf.shape)):
            raise ValueError(f"{name} is cut into chunks of {list(chunk)}")


def _name(path: tuple[Any, ...]) -> str:
    """A leaf's name as Orbax gives it: inner_opt_state.1.0.mu.embedding."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
