"""The demo: an S3-compatible server on loopback, filled with a corpus, for as long as a scan needs it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError

from pipeline.errors import RunError
from pipeline.labels.corpus import CorpusConfig, make_corpus
from pipeline.storage import s3_client
from pipeline.store import Store

BUCKET = "dorfman-demo"
SOURCE = f"s3://{BUCKET}/pictures/"
START_SECONDS = 60
# The embedded server takes any; real ones must not leak into it, nor be needed.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True, kw_only=True)
class DemoCorpus:
    source: str
    endpoint_url: str
    labels: bytes


@contextmanager
def serve_s3() -> Iterator[str]:
    """An empty server that keeps objects in memory; yields its endpoint url."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
    remedy = "is moto[server] installed? (pip install 'dorfman[demo]')"
    with run_server(lambda port: [*command, str(port)], remedy) as (endpoint_url, _):
        yield endpoint_url


@contextmanager
def run_server(command: Callable[[int], list[str]], remedy: str) -> Iterator[tuple[str, int]]:
    """A server that takes ``CREDENTIALS``, on loopback at a free port: its endpoint url and process id.

    Raises RunError with ``remedy`` when it does not start.
    """
    os.environ.update(CREDENTIALS)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        command(port),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,  # noqa: PLW1509  no other thread runs yet
    )
    try:
        endpoint_url = f"http://127.0.0.1:{port}"
        _wait_until_up(endpoint_url, process, remedy)
        yield endpoint_url, process.pid
    finally:
        process.terminate()
        process.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait_until_up(endpoint_url: str, process: subprocess.Popen, remedy: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            s3_client(endpoint_url).list_buckets()
            return
        except BotoCoreError:
            time.sleep(0.2)
    raise RunError(f"the embedded S3 server did not start; {remedy}")


@contextmanager
def demo_corpus(images: int, prevalence: float, seed: int, categories: tuple[str, ...]) -> Iterator[DemoCorpus]:
    """The corpus of this seed in a bucket of its own. Raises UsageError for categories it cannot draw."""
    with serve_s3() as endpoint_url:
        s3_client(endpoint_url).create_bucket(Bucket=BUCKET)
        config = CorpusConfig(
            output=SOURCE, images=images, prevalence=prevalence, seed=seed, categories=categories,
            endpoint_url=endpoint_url,
        )  # fmt: skip
        make_corpus(config)
        labels = Store(SOURCE, endpoint_url).read("labels.parquet")
        yield DemoCorpus(source=SOURCE, endpoint_url=endpoint_url, labels=labels)
