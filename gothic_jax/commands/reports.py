"""What gothic-eval prints: scores, style and novelty of a text, and what a checkpoint is."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from gothic_jax.checkpoints.checkpoint import Checkpoint
from gothic_jax.errors import UserError
from gothic_jax.machine.environment import facts
from gothic_jax.machine.files import sha256
from gothic_jax.measuring import novelty, style
from gothic_jax.measuring.scoring import Evaluator, Score, losses_on
from gothic_jax.text.tokens import encode_text
from gothic_jax.text.typography import fit_prompt
from gothic_jax.text.voices import ALL
from gothic_jax.text.works import PROCESSED, find_text, read_text, split_works

Report = tuple[dict[str, Any], str]
"""For JSON, and as lines."""


def _table(scores: dict[str, Score]) -> str:
    """A table of the scores, one line a voice."""
    lines = [
        f"{'voice':<12}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>11}{'bytes':>11}"
    ]
    lines += [
        f"{name:<12}{score.loss:>9.4f}{score.perplexity:>12.2f}{score.bits_per_byte:>11.4f}"
        f"{score.tokens:>11,}{score.bytes:>11,}"
        for name, score in scores.items()
    ]
    return "\n".join(lines)


def describe(checkpoint: Checkpoint) -> Iterator[str]:
    """The seal, settings, texts and versions of a checkpoint, and which of them differ here.

    Raises UserError where its tokenizer cannot be used.
    """
    meta = checkpoint.meta
    yield f"seal         {checkpoint.seal}"
    if checkpoint.is_foreign:
        yield f"checkpoint   {checkpoint}: a folder of transformers, without a manifest to check by"
        yield f"tokenizer    {checkpoint.tokenizer.sha256}"
        return
    yield f"checkpoint   {checkpoint}: every file is as it was written"
    yield f"config       {sha256(json.dumps(meta.config, sort_keys=True).encode())}"
    yield f"tokenizer    {checkpoint.tokenizer.sha256}"
    for name, digest in (("train_file", meta.train_sha256), ("val_file", meta.val_sha256)):
        path = find_text(meta.config[name], Path(meta.config["data_dir"]))
        # The settings may be a stranger's: no pipe and no device is read for them.
        try:
            if not path.is_file():
                found = f"{path} is not here"
            elif sha256(read_text(path).encode()) == digest:
                found = f"{path} is this text"
            else:
                found = f"DIFFERS: {path} is another text"
        except UserError as error:  # empty, or not text any more
            found = f"DIFFERS: {error}"
        yield f"{name:<13}{digest}  {found}"
    here = facts()
    for name, value in meta.environment.items():
        now = here.get(name, "")
        found = "as here" if value == now else f"DIFFERS: here {now or 'none'}"
        yield f"{name:<17}{value or 'none'}  ({found})"


def novelty_report(checkpoint: Checkpoint, file: Path, train_file: str | None) -> Report:
    """What a text shares word for word with the training works."""
    meta = checkpoint.meta
    index = novelty.load_for(meta.config, meta.train_sha256, train_file)
    text = read_text(file)
    measured = index.words.measure(text)
    report = measured.as_dict() | {"held_out": index.baseline}
    return report, "\n".join(novelty.describe(measured, text, index.baseline))


def _fitted(file: Path, checkpoint: Checkpoint, *, raw: bool) -> str:
    """A text in the typography of the training text, which is said where it is not its own."""
    text = read_text(file)
    meta = checkpoint.meta
    own = sha256(text.encode()) in (meta.train_sha256, meta.val_sha256)
    fitted = text if raw or own else fit_prompt(text, checkpoint.tokenizer.knows)
    if fitted != text:
        print(
            f"{file} is read in the typography of the training text; --raw-text leaves it as it is",
            file=sys.stderr,
        )
    return fitted


def style_report(
    checkpoint: Checkpoint, device: jax.Device, file: Path, *, raw_text: bool
) -> Report:
    """Which voice each sentence of a text leans to."""
    text = _fitted(file, checkpoint, raw=raw_text)
    config = checkpoint.meta.model_config
    losses = losses_on(device, config, checkpoint.meta.config["compute_dtype"])
    params = checkpoint.params(SingleDeviceSharding(device))
    meter = style.Meter(losses, params, checkpoint.tokenizer, config.block_size)
    leans = [lean for work in split_works(text) for lean in meter.sentences(work.text)]
    whole = style.together(leans, f"({len(leans)} sentences)")
    report = {ALL: whole.as_dict(), "sentences": [lean.as_dict() for lean in leans]}
    return report, style.table([*leans, whole])


def score_report(
    checkpoint: Checkpoint,
    device: jax.Device,
    file: str,
    *,
    stride: int | None,
    batch_size: int,
    raw_text: bool,
) -> Report:
    """How well the model predicts a text, in all and by voice."""
    config = checkpoint.meta.model_config
    tokenizer = checkpoint.tokenizer
    path = find_text(file, PROCESSED)
    text = encode_text(path, _fitted(path, checkpoint, raw=raw_text), tokenizer)
    for voice in text.unknown_voices:
        print(
            f"this model has no voice {voice}: its works are scored under <|any|>", file=sys.stderr
        )
    evaluator = Evaluator(
        text.works(),
        tokenizer,
        block_size=config.block_size,
        stride=stride,
        batch_size=batch_size,
    )
    losses = losses_on(device, config, checkpoint.meta.config["compute_dtype"])
    scores = evaluator(losses, checkpoint.params(SingleDeviceSharding(device)))
    figures = {name: score.as_dict() for name, score in scores.items()}
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "file": file}
    report |= figures.pop(ALL) | {"voices": figures}
    return report, f"{file} under {checkpoint}\n{_table(scores)}"
