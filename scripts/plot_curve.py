"""Draws a run's training and validation loss from its TensorBoard logs.

scripts/install.sh plots
.venv/bin/python scripts/plot_curve.py checkpoints/laptop docs/laptop-curve.png

Several runs, each of which began with the weights of the one before, are one curve.
"""

import sys
from typing import Any

import matplotlib as mpl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
import matplotlib.pyplot as plt

CURVES: list[tuple[str, str, dict[str, Any]]] = [
    ("train/bits_per_byte", "training batch", {"color": "C0", "alpha": 0.5, "linewidth": 1}),
    (
        "val/bits_per_byte/wilde",
        "validation, Wilde",
        {"color": "C1", "marker": "o", "markersize": 3},
    ),
    (
        "val/bits_per_byte/lovecraft",
        "validation, Lovecraft",
        {"color": "C2", "marker": "s", "markersize": 3},
    ),
]


def main(*arguments: str) -> None:
    """Reads each RUN/logs and writes the picture; a run goes on where the one before it ended."""
    *runs, picture = arguments
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    start = 0
    for run in runs:
        events = EventAccumulator(f"{run}/logs", size_guidance={"scalars": 0})
        events.Reload()
        for tag, name, style in CURVES:
            points = events.Scalars(tag)
            steps = [start + point.step for point in points]
            label = None if start else name
            axes.plot(steps, [point.value for point in points], label=label, **style)
        start += events.Scalars(CURVES[0][0])[-1].step
        if run != runs[-1]:
            axes.axvline(start, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="iteration", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
