"""Writes a run's checkpoints, keeps the latest and the best, and puts right what a kill left.

All of this is only for the process that holds the lock of the run's folder. Names that begin with
a dot are work under way; `tidy` clears them away.
"""

import contextlib
import dataclasses
import errno
import glob
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gothic_jax.checkpoints.checkpoint import META, TOKENIZER, Checkpoint, Meta, iterations
from gothic_jax.errors import UserError
from gothic_jax.machine import manifest
from gothic_jax.machine.files import sync
from gothic_jax.machine.processes import ALONE, Team
from gothic_jax.model.gpt import Params
from gothic_jax.text.tokenizer import Tokenizer

# Orbax reports every save as a warning.
logging.getLogger("absl").setLevel(logging.ERROR)

KEPT = 2
"""So many of the latest checkpoints are kept, and the best: should one be damaged, one is left."""


def tidy(run: Path) -> None:
    """Ends what a killed trainer left half done."""
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
    """Raises UserError where a run's folder has a numbered folder that is not a checkpoint."""
    strangers = {path.name for path in run.glob("*/") if path.name.isdecimal()}
    if strangers := strangers.difference(map(str, iterations(run))):
        raise UserError(
            f"--out-dir {run} holds {min(strangers)}/, which is not a checkpoint; name another"
        )


class Survey(NamedTuple):
    """What a run's folder holds."""

    whole: list[Checkpoint]
    """Those that are as they were written, in order."""
    damaged: dict[int, str]
    """What is wrong with each of the others, by iteration."""


def survey(run: Path) -> Survey:
    """Opens every checkpoint of a run, and so reads each of their files."""
    found = Survey([], {})
    for iteration in iterations(run):
        try:
            found.whole.append(Checkpoint.open(run, iteration))
        except UserError as error:
            found.damaged[iteration] = str(error)
    return found


def set_aside(run: Path, iteration: int) -> Path:
    """Where the Saver moves a checkpoint that the run does not go on with."""
    return run / f"{iteration}.damaged"


class SaveFailure(UserError):
    """A checkpoint could not be written; what was there before is as it was."""


class Saver:
    """Writes a run's checkpoints in the background, one at a time.

    `close()` waits for the last one.
    """

    def __init__(self, run: Path, whole: Sequence[Checkpoint], team: Team = ALONE) -> None:
        """`whole` are the checkpoints up to the one that the run goes on from.

        All others in the folder are moved to where `set_aside` says. Of a team, the first
        process writes, and the others have nothing to wait for.
        """
        self._run = run
        self._team = team
        self._val_losses = {each.iteration: each.meta.val_loss for each in whole}
        for iteration in iterations(run) if team.is_first else ():
            if iteration not in self._val_losses:
                _replace(run / str(iteration), set_aside(run, iteration))
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
        step. Raises SaveFailure if the save before failed and that was not yet raised.
        """
        self.wait()
        # The larger part first: it is hashed while the other one is written.
        arrays = {"optimizer": optimizer, "params": params}
        writers: set[int] | None = None
        if self._team.count > 1:
            divided = not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(arrays))
            writers = {*range(self._team.count)} if divided else {0}
            if self._team.index not in writers:
                return
            if not divided:
                arrays = self._team.own(arrays)
        copies = jax.tree.map(jnp.copy, arrays)
        work = self._write if self._team.is_first else self._write_part
        self._save = self._pool.submit(work, copies, meta, tokenizer, writers)

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

    def _write_part(
        self, arrays: dict[str, Any], meta: Meta, _: Tokenizer, writers: set[int] | None
    ) -> None:
        """This process's part of the arrays, while the first one writes the rest."""
        try:
            list(_written(arrays, self._run / f".{meta.iteration}.tmp", writers))
        except Exception as error:  # the first one misses this part, and reports the save
            print(f"warning: a part of a checkpoint is not written: {error}", file=sys.stderr)

    def _write(
        self,
        arrays: dict[str, Any],
        meta: Meta,
        tokenizer: Tokenizer,
        writers: set[int] | None,
    ) -> None:
        folder = self._run / f".{meta.iteration}.tmp"
        final = self._run / str(meta.iteration)
        try:
            with _disk_errors_raised(), ThreadPoolExecutor(manifest.HASHERS) as hashers:
                folder.mkdir()
                hashed: manifest.Entries = {}
                for name in _written(arrays, folder, writers):
                    hashed |= manifest.entries(folder, f"{name}/", hashers)
                (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
                content = json.dumps(dataclasses.asdict(meta), indent=1)
                (folder / META).write_text(content)
                manifest.write(folder, hashed, hashers)
                _replace(folder, final)
        except BaseException as error:
            _discard(folder)
            if not isinstance(error, OSError):
                raise
            kept = "nothing is saved" if self.safe is None else f"{self._run / str(self.safe)} is"
            raise SaveFailure(
                f"checkpoint {final} cannot be written: {error.strerror}; {kept}"
                f"{'' if self.safe is None else ' safe'}; free some space, or repair the disk"
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


def _written(arrays: dict[str, Any], folder: Path, writers: set[int] | None) -> Iterator[str]:
    """Writes each tree of arrays with Orbax, and gives its name as soon as it is written.

    `writers` are the processes that do so together, None where there is only one.
    """
    import orbax.checkpoint as ocp  # a run that begins does not wait for it

    if writers == {0}:
        # Among several processes, Orbax takes an array that only one of them has as NumPy's.
        arrays = jax.tree.map(np.asarray, arrays)
    for name, tree in arrays.items():
        # With `active_processes`, they wait for each other without a collective, which would come
        # between those of the steps that go on meanwhile. Such a wait needs a name of its own.
        together = ocp.options.MultiprocessingOptions(
            active_processes=writers,
            barrier_sync_key_prefix=None if writers is None else f"{folder.name}-{name}",
        )
        # Trained numbers are noise: to compress them takes longer than to write them.
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, multiprocessing_options=together
        )
        with (
            ocp.Checkpointer(handler, multiprocessing_options=together) as orbax,
            _without_patterns(folder) as path,
        ):
            orbax.save(path / name, args=ocp.args.PyTreeSave(tree))
        yield name


@contextlib.contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """An absolute path to `folder` in which no character has a meaning in a pattern.

    Orbax searches for the arrays that it has written by a pattern that begins with their path. In
    a folder `model [v1]` it finds none, and leaves a checkpoint that cannot be read.
    """
    path = folder.resolve()
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "link"
        link.symlink_to(path)
        yield link


def _discard(folder: Path) -> None:
    """Deletes the folder of a failed save. TensorStore still writes to it for a moment: when one
    array's file fails, others are under way."""
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
    """Turns what TensorStore raises for a failed system call into the OSError that it was."""
    try:
        yield
    except OSError:
        raise
    except jax.errors.JaxRuntimeError as error:
        # Orbax waited in vain for another process, whose part is missing.
        raise OSError(errno.EIO, "another process has not written its part") from error
    except Exception as error:
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def delete_checkpoints(run: Path) -> None:
    """Deletes a run's checkpoints, damaged ones too, and nothing else in its folder."""
    damaged = [path for path in run.glob("*.damaged") if path.stem.isdecimal()]
    try:
        for path in [*damaged, *(run / str(iteration) for iteration in iterations(run))]:
            # Under another name first: no numbered folder is ever half deleted.
            trash = run / f".{path.name.partition('.')[0]}.tmp"
            path.rename(trash)
            shutil.rmtree(trash)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be deleted: {error.strerror}") from error
