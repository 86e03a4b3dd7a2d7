"""Makes a released model of a checkpoint: weights in bfloat16, without the optimizer.

.venv/bin/python scripts/release.py checkpoints/dandy/best checkpoints/gothic-dandy

With --mean-with, the weights are the mean of two checkpoints, of which one was trained from the
other; it is scored on the validation text of the first.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gothic_jax.checkpoints.checkpoint import FIGURES, Checkpoint, locate
from gothic_jax.checkpoints.release import release
from gothic_jax.commands.cli import ArgumentParser, command
from gothic_jax.commands.reports import score_report
from gothic_jax.machine.device import select_device
from gothic_jax.text.voices import ALL


@command("release.py")
def main(argv: Sequence[str]) -> None:
    """Writes the model and prints where it is and how large."""
    parser = ArgumentParser(prog="release.py", description="Release a checkpoint's model.")
    parser.add_argument("checkpoint", help="RUN/best, RUN/latest or RUN/ITERATION")
    parser.add_argument("run", type=Path, help="the folder to write to")
    parser.add_argument("--mean-with", metavar="CHECKPOINT", help="take the mean of both weights")
    arguments = parser.parse_args(argv)
    checkpoint = locate(arguments.checkpoint, exact=True)
    if arguments.mean_with is None:
        folder = release(checkpoint, arguments.run)
    else:
        earlier = locate(arguments.mean_with, exact=True)
        with tempfile.TemporaryDirectory() as place:
            mean = release(checkpoint, Path(place) / "mean", earlier)
            scores = _scores(locate(str(mean)), checkpoint.meta.config["val_file"])
        folder = release(checkpoint, arguments.run, earlier, scores)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size:,} bytes")


def _scores(checkpoint: Checkpoint, file: str) -> dict[str, dict[str, float]]:
    report, lines = score_report(
        checkpoint, select_device("auto"), file, stride=None, batch_size=16, raw_text=False
    )
    print(lines)
    scores = {ALL: report, **report["voices"]}
    names = (*FIGURES, "tokens", "bytes")
    return {voice: {name: score[name] for name in names} for voice, score in scores.items()}


if __name__ == "__main__":
    sys.exit(main())
