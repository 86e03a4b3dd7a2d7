"""gothic-train, also `python -m gothic_jax.train`: trains, resumes and fine-tunes a model.

This module parses the command line and locks the run's folder; `run` and `loop` do the rest.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.config import changed_by, get_config, load_config, parse_overrides
from gothic_jax.errors import UserError
from gothic_jax.machine.hosts import find_place
from gothic_jax.machine.process import exclusive, use_huge_pages


@dataclasses.dataclass(frozen=True)
class _Flag:
    setting: str
    type: Callable[[str], Any]
    help: str


FLAGS = {
    "--data-dir": _Flag("data_dir", str, "where the texts are"),
    "--train-file": _Flag("train_file", str, "text to train on"),
    "--val-file": _Flag("val_file", str, "text to validate on"),
    "--tokenizer": _Flag("tokenizer", str, "tokenizer"),
    "--out-dir": _Flag("out_dir", str, "where to write checkpoints and logs"),
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
        help=f"--no-compile runs op by op, for debugging (default: {defaults.compile})",
    )
    parser.add_argument(
        "--config", metavar="FILE", default=None, help="a file of settings; flags override it"
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume", action="store_true", help="continue from the latest checkpoint in --out-dir"
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


@command("gothic-train", before=use_huge_pages)
def main(argv: Sequence[str]) -> int:
    """Trains a model."""
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it; give one of them")
    base = load_config(arguments.config) if arguments.config else get_config()
    overrides = parse_overrides(_overrides(arguments, rest))
    # Where this process stands is not a setting of the run, which may go on elsewhere.
    place = find_place(overrides.pop("distributed", base.distributed), os.environ)
    base.distributed = ""
    out_dir = Path(changed_by(base, overrides).out_dir)
    request = (base, arguments.config, overrides)
    how = {name: getattr(arguments, name) for name in ("resume", "init_from", "overwrite")}
    if place is None:
        with exclusive(out_dir):
            # Its imports take seconds; a second trainer on one folder is refused at once.
            return _train(*request, **how)
    # A process that is refused must be able to say so to the others.
    from gothic_jax.machine.processes import Team

    team = Team.join(place, "gothic-train")
    with team.ending_together(), exclusive(out_dir) if team.is_first else nullcontext():
        return _train(*request, **how, team=team)


def _train(*request: Any, **how: Any) -> int:
    from gothic_jax.machine.compiled import cache_compiled_programs
    from gothic_jax.training.loop import train
    from gothic_jax.training.run import Request, prepare

    cache_compiled_programs()
    run = prepare(Request(*request, **how))
    print(f"checkpoints and logs: {run.config.out_dir}")
    if run.meta.iteration:
        print(f"resuming at iteration {run.meta.iteration}")
    return train(run, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
