"""Runs a job on a cluster: ``python -m jobs.submit --address http://HEAD:8265 scan --config nightly.yaml``."""

from __future__ import annotations

import os
import sys
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from jobs import scan
from jobs.cli import parse, run_job
from pipeline.errors import UsageError
from pipeline.run.follow import Follower
from pipeline.run.head import connect
from pipeline.run.scan import new_run_id
from pipeline.run.submission import Job, check_files, newest_job, pack, scan_job, submit

JOBS = sorted({path.stem for path in Path(__file__).parent.glob("[a-z]*.py")} - {"cli", "submit"})
ADDRESS = "http://localhost:8265"
SWITCHES = ("-h", "--help", "--no-wait")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Submits a job to a Ray cluster, prints its log and ends with its exit code.

    The job's name and its own flags come last: jobs.submit --address URL scan --source s3://... --output s3://...
    Exit codes: those of the job; 1 also when it was stopped or lost, 2 also when it was not submitted.
    """

    address: str | None = None
    """Of the head's dashboard. Default: RAY_API_SERVER_ADDRESS, or else http://localhost:8265."""
    working_dir: Path = Path()
    """Folder that travels to the cluster, and where the paths that the job is given begin."""
    no_wait: bool = False
    """End when the job is submitted."""
    follow: str | None = None
    """Instead of a job: print the log of this run's newest job and end with its exit code."""


def run(words: list[str], config: JobConfig) -> None:
    """``words``: the job's name and its flags."""
    if bool(words) == bool(config.follow):
        raise UsageError(f"give a job to submit ({', '.join(JOBS)}) with its flags, or --follow RUN_ID")
    address = config.address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    say = partial(Console(soft_wrap=True, highlight=False).print, markup=False)
    if config.follow:
        client = connect(address)
        submission_id = newest_job(client, address, config.follow)
    else:
        with TemporaryDirectory() as folder:
            package = pack(config.working_dir, Path(folder))
            with chdir(config.working_dir):
                job = build(*words)
                check_files(job, package)
            client = connect(address)
            submission_id = submit(client, address, job, package)
            say(f"job {submission_id} submitted to {address}, with a package of {package.stat().st_size:,} bytes")
    follower = Follower(client, address, submission_id, partial(print, end="", flush=True))
    if config.no_wait:
        say(follower.goes_on)
        return
    code = follower.wait()
    if code:  # the reason is in the log, which goes to standard output: cron mails what goes to standard error
        print(f"job {submission_id} ended with exit code {code}: the end of its log says why", file=sys.stderr)
    sys.exit(code)


def build(name: str, *arguments: str) -> Job:
    if name not in JOBS:
        raise UsageError(f"{name!r} is no job: give one of {', '.join(JOBS)}")
    if name != "scan":
        return Job(name=name, arguments=arguments)
    config = parse("jobs.scan", scan.JobConfig, list(arguments))
    return scan_job(config, arguments, config.run_id or new_run_id())


def own_flags(arguments: list[str]) -> int:
    """How many arguments come before the job's name."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        place += 1 if arguments[place] in SWITCHES or "=" in arguments[place] else 2
    return place


if __name__ == "__main__":
    place = 1 + own_flags(sys.argv[1:])
    words, sys.argv[place:] = sys.argv[place:], []
    run_job("jobs.submit", JobConfig, partial(run, words))
