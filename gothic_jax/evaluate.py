"""gothic-eval: what a checkpoint makes of a text, per voice, and what a checkpoint is."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from gothic_jax import manifest, novelty, style
from gothic_jax.checkpoint import (
    Location,
    Meta,
    load_meta,
    load_params,
    load_tokenizer_copy,
    locate,
)
from gothic_jax.cli import ArgumentParser, command
from gothic_jax.dataset import encode_text
from gothic_jax.device import out_of_memory_told, select_device
from gothic_jax.errors import UserError
from gothic_jax.files import sha256
from gothic_jax.scoring import ALL, Evaluator, Score, losses_on
from gothic_jax.seal import WRITING, differences, environment
from gothic_jax.texts import find_text, read_text, split_works
from gothic_jax.tokenizer import voices


def format_scores(scores: dict[str, Score]) -> str:
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


def describe_seal(location: Location) -> Iterator[str]:
    """What a checkpoint was made of and by, and what of that is otherwise here.

    Raises UserError where the checkpoint is damaged.
    """
    yield f"seal         {manifest.verify(location.path)}"
    meta = load_meta(location)
    load_tokenizer_copy(location, meta)
    yield f"checkpoint   {location}: every file is as it was written"
    yield f"config       {sha256(json.dumps(meta.config, sort_keys=True).encode())}"
    yield f"tokenizer    {meta.tokenizer_sha256}"
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
        except UserError as error:  # empty, or no text any more
            found = f"DIFFERS: {error}"
        yield f"{name:<13}{digest}  {found}"
    here = environment()
    for name, value in meta.environment.items():
        now = here.get(name, "")
        found = "as here" if value == now else f"DIFFERS: here {now or 'none'}"
        yield f"{name:<17}{value or 'none'}  ({found})"


def _novelty_report(meta: Meta, file: Path, *, as_json: bool) -> str:
    index = novelty.load_for(meta.config, meta.train_sha256)
    text = read_text(file)
    measured = index.words.measure(text)
    if as_json:
        return json.dumps(measured.as_dict() | {"held_out": index.baseline})
    return "\n".join(novelty.describe(measured, text, index.baseline))


def _style_report(
    location: Location, meta: Meta, device: jax.Device, file: Path, *, as_json: bool
) -> str:
    text = read_text(file)
    config = meta.model_config
    tokenizer = load_tokenizer_copy(location, meta)
    losses = losses_on(device, config, meta.config["compute_dtype"])
    with out_of_memory_told("measure with --device cpu"):
        params = load_params(location, config, SingleDeviceSharding(device))
        meter = style.Meter(losses, params, tokenizer, voices(tokenizer), config.block_size)
        leans = [lean for work in split_works(text) for lean in meter.sentences(work.text)]
    whole = style.together(leans, f"({len(leans)} sentences)")
    if not as_json:
        return style.table([*leans, whole])
    report = {"all": whole.as_dict()}
    return json.dumps(report | {"sentences": [lean.as_dict() for lean in leans]})


def _score_report(
    location: Location, meta: Meta, device: jax.Device, arguments: argparse.Namespace
) -> str:
    config = meta.model_config
    tokenizer = load_tokenizer_copy(location, meta)
    text = encode_text(find_text(arguments.file, Path("data/processed")), tokenizer)
    for voice in text.unknown_voices:
        print(f"this model has no voice {voice}: scored as no voice's words", file=sys.stderr)
    evaluator = Evaluator(
        text,
        tokenizer,
        block_size=config.block_size,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
    )
    losses = losses_on(device, config, meta.config["compute_dtype"])
    with out_of_memory_told("lower --batch-size"):
        params = load_params(location, config, SingleDeviceSharding(device))
        scores = evaluator(losses, params)
    if not arguments.json:
        return f"{arguments.file} under {location}\n{format_scores(scores)}"
    report: dict[str, Any] = {"checkpoint": str(location), "file": arguments.file}
    report |= scores.pop(ALL).as_dict()
    return json.dumps(report | {"voices": {name: s.as_dict() for name, s in scores.items()}})


@command("gothic-eval")
def main(argv: Sequence[str]) -> None:
    """Scores a text under a checkpoint, or checks the checkpoint itself."""
    parser = ArgumentParser(prog="gothic-eval", description="Score a text under a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="RUN/best, RUN/latest or RUN/ITERATION")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--file", help="the text to score; a bare name is looked up in data/processed"
    )
    task.add_argument(
        "--verify", action="store_true", help="check the checkpoint's files, and print its seal"
    )
    task.add_argument(
        "--novelty", metavar="FILE", help="what a text shares word for word with the training works"
    )
    task.add_argument(
        "--style", metavar="FILE", help="which voice each sentence of a text leans to"
    )
    parser.add_argument("--stride", type=int, help="tokens between windows (default: block size)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    if arguments.verify and arguments.json:
        raise UserError("--verify prints lines only; leave --json out")
    device = select_device(arguments.device)

    location = locate(arguments.checkpoint, exact=arguments.verify)
    if arguments.verify:
        for line in describe_seal(location):
            print(line)
        return
    meta = load_meta(location)
    if changed := differences(meta.environment, environment(), WRITING):
        print(f"warning: made with other versions ({'; '.join(changed)})", file=sys.stderr)
    if arguments.novelty is not None:
        print(_novelty_report(meta, Path(arguments.novelty), as_json=arguments.json))
    elif arguments.style is not None:
        file = Path(arguments.style)
        print(_style_report(location, meta, device, file, as_json=arguments.json))
    else:
        print(_score_report(location, meta, device, arguments))


if __name__ == "__main__":
    sys.exit(main())
