"""Trains a net: ``python -m jobs.train --labels a/labels.parquet --validation b/labels.parquet --name NAME``."""

from __future__ import annotations

from rich.console import Console

from jobs.cli import run_job
from models.training import Progress
from pipeline.training.fit import TrainConfig, fit


def run(config: TrainConfig) -> None:
    console = Console()
    steps = config.training.steps

    def progress(now: Progress) -> None:
        line = f"step {now.step:,}/{steps:,}  loss {now.loss:.4f}  {now.steps_per_second * 60:.0f} steps/min"
        if now.measured:
            recalls = ", ".join(f"M={size} {recall:.3f}" for size, recall in now.measured.items())
            line += f"  recall at 1 % FPR: {recalls}"
        console.print(line, highlight=False)

    card = fit(config, progress)
    for row in card.facts["measured"]:
        low, high = row["recall_interval"]
        console.print(
            f"groups of {row['group_size']}, {row['category']}: recall {row['recall']:.4f} [{low:.4f}, {high:.4f}] of "
            f"{row['positives']} positives, FPR {row['false_positive_rate']:.4f} at threshold {row['threshold']:.4f}"
        )


if __name__ == "__main__":
    run_job("jobs.train", TrainConfig, run)
