"""Makes a released model of a checkpoint: weights in bfloat16, without the optimizer.

.venv/bin/python scripts/release.py checkpoints/dandy/best checkpoints/gothic-dandy
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.checkpoints.checkpoint import locate
from gothic_jax.checkpoints.release import release
from gothic_jax.commands.cli import ArgumentParser, command


@command("release.py")
def main(argv: Sequence[str]) -> None:
    """Writes the model and prints where it is and how large."""
    parser = ArgumentParser(prog="release.py", description="Release a checkpoint's model.")
    parser.add_argument("checkpoint", help="RUN/best, RUN/latest or RUN/ITERATION")
    parser.add_argument("run", type=Path, help="the folder to write to")
    arguments = parser.parse_args(argv)
    folder = release(locate(arguments.checkpoint, exact=True), arguments.run)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
