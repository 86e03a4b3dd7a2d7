"""Released models: what a checkpoint needs to write, small enough to pass on.

A released run's numbered folder has the parameters in bfloat16, as model.safetensors, beside
meta.json, tokenizer.json and manifest.json. It has no optimizer, so that the run cannot be resumed,
and training never writes to its folder.
"""

import dataclasses
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
from safetensors.numpy import save

from gothic_jax.checkpoints.arrays import WEIGHTS
from gothic_jax.checkpoints.checkpoint import (
    META,
    TOKENIZER,
    Checkpoint,
    Meta,
    iterations,
    locate,
)
from gothic_jax.config import get_config
from gothic_jax.errors import UserError
from gothic_jax.machine import manifest
from gothic_jax.text.voices import ALL

GOTHIC_DANDY = Path(__file__).parents[2] / "checkpoints" / "gothic-dandy"
"""The run of the model that comes with a clone of the repository."""


def gothic_dandy() -> Checkpoint:
    """The model that comes with a clone; says so on stderr. Raises UserError where there is none.

    There is none where the package was installed without the repository.
    """
    if not iterations(GOTHIC_DANDY):
        raise UserError(
            "--checkpoint is missing, and the model of the repository is not here; name RUN/best of"
            " a run of gothic-train, or clone the repository and name its checkpoints/gothic-dandy"
        )
    checkpoint = locate(str(GOTHIC_DANDY))
    print(f"no --checkpoint given: {checkpoint} writes", file=sys.stderr)
    return checkpoint


def refuse_released(run: Path) -> None:
    """Raises UserError where a run's folder holds a released model: training leaves it alone."""
    for iteration in iterations(run):
        if (run / str(iteration) / WEIGHTS).is_file():
            raise UserError(
                f"--out-dir {run} holds a released model, without the optimizer that --resume"
                f" needs; start a new run from it: --init-from {run / str(iteration)} --out-dir"
                " checkpoints/NAME"
            )


def release(
    checkpoint: Checkpoint,
    run: Path,
    earlier: Checkpoint | None = None,
    scores: dict[str, dict[str, float]] | None = None,
) -> Path:
    """Writes a released run from a checkpoint, and returns the folder of its one checkpoint.

    With an `earlier` one, from whose weights the checkpoint's own training went on, the weights
    are the mean of both (https://arxiv.org/abs/2203.05482), and `scores` those of the mean, as
    meta.json has them. Settings that name places on this machine get their default values. Raises
    UserError where the run's folder holds checkpoints already, or cannot be written, or the two
    have no mean; it is then as it was.
    """
    if iterations(run):
        raise UserError(f"{run} holds checkpoints already; name another folder")
    folder = run / str(checkpoint.iteration)
    params, meta = checkpoint.named_params(), _without_places(checkpoint)
    if earlier is not None:
        if (earlier.meta.model_config, earlier.meta.tokenizer_sha256) != (
            checkpoint.meta.model_config,
            checkpoint.meta.tokenizer_sha256,
        ):
            raise UserError(f"{earlier} has another shape or tokenizer than {checkpoint}")
        others = earlier.named_params()
        params = {name: (array + others[name]) / 2 for name, array in params.items()}
        best = scores[ALL]["loss"] if scores else None
        meta = dataclasses.replace(meta, scores=scores, best_val_loss=best)
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in params.items()}
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".release-", dir=run) as place:
            new = Path(place) / "new"
            new.mkdir()
            # Written here: the library's own writer makes a file that only its owner can read.
            (new / WEIGHTS).write_bytes(save(arrays))
            (new / TOKENIZER).write_text(checkpoint.tokenizer.to_json(), encoding="utf-8")
            (new / META).write_text(json.dumps(dataclasses.asdict(meta), indent=1))
            with ThreadPoolExecutor(manifest.HASHERS) as pool:
                manifest.write(new, {}, pool)
            new.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def _without_places(checkpoint: Checkpoint) -> Meta:
    defaults = get_config()
    config = checkpoint.meta.config
    places = {name: defaults[name] for name in ("data_dir", "tokenizer", "out_dir")}
    texts = {name: Path(config[name]).name for name in ("train_file", "val_file")}
    return dataclasses.replace(checkpoint.meta, config=config | places | texts)
