"""gothic-eval: scores a text under a checkpoint, and checks the checkpoint itself."""

import sys
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.errors import UserError
from gothic_jax.text.works import PROCESSED


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="gothic-eval", description="Score a text under a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="RUN/best, RUN/latest or RUN/ITERATION")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--file", help=f"the text to score; a bare name is looked up in {PROCESSED}")
    task.add_argument(
        "--verify", action="store_true", help="check the checkpoint's files, and print its seal"
    )
    task.add_argument(
        "--novelty", metavar="FILE", help="what a text shares word for word with the training works"
    )
    task.add_argument(
        "--style", metavar="FILE", help="which voice each sentence of a text leans to"
    )
    parser.add_argument("--train-file", help="for --novelty: where the training text is now")
    parser.add_argument(
        "--raw-text",
        action="store_true",
        help="read the text as it is, not in the typography of the training text",
    )
    parser.add_argument("--stride", type=int, help="tokens between windows (default: block size)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


@command("gothic-eval")
def main(argv: Sequence[str]) -> None:
    """Scores a text under a checkpoint, or checks the checkpoint itself."""
    arguments = _parser().parse_args(argv)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    if arguments.verify and arguments.json:
        raise UserError("--verify prints lines only; leave --json out")
    if arguments.raw_text and not (arguments.file or arguments.style):
        raise UserError("--raw-text is for --file and --style; leave it out")
    if arguments.train_file is not None and arguments.novelty is None:
        raise UserError("--train-file is for --novelty; leave it out")

    import json

    from gothic_jax.checkpoints.checkpoint import locate
    from gothic_jax.commands import reports
    from gothic_jax.machine.compiled import cache_compiled_programs
    from gothic_jax.machine.device import out_of_memory_reported, select_device
    from gothic_jax.machine.environment import warn_of_other_versions

    cache_compiled_programs()
    device = select_device(arguments.device)
    checkpoint = locate(arguments.checkpoint, exact=arguments.verify)
    if arguments.verify:
        for line in reports.describe(checkpoint):
            print(line)
        return
    warn_of_other_versions(str(checkpoint), checkpoint.meta.environment)
    with out_of_memory_reported("lower --batch-size, or measure with --device cpu"):
        if arguments.novelty is not None:
            file = Path(arguments.novelty)
            report, lines = reports.novelty_report(checkpoint, file, arguments.train_file)
        elif arguments.style is not None:
            report, lines = reports.style_report(
                checkpoint, device, Path(arguments.style), raw_text=arguments.raw_text
            )
        else:
            report, lines = reports.score_report(
                checkpoint,
                device,
                arguments.file,
                stride=arguments.stride,
                batch_size=arguments.batch_size,
                raw_text=arguments.raw_text,
            )
    print(json.dumps(report) if arguments.json else lines)


if __name__ == "__main__":
    sys.exit(main())
