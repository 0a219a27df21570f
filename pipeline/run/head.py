"""The head of a cluster: a client with deadlines, and one line for each way in which it does not let us in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipeline.errors import UsageError
from pipeline.run.failure import telling_line

CONNECT_SECONDS = 5
ANSWER_SECONDS = 60
TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token here, and the cluster's token as RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH "
    "names or in ~/.ray/auth_token; `ray get-auth-token` prints it where the cluster was started"
)

for _name in (
    "_private.authentication.http_token_authentication",
    "dashboard.modules.job.sdk",
    "dashboard.modules.dashboard_sdk",
):
    # What they announce is said here in fewer words, or is an error that is raised.
    logging.getLogger(f"ray.{_name}").setLevel(logging.ERROR)


class Client(JobSubmissionClient):
    """Ray's client with deadlines: by itself it waits for ever for a head that accepts a request and says nothing."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **options)


def connect(address: str) -> Client:
    """A client of the head whose dashboard has this address. Raises UsageError when none answers or lets us in."""
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"address is {address!r}, but it must be that of the head's dashboard: http://HEAD:8265")
    # For Ray the environment wins over an argument, so the argument has to become it.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    with refusals_as_usage(address):
        return Client(address)


@contextmanager
def refusals_as_usage(address: str) -> Iterator[None]:
    """Before a job was submitted, a head that does not do what it is asked is a matter of configuration."""
    try:
        yield
    except AuthenticationError as error:
        raise UsageError(f"{address}: {refusal(error)}") from error
    except ConnectionError as error:
        raise UsageError(
            f"no Ray head answers at {address}: start the cluster, or reach its dashboard through a tunnel"
        ) from error
    except (OSError, RuntimeError, KeyError) as error:
        raise UsageError(f"{address} does not answer as a Ray head does: {one_line(error)}") from error


def refusal(error: AuthenticationError) -> str:
    """What a head says that does not let us in, with the remedy."""
    # What follows its first sentence is advice for whoever starts a cluster.
    return f"{one_line(error).split('. ')[0]}; {TOKEN_REMEDY}"


def one_line(said: object) -> str:
    """Of an answer or an error."""
    return telling_line(str(said)) or type(said).__name__
