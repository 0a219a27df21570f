"""Makes a net in int8: ``python -m jobs.quantise --name NAME-int8 --model NAME --labels labels.parquet``."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from jobs.cli import run_job
from pipeline.storage import storage_errors_as_usage
from pipeline.training.quantise import QuantiseConfig, run_quantise


def run(config: QuantiseConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    with storage_errors_as_usage():
        made = run_quantise(config, console.print)
    scores = made.card.facts["scores"]
    console.print(
        f"scores of {scores['pictures']:,} pictures differ from {config.model}'s by {scores['mean_difference']:.5f} in "
        f"the mean, {scores['greatest_difference']:.3f} at most"
    )
    for before, now in zip(made.before, made.card.facts["measured"], strict=True):
        console.print(
            f"groups of {now['group_size']}, {now['category']}: recall {_share(now, 'recall')} of {now['positives']} "
            f"positives, {config.model} {_share(before, 'recall')}; FPR {_share(now, 'false_positive_rate')}, "
            f"{config.model} {_share(before, 'false_positive_rate')}"
        )
    console.print(f"{config.output / config.name}.json; its scores are its own: jobs.calibrate and jobs.plan come next")


def _share(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.4f} [{low:.4f}, {high:.4f}]"


if __name__ == "__main__":
    run_job("jobs.quantise", QuantiseConfig, run)
