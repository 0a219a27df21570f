"""Trains a net: ``python -m jobs.train --labels a/labels.parquet --validation b/labels.parquet --name NAME``."""

from __future__ import annotations

from rich.console import Console

from jobs.cli import run_job
from pipeline.fit import TrainConfig, fit


def run(config: TrainConfig) -> None:
    console = Console()
    steps = config.training.steps

    def progress(step: int, loss: float, rate: float) -> None:
        console.print(f"step {step:,}/{steps:,}  loss {loss:.4f}  {rate * 60:.0f} steps/min")

    card = fit(config, progress)
    for row in card.facts["measured"]:
        low, high = row["recall_interval"]
        console.print(
            f"groups of {row['group_size']}: recall {row['recall']:.4f} [{low:.4f}, {high:.4f}] of "
            f"{row['positives']} positives, FPR {row['false_positive_rate']:.4f} at threshold {row['threshold']:.4f}"
        )


if __name__ == "__main__":
    run_job("jobs.train", TrainConfig, run)
