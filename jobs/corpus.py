"""Draws a labelled corpus: ``python -m jobs.corpus --output s3://bucket/prefix --images 8000``."""

from __future__ import annotations

import time

from rich.console import Console

from jobs.cli import run_job
from pipeline.labels.corpus import CorpusConfig, make_corpus
from pipeline.storage import storage_errors_as_usage


def run(config: CorpusConfig) -> None:
    began = time.perf_counter()
    # Also half-way: started again it draws the same pictures.
    with storage_errors_as_usage():
        positives = make_corpus(config)
    seconds = time.perf_counter() - began
    Console().print(
        f"{config.images:,} pictures, {positives:,} with the emblem, in {seconds:.0f} s: "
        f"{config.output}, labels in {config.output.rstrip('/')}/labels.parquet"
    )


if __name__ == "__main__":
    run_job("jobs.corpus", CorpusConfig, run)
