"""A submitted job's log as it grows, and the exit code of its driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from pipeline.errors import Ended, RunError
from pipeline.run.head import Client, one_line, refusal

HEAD_PATIENCE = 300.0
"""How long a head may not answer while a job is followed."""
SILENCE_SECONDS = 30.0
"""After so long without a line the job is asked for: a connection to a machine that is gone says nothing either."""
LAST_LINES_SECONDS = 10.0
PAUSE_SECONDS = 1.0

T = TypeVar("T")


class Follower:
    """Prints a job's log as it grows, every character once, and waits for the job's end."""

    def __init__(self, client: Client, address: str, submission_id: str, write: Callable[[str], None]) -> None:
        self.client = client
        self.submission_id = submission_id
        self.write = write
        self.printed = 0
        """Characters of the log."""
        self.goes_on = (
            f"job {submission_id} goes on: follow it with python -m jobs.submit --address {address} --follow "
            f"{submission_id}, or end it with ray job stop --address {address} {submission_id}"
        )

    def wait(self) -> int:
        """The exit code of the job's driver. Raises RunError when it has none, or when the head has gone silent.

        Ctrl-C is a RunError too; SIGTERM and a reader that left raise what they are. All of them leave the job alone.
        """
        try:
            while True:
                self._print_stream()
                job = self._state()
                if job.status.is_terminal():
                    self._print_rest()
                    return exit_code(job)
                time.sleep(PAUSE_SECONDS)
        except Ended as ended:
            raise type(ended)(f"{ended}; {self.goes_on}") from None
        except KeyboardInterrupt:
            raise RunError(self.goes_on) from None

    def _print_stream(self) -> None:
        """Prints what comes until the log ends, the connection breaks or nothing has come for a while."""
        with suppress(OSError, RuntimeError, aiohttp.ClientError):
            asyncio.run(self._tail())

    async def _tail(self) -> None:
        start = 0
        lines = self.client.tail_job_logs(self.submission_id)
        while (text := await asyncio.wait_for(anext(lines, None), SILENCE_SECONDS)) is not None:
            self._print(text, start)
            start += len(text)

    def _print_rest(self) -> None:
        # The node of a driver that was lost keeps its last lines to itself.
        with suppress(OSError, RuntimeError):
            self._print(self._ask(self.client.get_job_logs, LAST_LINES_SECONDS), 0)

    def _print(self, text: str, start: int) -> None:
        """``start``: where in the log the text begins. Each connection begins with the log's first line again."""
        fresh = text[max(self.printed - start, 0) :]
        if fresh:
            self.write(fresh)
            self.printed += len(fresh)

    def _ask(self, question: Callable[[str], T], seconds: float) -> T:
        """The answer about the job, from a head that may be away for a while."""
        attempts = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, (OSError, RuntimeError)) and not _is_gone(error)),
            stop=stop_after_delay(seconds),
            wait=wait_fixed(PAUSE_SECONDS),
            reraise=True,
        )
        return attempts(question, self.submission_id)

    def _state(self) -> JobDetails:
        try:
            return self._ask(self.client.get_job_info, HEAD_PATIENCE)
        except AuthenticationError as error:
            raise RunError(f"{refusal(error)}; {self.goes_on}") from error
        except (OSError, RuntimeError) as error:
            if _is_gone(error):
                raise RunError(
                    f"the head has forgotten job {self.submission_id}, so it was started anew and the job is gone; "
                    "submit it again"
                ) from error
            raise RunError(
                f"the head has not answered for {HEAD_PATIENCE:g} s ({one_line(error)}); unless it is gone, "
                f"{self.goes_on}"
            ) from error


def exit_code(job: JobDetails) -> int:
    """What the job's driver ended with. Raises RunError for a job that was ended by something else."""
    if job.status is JobStatus.SUCCEEDED:
        return 0
    if job.driver_exit_code is not None and job.driver_exit_code > 0:
        return job.driver_exit_code
    if job.status is JobStatus.STOPPED:
        raise RunError(f"job {job.submission_id} was stopped; submit it again to go on")
    if job.driver_exit_code:
        raise RunError(f"job {job.submission_id}: its driver was killed by signal {-job.driver_exit_code}")
    raise RunError(f"job {job.submission_id} failed: {one_line(job.message or 'Ray does not say why')}")


def _is_gone(error: BaseException) -> bool:
    return "status code 404" in str(error)
