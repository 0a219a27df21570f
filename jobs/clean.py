"""Removes what dead drivers left in an output: ``python -m jobs.clean --output s3://bucket/out``, then ``--delete``."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.output.opening import open_output
from pipeline.storage import check_endpoint, storage_errors_as_failure, storage_errors_as_usage
from pipeline.tables.clean import Litter, find_abandoned, find_litter


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Lists the files of a scan's output that nothing refers to, and removes them with --delete.

    Left alone: anything of a run that was written to within --older-than, and what a marker names, unless its whole
    run is given up with --abandon.
    """

    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    older_than: float = 24.0
    """Hours for which nothing was written under a run before its files count as dead; at least 1."""
    abandon: str | None = None
    """Instead: everything of this unfinished run, its rows in the tables included; of one that has stopped or failed
    whatever its age."""
    delete: bool = False
    """Remove what would only be listed without it."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if self.older_than < 1:
            raise UsageError(f"older than is {self.older_than:g} hours; a living driver may need 1")


def run(config: JobConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url)
    with storage_errors_as_failure():
        age = timedelta(hours=config.older_than)
        found = [find_abandoned(store, config.abandon, age)] if config.abandon else find_litter(store, age)
        for litter in found:
            console.print(_line(litter), markup=False)
            if config.delete:
                store.delete(list(litter.keys))
            else:
                for key in litter.keys:
                    console.print(f"  {key}", markup=False)
    files, size = sum(len(litter.keys) for litter in found), sum(litter.bytes for litter in found)
    done = "removed" if config.delete else "would be removed; repeat with --delete to do it"
    console.print(f"{files:,} files, {size:,} bytes {done}")


def _line(litter: Litter) -> str:
    return f"run {litter.run_id}: {len(litter.keys):,} files, {litter.bytes:,} bytes: {litter.reason}"


if __name__ == "__main__":
    run_job("jobs.clean", JobConfig, run)
