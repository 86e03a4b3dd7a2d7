"""Draws a run's training and validation loss from its TensorBoard logs.

scripts/install.sh plots
.venv/bin/python scripts/plot_curve.py checkpoints/laptop docs/laptop-curve.png
"""

import sys

import matplotlib as mpl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
import matplotlib.pyplot as plt


def main(run: str, picture: str) -> None:
    """Reads RUN/logs and writes the picture."""
    events = EventAccumulator(f"{run}/logs", size_guidance={"scalars": 0})
    events.Reload()
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for tag, name, style in (
        ("train/bits_per_byte", "training batch", {"alpha": 0.5, "linewidth": 1}),
        ("val/bits_per_byte/wilde", "validation, Wilde", {"marker": "o", "markersize": 3}),
        ("val/bits_per_byte/lovecraft", "validation, Lovecraft", {"marker": "s", "markersize": 3}),
    ):
        points = events.Scalars(tag)
        axes.plot([p.step for p in points], [p.value for p in points], label=name, **style)
    axes.set(xlabel="iteration", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
