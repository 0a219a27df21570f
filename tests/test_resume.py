"""Runs that stop for want of something, and go on when it is there again; and errors taken up by another run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RunError, UsageError
from pipeline.output.sink import table_bytes
from pipeline.past.retry import list_failed
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.schema import ERRORS
from pipeline.storage import s3_client
from pipeline.store import Store, digest
from tests.conftest import QUICK, small_plan
from tests.faults import Faults, fault_proxy

pytestmark = pytest.mark.usefixtures("ray_session")


def config(source: Path, output: object, folder: Path, **options: object) -> ScanConfig:
    plan = str(small_plan(folder, QUICK, window={"images": 32}))
    defaults = {"run_id": "r", "salt": "s", "shard_size": 64, "plan": plan}
    return ScanConfig(source=str(source), output=str(output), **(defaults | options))


def outcomes(output: Path, run_id: str = "r") -> dict[str, tuple[str, str | None]]:
    files = sorted(output.glob(f"ledger/*/{run_id}-shard-*.parquet"))
    rows = [row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()]
    assert len(rows) == len({row["source_uri"] for row in rows})
    return {row["source_uri"].rsplit("/", 1)[1]: (row["outcome"], row["error_code"]) for row in rows}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_fails_by_name_and_the_run_goes_on_when_there_is_room(corpus, tmp_path, small_disk):
    output, ballast = small_disk / "out", small_disk / "ballast"
    wanted = config(corpus, output, tmp_path, output_patience=2)
    stop = threading.Event()

    def fill() -> None:
        """Takes all room as soon as a shard is committed."""
        while not list(output.glob("_state/r/markers/*.json")) and not stop.wait(0.01):
            pass
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while not stop.is_set():
                file.write(b"x" * 4096)

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        with pytest.raises(RunError, match=r"No space left on device.*start it again with --run-id r to go on"):
            run_scan(wanted)
    finally:
        stop.set()
        filler.join()
    before = {path: path.read_bytes() for path in output.glob("_state/r/markers/*.json")}
    assert 1 <= len(before) < 5
    ballast.unlink()
    record = run_scan(wanted)
    assert record["committed_before"] == 64 * len(before)
    assert {path: path.read_bytes() for path in before} == before
    assert Counter(outcome for outcome, _ in outcomes(output).values()).total() == 320


class Closed:
    """An output that refuses writes from its first marker on, for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.since = seconds, 0.0
        self.faults = Faults(share={"403": 1.0}, matches=self.refuses)

    def refuses(self, method: str, key: str) -> bool:
        if not self.since and method == "PUT" and "/markers/" in key:
            self.since = time.monotonic()
            return False
        return bool(self.since) and method == "PUT" and time.monotonic() - self.since < self.seconds


@pytest.fixture(scope="module")
def moody(s3_endpoint: str) -> str:
    s3_client(s3_endpoint).create_bucket(Bucket="moody")
    return s3_endpoint


@pytest.mark.slow
def test_an_output_that_refuses_writes_for_a_while_is_waited_for(corpus, tmp_path, moody):
    closed = Closed(6.0)
    with fault_proxy(moody, closed.faults) as url:
        wanted = config(corpus, "s3://moody/waited", tmp_path, endpoint_url=url, output_patience=60, kms_key="key")
        record = run_scan(wanted)
    assert record["counts"]["listed"] == 320 and record["committed_before"] == 0
    assert closed.faults.hits["403"] > 1
    check_everything_is_under_the_key(moody, "waited/")


def check_everything_is_under_the_key(endpoint: str, prefix: str) -> None:
    client = s3_client(endpoint)
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="moody", Prefix=prefix)["Contents"]]
    heads = [client.head_object(Bucket="moody", Key=key) for key in keys]
    assert len(heads) > 20 and {head.get("SSEKMSKeyId") for head in heads} == {"key"}


def test_a_stream_that_ends_early_completes_nothing_and_only_the_rest_is_done_later(corpus, tmp_path, monkeypatch):
    import pipeline.run.driver as module

    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(corpus, source)
    wanted = config(source, output, tmp_path)
    stream = module.stream
    monkeypatch.setattr(module, "stream", lambda *args: list(stream(*args))[:-1])
    with pytest.raises(RunError, match=r"1 shards were not finished though the stream has ended.*--run-id r to go on"):
        run_scan(wanted)
    assert not (output / "runs/r.json").exists()
    status = json.loads((output / "runs/r/status.json").read_text())
    assert (status["status"], status["counts"]["listed"]) == ("failed", 256) and "not finished" in status["failure"]
    assert "Traceback" in (output / "runs/r/failure.txt").read_text()

    # What comes to the source later is another run's, and so is another plan.
    shutil.copy(next(source.rglob("*.jpg")), source / "later.jpg")
    (tmp_path / "other").mkdir()
    other = small_plan(tmp_path / "other", QUICK, window={"images": 16})
    with pytest.raises(UsageError, match="'r' was started with plan version"):
        run_scan(replace(wanted, plan=str(other)))

    done = {json.loads(path.read_text())["shard"] for path in output.glob("_state/r/markers/*.json")}
    assert len(done) == 4
    asked: list[int] = []

    def note(plan: object, refs: pa.Table, destination: object) -> Iterator[dict]:
        asked.extend(refs["shard"].to_pylist())
        return stream(plan, refs, destination)

    monkeypatch.setattr(module, "stream", note)
    record = run_scan(wanted)
    assert set(asked) == set(range(5)) - done
    assert (record["listed"], record["committed_before"]) == (320, 256) and len(outcomes(output)) == 320
    assert "later.jpg" not in outcomes(output)

    shutil.rmtree(output / "_state")
    before = contents(output)
    assert run_scan(wanted) == json.loads(json.dumps(record))
    after = contents(output)
    assert {path: after[path] for path in before} == before


