"""Jobs for a cluster: what they name, what travels there, and that a run has one driver."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobSubmissionClient, JobType
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from pipeline.errors import RunError, UsageError
from pipeline.plan import load_plan
from pipeline.run.head import Client, one_line, refusals_as_usage
from pipeline.run.scan import ScanConfig

START_SECONDS = 60.0
"""How long a head that has only just started may take to accept a job."""
PAUSE_SECONDS = 1.0
MAX_PACKAGE_BYTES = 500_000_000
"""Ray moves a package in one message of at most 512 MiB, and the head keeps it in memory."""
# Ray's own default, which it applies to folders but not to packages.
LEFT_OUT = [".git", ".venv", "venv", "__pycache__"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A module of ``jobs/`` with its flags."""

    name: str
    arguments: tuple[str, ...]
    run_id: str | None = None
    """The run that it drives: no other job may drive it at the same time."""
    files: tuple[str, ...] = ()
    """Local files that it needs, beside those that its arguments name."""

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", f"jobs.{self.name}", *self.arguments])

    @property
    def tags(self) -> dict[str, str]:
        """What Ray keeps as the job's metadata."""
        tags = {"job": self.name, "version": version("dorfman")}
        return tags | ({"run_id": self.run_id} if self.run_id else {})


def scan_job(config: ScanConfig, arguments: Sequence[str], run_id: str) -> Job:
    """A scan as a job, with the files that its configuration names. Raises UsageError.

    Called in the working dir, where the scan's relative paths begin on the cluster too.
    """
    for flag, place in (("--output", config.output), ("--source", config.source)):
        if place and "://" not in place and not Path(place).is_absolute() and not Path(place).is_file():
            raise UsageError(
                f"{flag} {place} is a relative path: on the cluster it would lie in the job's own copy of the working "
                "dir; give an s3:// uri, or the absolute path of a folder that every node has"
            )
    plan = load_plan(config.plan)
    beside = (config.labels, config.canaries, config.policy, config.prices)
    files = [file for file in beside if file and "://" not in file]
    files += [config.source] if Path(config.source).is_file() else []
    files += [config.plan] if config.plan.endswith((".yaml", ".yml")) else []
    files += [bank.file for bank in plan.banks if "://" not in bank.file]
    for stage in plan.stages:
        if stage.model.endswith((".json", ".safetensors")):
            files += [str(Path(stage.model).with_suffix(suffix)) for suffix in (".json", ".safetensors")]
    named = arguments if config.run_id else (*arguments, "--run-id", run_id)
    return Job(name="scan", arguments=tuple(named), run_id=run_id, files=tuple(files))


def pack(working_dir: Path, folder: Path) -> Path:
    """What travels: the working dir without what .gitignore and .rayignore name, as Ray packs it, in ``folder``.

    Raises UsageError.
    """
    if not working_dir.is_dir():
        raise UsageError(f"working dir {working_dir} is no folder")
    package = folder / "working_dir.zip"
    create_package(str(working_dir), package, include_gitignore=True, excludes=LEFT_OUT, logger=logger)
    if package.stat().st_size > MAX_PACKAGE_BYTES:
        largest = sorted(ZipFile(package).infolist(), key=lambda entry: -entry.file_size)[:3]
        raise UsageError(
            f"working dir {working_dir} packs into {package.stat().st_size:,} bytes, and a cluster takes at most "
            f"{MAX_PACKAGE_BYTES:,}: name what the job does not need in its .rayignore; the largest files are "
            + ", ".join(entry.filename for entry in largest)
        )
    return package


def check_files(job: Job, package: Path) -> None:
    """That every local file which the job names travels with it. Called in the working dir. Raises UsageError.

    A job's flags are its own, so any argument that is the name of a file here counts as one.
    """
    words = (word.partition("=")[2] if word.startswith("--") else word for word in job.arguments)
    named = [word for word in words if word and Path(word).is_file()]
    packed = set(ZipFile(package).namelist())
    for file in (*named, *job.files):
        inside = os.path.normpath(file)
        if os.path.isabs(inside) or inside.startswith(".."):
            raise UsageError(
                f"{file} is not named from the working dir, and nothing else travels to the cluster: put it into "
                f"{Path.cwd()} and give its path from there"
            )
        if not Path(inside).is_file():
            raise UsageError(f"{file}: no such file in the working dir {Path.cwd()}")
        if inside not in packed:
            raise UsageError(
                f"{file} does not travel to the cluster, for .gitignore or .rayignore leaves it out: put it elsewhere "
                f"in {Path.cwd()}"
            )


def jobs_of(client: JobSubmissionClient, run_id: str) -> list[JobDetails]:
    """The jobs that were submitted to drive a run, oldest first, whatever has become of them."""
    jobs = [job for job in client.list_jobs() if job.type is JobType.SUBMISSION]
    found = [job for job in jobs if (job.metadata or {}).get("run_id") == run_id]
    return sorted(found, key=lambda job: job.start_time or 0)


def submit(client: Client, address: str, job: Job, package: Path) -> str:
    """Submits a job and returns its submission id. Raises UsageError when its run is being driven already.

    The id is made of the run's and a number. Ray takes an id once, so of two who find a run idle at the same
    moment one is refused.
    """
    submission_id = None
    if job.run_id:
        with refusals_as_usage(address):
            earlier = jobs_of(client, job.run_id)
        for other in earlier:
            if not other.status.is_terminal():
                raise _being_driven(job.run_id, other.submission_id)
        submission_id = f"{job.run_id}-{1 + max((_number(other, job.run_id) for other in earlier), default=0)}"
    attempts = Retrying(
        # What a head says whose agent has not started yet.
        retry=retry_if_exception(lambda error: "No available agent" in str(error)),
        stop=stop_after_delay(START_SECONDS),
        wait=wait_fixed(PAUSE_SECONDS),
        reraise=True,
    )
    try:
        return attempts(
            client.submit_job,
            entrypoint=job.entrypoint,
            submission_id=submission_id,
            runtime_env={"working_dir": str(package)},
            metadata=job.tags,
        )
    except (OSError, RuntimeError) as error:
        if "already exists" in str(error):
            raise _being_driven(job.run_id, submission_id) from error
        raise RunError(
            f"{address} did not take the job: {one_line(error)}; if it was only the answer that was lost, the job "
            f"runs: see `ray job list --address {address}`, or submit it again"
        ) from error


def _being_driven(run_id: str | None, submission_id: str | None) -> UsageError:
    return UsageError(
        f"run {run_id!r} is being driven by job {submission_id}: follow it with --follow {run_id}, or wait for its end"
    )


def _number(job: JobDetails, run_id: str) -> int:
    """Of a job that was submitted here: which of its run's it was. 0 for others."""
    match = re.fullmatch(re.escape(run_id) + r"-(\d+)", job.submission_id or "")
    return int(match[1]) if match else 0


def newest_job(client: Client, address: str, name: str) -> str:
    """The submission id of the newest job of a run, or of the job that is called so. Raises UsageError."""
    with refusals_as_usage(address):
        found = [job.submission_id for job in jobs_of(client, name)]
        found = found or [job.submission_id for job in client.list_jobs() if job.submission_id == name]
    if not found or found[-1] is None:
        raise UsageError(f"the cluster at {address} knows no job of a run {name!r}, nor a job of that name")
    return found[-1]
