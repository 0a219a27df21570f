"""Ledger rows by the million, end to end against a fast S3-compatible server: the driver's memory stays flat."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from pipeline.bench.fetch import serve_folder
from pipeline.store import Store
from tests.conftest import QUICK, small_plan
from tests.test_jobs import expect, refuse

PICTURES = 500
FLAT_BYTES = 300_000_000


@pytest.fixture
def rclone(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An S3 server over a folder, and the folder of its bucket. It ignores If-None-Match."""
    root = tmp_path / "s3"
    (root / "load").mkdir(parents=True)
    with serve_folder(root) as (url, _):
        yield url, root / "load"


def fill(bucket: Path, rows: int) -> None:
    """``rows`` keys of a few hundred small pictures: every key its own name of one of the files."""
    rng = np.random.default_rng(1)
    originals = bucket / "originals"
    originals.mkdir()
    for number in range(PICTURES):
        grain = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Pillow.fromarray(grain).resize((40, 40), Pillow.Resampling.BICUBIC)
        picture.save(originals / f"{number}.jpg", quality=80)
    keys = []
    for number in range(rows):
        folder = bucket / "pictures" / f"{number // 1000:05d}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(originals / f"{number % PICTURES}.jpg", folder / f"{number % 1000}.jpg")
        keys.append(f"s3://load/pictures/{number // 1000:05d}/{number % 1000}.jpg")
    pq.write_table(pa.table({"uri": keys}), bucket / "keys.parquet")


@pytest.mark.parametrize(
    ("rows", "shard_size"),
    [
        pytest.param(8_000, 2_000, marks=pytest.mark.slow),
        pytest.param(1_000_000, 100_000, marks=[pytest.mark.load, pytest.mark.timeout(5400)]),
    ],
)
def test_every_row_arrives_and_the_driver_does_not_grow(rclone, tmp_path, rows, shard_size):
    url, bucket = rclone
    fill(bucket, rows)
    plan = small_plan(tmp_path, QUICK, window={"images": 1024}, batch_images=256)
    flags = ["--source", "s3://load/keys.parquet", "--output", "s3://load/out", "--endpoint-url", url]
    flags += ["--plan", str(plan), "--run-id", "r", "--shard-size", str(shard_size)]
    expect(refuse(*flags), 2, "--single-driver")

    began = time.monotonic()
    log = (tmp_path / "log.txt").open("w")
    command = [sys.executable, "-m", "jobs.scan", *flags, "--single-driver"]
    driver = subprocess.Popen(command, stdout=log, stderr=log)
    memory: list[tuple[int, int]] = []
    markers = bucket / "out/_state/r/markers"
    while driver.poll() is None:
        time.sleep(0.5)
        done = len(list(markers.iterdir())) if markers.exists() else 0
        try:
            memory.append((done, psutil.Process(driver.pid).memory_info().rss))
        except psutil.NoSuchProcess:
            break
    seconds = time.monotonic() - began
    assert driver.wait() == 0, (tmp_path / "log.txt").read_text()

    store = Store("s3://load/out", url)
    record = json.loads(store.read("runs/r.json"))
    assert record["counts"]["listed"] == rows == record["counts"]["cleared"] + record["counts"]["flagged"]
    assert record["counts"]["flagged"] > rows / 100
    ids: set[str] = set()
    for file in record["files"]:
        if file["path"].startswith("ledger/"):
            ledger = pq.read_table(io.BytesIO(store.read(file["path"], file["sha256"])), columns=["image_id"])
            ids |= set(ledger["image_id"].to_pylist())
    assert len(ids) == rows
    last = max(done for done, _ in memory)
    early, late = (max(rss for done, rss in memory if done in group) for group in ((1, 2), (last - 1, last)))
    print(
        f"{rows:,} rows in {len(record['files']) // 3} shards: {seconds:.0f} s, {record['images_per_s']:.0f} images/s; "
        f"driver {early / 1e6:.0f} MB after the first shards, {late / 1e6:.0f} MB after the last"
    )
    assert late - early < FLAT_BYTES
