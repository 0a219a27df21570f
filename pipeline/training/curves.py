"""How a training went, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_curves(history: list[dict[str, Any]], name: str, path: Path) -> None:
    """An SVG of the loss, and of the recall at 1 % false positives by group size, over the steps.

    ``history``: ``models.training.Progress`` as dictionaries, in order.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    losses, recalls = figure.subplots(2, 1, sharex=True)
    losses.plot([now["step"] for now in history], [now["loss"] for now in history], color="tab:blue")
    losses.set(ylabel="loss, running mean", yscale="log", title=name)
    measured = [now for now in history if now["measured"]]
    for size in sorted({size for now in measured for size in now["measured"]}):
        points = [(now["step"], now["measured"][size]) for now in measured if size in now["measured"]]
        recalls.plot(*zip(*points, strict=True), marker="o", label=f"M = {size}")
    recalls.set(xlabel="step", ylabel="recall at 1 % FPR", ylim=(0, 1.02))
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
    if measured:
        recalls.legend(loc="lower right")
    # Without a date the same training gives the same file.
    figure.savefig(path, metadata={"Date": None})
