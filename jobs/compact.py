"""Merges the many small files of complete runs into few: ``python -m jobs.compact --output OUT``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.output.opening import open_output
from pipeline.storage import check_endpoint, storage_errors_as_failure, storage_errors_as_usage
from pipeline.tables.compact import TARGET_BYTES, compact, runs_to_compact
from pipeline.tables.compact_reviews import compact_reviews


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Merges the files of complete runs: the same rows in the same order, in files of about --target-megabytes.

    Without --run-id also the files of decisions, those of each day before yesterday into one. Can be interrupted at
    any point and repeated. Who reads the files that a run record names sees every row once, all the time; who reads
    the folder sees rows twice for a moment. Exit codes: 0 done, 1 failed, 2 wrong usage.
    """

    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    run_id: tuple[str, ...] = ()
    """Complete runs to compact, and nothing else. Default: all of them."""
    older_than: float = 1.0
    """Hours since a run was completed before it is compacted: its driver reads its files for the report."""
    target_megabytes: float = TARGET_BYTES / 1e6
    """Size of a merged file; one that has half of it is left as it is. Merging takes about ten times this in memory."""
    kms_key: str | None = None
    """Key in AWS KMS (id or ARN) that encrypts what is written. Default: as the bucket is set up."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if self.older_than < 0:
            raise UsageError(f"older than is {self.older_than:g} hours, but a run was completed 0 hours ago or more")
        if self.target_megabytes <= 0:
            raise UsageError(f"target is {self.target_megabytes:g} megabytes, but a file needs more than 0")


def run(config: JobConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url, kms_key=config.kms_key)
        runs = runs_to_compact(store, config.run_id, timedelta(hours=config.older_than))
    with storage_errors_as_failure():
        for run_id in runs:
            done = compact(store, run_id, round(config.target_megabytes * 1e6))
            console.print(
                f"run {run_id}: {done.files_before:,} files, now {done.files:,}; {done.bytes_before:,} bytes, "
                f"now {done.bytes:,}",
                markup=False,
            )
        merged = [] if config.run_id else compact_reviews(store)
    if not runs:
        console.print("no run is old enough to be compacted")
    if merged:
        files, decisions = sum(day.files_before for day in merged), sum(day.decisions for day in merged)
        console.print(f"reviews: {files:,} files with {decisions:,} decisions, now {len(merged):,}, one a day")


if __name__ == "__main__":
    run_job("jobs.compact", JobConfig, run)
