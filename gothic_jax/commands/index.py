"""gothic-index: indexes a training text, to find what other texts share with it."""

import sys
from collections.abc import Sequence

from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.text.works import PROCESSED, find_text, read_text


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gothic-index",
        description="Index a training text, to see what a text shares with it word for word.",
    )
    parser.add_argument(
        "--file",
        default="mixed_train.txt",
        help=f"the training text; a bare name is looked up in {PROCESSED}",
    )
    parser.add_argument(
        "--held-out",
        help="a text that no model was trained on, to compare with (default: mixed_val.txt for"
        " mixed_train.txt, and so on, where there is one)",
    )
    return parser


@command("gothic-index")
def main(argv: Sequence[str]) -> None:
    """Builds the index of a training text."""
    arguments = _parser().parse_args(argv)
    path = find_text(arguments.file, PROCESSED)

    from gothic_jax.measuring import novelty

    held_out = None
    beside = path.parent / path.name.replace("_train", "_val")
    if arguments.held_out is not None:
        held_out = read_text(find_text(arguments.held_out, PROCESSED))
    elif beside != path and beside.exists():
        held_out = read_text(beside)
        if not novelty.held_out_passages(held_out):
            words = novelty.PASSAGE_WORDS
            print(f"{beside} is not compared with: it has no passage of {words} words")
            held_out = None
    folder = novelty.build(path, held_out)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