@pytest.mark.slow
def test_an_output_that_refuses_writes_for_too_long_fails_the_run_which_goes_on_later(corpus, tmp_path, moody):
    closed = Closed(600.0)
    store = Store("s3://moody/later", moody)
    with fault_proxy(moody, closed.faults) as url:
        wanted = config(corpus, store.uri, tmp_path, endpoint_url=url, output_patience=3)
        with pytest.raises(RunError, match=r"403 Forbidden.*--run-id r to go on"):
            run_scan(wanted)
        markers = {key: store.read(key) for key in store.sizes("_state/r/markers")}
        assert len(markers) == 1
        closed.seconds = 0.0
        record = run_scan(wanted)
    assert record["counts"]["listed"] == 320 and record["committed_before"] == 64
    assert {key: store.read(key) for key in markers} == markers


@pytest.fixture
def half_readable(corpus: Path, tmp_path: Path) -> Path:
    """Forty pictures, a file that is none, and a bucket's usual bad luck: two that change, one that vanishes."""
    source = tmp_path / "source"
    source.mkdir()
    for path in sorted((corpus / "0000").iterdir())[:40]:
        (source / path.name).write_bytes(path.read_bytes())
    (source / "text.jpg").write_text("no picture")
    return source


def test_errors_that_may_pass_are_scanned_again_in_a_run_of_their_own(half_readable, tmp_path, monkeypatch):
    import pipeline.run.scan as module

    names = sorted(path.name for path in half_readable.glob("0*"))
    changed, gone, fine = names[0], names[1], names[2]
    build = module.build_manifest

    def build_then_break(*args: object, **options: object):
        manifest = build(*args, **options)
        (half_readable / changed).write_bytes((half_readable / fine).read_bytes())
        (half_readable / gone).unlink()
        return manifest

    output = tmp_path / "out"
    monkeypatch.setattr(module, "build_manifest", build_then_break)
    parent = run_scan(config(half_readable, output, tmp_path))
    monkeypatch.undo()
    assert parent["errors"] == {"fetch_changed": 1, "fetch_not_found": 1, "not_an_image": 1}

    wanted = config("", output, tmp_path, retry_errors="r", run_id="again")
    record = run_scan(wanted)
    assert (record["parent_run_id"], record["source"], record["listed"]) == ("r", str(half_readable), 1)
    ((name, (outcome, _)),) = outcomes(output, "again").items()
    assert name == changed and outcome in ("cleared", "flagged")
    assert outcomes(output)[changed] == ("error", "fetch_changed"), "the parent stays as it was"
    with pytest.raises(UsageError, match="again has no errors that may pass"):
        run_scan(config("", output, tmp_path, retry_errors="again", run_id="third"))
    with pytest.raises(UsageError, match="--retry-errors none: no complete run of that name"):
        run_scan(config("", output, tmp_path, retry_errors="none", run_id="third"))
    with pytest.raises(UsageError, match="was started with --retry-errors r, not with no --retry-errors"):
        run_scan(config(half_readable, output, tmp_path, run_id="again"))
    check_report_is_added(wanted, output, record)


def test_what_may_pass_is_taken_from_the_errors_of_its_parent(s3_endpoint, tmp_path):
    client = s3_client(s3_endpoint)
    client.create_bucket(Bucket="parent")
    may_pass = [
        "fetch_denied", "fetch_throttled", "fetch_timeout", "fetch_failed", "fetch_short", "fetch_corrupt",
        "decode_memory", "decode_timeout", "decode_crash",
    ]  # fmt: skip
    codes = [*may_pass, "fetch_not_found", "too_large", "empty", "not_an_image", "truncated", "score_not_finite"]
    rows = [{"source_uri": f"s3://parent/{code}", "error_code": code, "etag": "old", "size_bytes": 7} for code in codes]
    rows += [
        {"source_uri": f"s3://parent/{name}", "error_code": "fetch_changed", "etag": "old"} for name in ("new", "x")
    ]
    etag = client.put_object(Bucket="parent", Key="new", Body=b"four")["ETag"].strip('"')
    store = Store(str(tmp_path))
    body = table_bytes(pa.Table.from_pylist(rows, ERRORS))
    store.write("errors/e.parquet", body)
    record = {"files": [{"path": "errors/e.parquet", "rows": len(rows), "sha256": digest(body)}]}
    found = {row["uri"]: (row["etag"], row["size_bytes"]) for row in list_failed(store, record, s3_endpoint)}
    as_it_was = {f"s3://parent/{code}": ("old", 7) for code in may_pass}
    assert found == as_it_was | {"s3://parent/new": (etag, 4), "s3://parent/x": (None, None)}


def check_report_is_added(wanted: ScanConfig, output: Path, record: dict) -> None:
    """A complete run without its report gets one when it is started again, and nothing else changes."""
    status = json.loads((output / "runs/again/status.json").read_text())
    assert status["status"] == "complete" and status["counts"] == record["counts"]
    report = output / "runs/again/report.html"
    page = report.read_bytes()
    report.unlink()
    before = contents(output)
    assert run_scan(wanted) == json.loads(json.dumps(record))
    assert report.read_bytes() == page
    report.unlink()
    assert contents(output) == before


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), os.stat(path).st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
