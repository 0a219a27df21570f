"""How the runs of an output stand: ``python -m jobs.status --output s3://bucket/out``, or one with ``--follow``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.output.opening import open_output
from pipeline.past.baseline import accept
from pipeline.reporting.metrics import exposition
from pipeline.reporting.runs import Run, details, follow, line, list_runs, read_run, samples, table
from pipeline.storage import check_endpoint, storage_errors_as_usage

WIDTH = 160
"""Of a table that goes to a file or a mail, where nothing needs to be cut."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Lists the runs of an output, newest first, or shows one of them, or follows it until it ends.

    Exit codes: 0; with --follow those of the run: 0 complete, 1 failed or without a driver, 3 suspect, 4 stopped, and 1
    when the output went away for long; 2 wrong usage or output.
    """

    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    run_id: str | None = None
    """Show this run only."""
    follow: bool = False
    """With --run-id: look every five seconds until the run ends, and end as it did."""
    accept: str | None = None
    """Say that this suspect run is right as it is: it ends with 0 from now on, and later runs are compared with it."""
    json: bool = False
    """An object a line instead of a table."""
    prometheus: bool = False
    """Metrics of the listed runs in Prometheus' text format, for node_exporter's textfile collector."""
    limit: int = 20
    """Runs that are listed, those that were started last; any that goes on is listed too."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if self.limit < 1:
            raise UsageError(f"limit is {self.limit}, but at least 1 run is listed")
        if self.follow and self.run_id is None:
            raise UsageError("--follow wants to know which run: give --run-id")
        if self.prometheus and (self.json or self.run_id or self.accept):
            raise UsageError("--prometheus lists runs: leave --json, --run-id and --accept out")


def run(config: JobConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    def show(found: Run) -> None:
        say(json.dumps(asdict(found)) if config.json else line(found))

    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url)
        if config.accept:
            accept(store, config.accept)
            say(f"run {config.accept}: accepted")
        elif config.prometheus:
            print(exposition(samples(store, config.limit)), end="")
        elif config.run_id and config.follow:
            follow(store, config.run_id, show)
        elif config.run_id:
            found = read_run(store, config.run_id)
            say(json.dumps(asdict(found)) if config.json else "\n".join(details(found)))
        else:
            runs = list_runs(store, config.limit)
            for found in runs if config.json else ():
                show(found)
            if not config.json:
                Console(width=None if console.is_terminal else WIDTH).print(table(runs))


if __name__ == "__main__":
    run_job("jobs.status", JobConfig, run)
