"""Scores labelled pictures with candidate tests: ``python -m jobs.calibrate --labels FILE --models a b@112``."""

from __future__ import annotations

import time

from rich.console import Console

from jobs.cli import run_job
from pipeline.storage import storage_errors_as_usage
from pipeline.training.calibrate import CalibrateConfig, run_calibrate


def run(config: CalibrateConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    began = time.perf_counter()
    with storage_errors_as_usage():
        scores = run_calibrate(config, console.print)
    for category, search, certify in zip(
        scores.categories, scores.unique_positives("search"), scores.unique_positives("certify"), strict=True
    ):
        console.print(f"{category}: {search:,} unique positives to search on, {certify:,} to certify")
    console.print(
        f"{config.output}, in {time.perf_counter() - began:.0f} s; now: python -m jobs.plan --scores {config.output}"
    )


if __name__ == "__main__":
    run_job("jobs.calibrate", CalibrateConfig, run)
