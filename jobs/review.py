"""A page on which people decide on what was flagged: ``python -m jobs.review --output OUT --reviewer NAME``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.output.opening import open_output
from pipeline.review.appeals import read_appeals
from pipeline.review.desk import Desk
from pipeline.review.picture import Pictures
from pipeline.review.queue import newest_run, read_queue
from pipeline.review.rules import check_reviewer
from pipeline.review.server import serve
from pipeline.storage import check_endpoint, storage_errors_as_usage


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Serves a review page on 127.0.0.1 until it is interrupted: what runs flagged, and their audit sample among it.

    Decisions are added below reviews/ in the output; jobs.audit and jobs.calibrate read them there. docs/review.md
    explains the page. Exit codes: 0 ended by its user, 2 wrong usage or output.
    """

    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    reviewer: str
    """Name that your decisions carry. Give each person one of their own."""
    run_id: tuple[str, ...] = ()
    """Complete runs to review together. Default: the newest."""
    kind: Literal["first", "second", "appeal"] = "first"
    """first: blind to what the nets said; second: opinions on what others decided; appeal: what --appeals names, and
    without it what earlier appeals left unsure."""
    appeals: str | None = None
    """Text file with the uris or image ids that somebody appealed about, one a line."""
    order: Literal["priority", "random"] = "priority"
    """priority: highest scores first; random: by lot, for when not all of it will be reviewed."""
    port: int = 0
    """Port to listen on. Default: any that is free."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    kms_key: str | None = None
    """Key in AWS KMS (id or ARN) that encrypts decisions. Default: as the bucket is set up."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        check_reviewer(self.reviewer)
        if self.appeals is not None and self.kind != "appeal":
            raise UsageError(f"--appeals names what appeals are about, but the kind is {self.kind}: give --kind appeal")
        if len(set(self.run_id)) < len(self.run_id):
            raise UsageError(f"run ids are {list(self.run_id)}: give each run once")
        if not 0 <= self.port < 65536:
            raise UsageError(f"port is {self.port}, but it must lie between 0 and 65535")


def run(config: JobConfig) -> None:
    say = partial(Console(soft_wrap=True, highlight=False).print, markup=False)
    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url, kms_key=config.kms_key)
        queue = read_queue(store, config.run_id or (newest_run(store),), config.order)
        appealed = read_appeals(config.appeals, config.endpoint_url, queue) if config.appeals else None
        pictures = Pictures(queue.limits, config.endpoint_url)
        desk = Desk(store, queue, pictures, kind=config.kind, reviewer=config.reviewer, appealed=appealed, say=say)
        desk.leases.sweep()
    summary = desk.work.in_words()

    def started(address: str) -> None:
        say(f"{summary}\nopen {address}")
        say("The address lets in whoever has it. Ctrl-C ends the server; decisions are kept.")

    asyncio.run(serve(desk, config.port, started))
    say(f"{len(desk.made):,} decisions of {config.reviewer} are in {store.uri_of('reviews')}")


if __name__ == "__main__":
    run_job("jobs.review", JobConfig, run)
