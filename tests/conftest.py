"""Shared by all tests: one Ray session, one small corpus, the shipped nets in a plan with groups."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Demo credentials for the embedded server; a test must never find real ones.
os.environ.update(AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo", AWS_DEFAULT_REGION="us-east-1")
os.environ.pop("AWS_PROFILE", None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The third-party data, which is not part of the project."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder.name!r} is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        # So that what is scraped is a second old, and not ten.
        _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from pipeline.labels.demo import serve_s3

    with serve_s3() as endpoint_url:
        yield endpoint_url


CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright; nothing is downloaded.

    Of a module, for while it is there asyncio has a running loop in this thread, and no fetcher can start one.
    """
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A sandbox of Chromium's own cannot be had in a container or as root.
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 small pictures, every eighth with the emblem, and their labels."""
    from pipeline.labels.corpus import CorpusConfig, make_corpus

    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(CorpusConfig(output=str(folder), images=320, prevalence=0.125, seed=990, sides=(120, 260)))
    return folder


def upload(corpus: Path, endpoint: str, bucket: str, limit: int | None = None) -> None:
    """Makes a bucket and puts a corpus's pictures, or the first of them, below ``all/``."""
    from pipeline.storage import s3_client

    client = s3_client(endpoint)
    client.create_bucket(Bucket=bucket)
    pictures = [path for path in sorted(corpus.rglob("*.*")) if path.suffix != ".parquet"]
    for path in pictures[:limit]:
        client.upload_file(str(path), bucket, f"all/{path.relative_to(corpus)}")


GROUPS = {
    "name": "groups",
    "categories": ["trefoil"],
    "window": {"images": 32},
    "preparation": {
        "fetch": {"num_cpus": 0.2},
        "decode": {"num_cpus": 0.5},
        "write": {"num_cpus": 0.1, "windows_per_call": 2},
    },
    "stages": [
        {
            "name": "group", "model": "emblem", "rounds": [16, 4], "thresholds": {"trefoil": [0.003, 0.02]},
            "input_size": 160, "num_cpus": 0.6, "batch_images": 64,
        },
        {
            "name": "single", "model": "emblem", "rounds": [1], "thresholds": {"trefoil": [0.3]},
            "input_size": 160, "num_cpus": 0.3, "windows_per_call": 2, "batch_images": 16,
        },
    ],
}  # fmt: skip
"""A plan with groups, whichever plans are shipped."""


QUICK = {
    "name": "quick",
    "categories": ["automobile"],
    "window": {"images": 16},
    "preparation": {
        "fetch": {"num_cpus": 0.2},
        "decode": {"num_cpus": 0.4},
        "write": {"num_cpus": 0.1},
    },
    "stages": [
        {
            "name": "tree", "model": "cifar-tree", "rounds": [4, 2, 1],
            "thresholds": {"automobile": [0.025, 0.0124, 0.007]}, "input_size": 32, "num_cpus": 0.3,
        },
    ],
}  # fmt: skip
"""Groups and retests by the smallest net: what it says of an emblem means nothing, but is always the same."""


def small_plan(folder: Path, base: dict = GROUPS, **changes: object) -> Path:
    """A plan as a file; ``changes`` replace top-level fields or, by name, pool fields.

    ``batch_images``, ``windows_per_call`` and ``actors`` go to every stage and pool.
    """
    content: dict = copy.deepcopy(base)
    pools = [*content["stages"], *(content["preparation"][name] for name in ("fetch", "decode", "write"))]
    for name, value in changes.items():
        if name == "batch_images":
            for stage in content["stages"]:
                stage[name] = value
        elif name in ("windows_per_call", "actors", "num_cpus"):
            for pool in pools:
                pool[name] = value
        else:
            content[name] = value
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
