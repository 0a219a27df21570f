"""The scan end to end, on real pictures and the shipped nets."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.labels.examples import read_labels
from pipeline.output.tally import spent_by
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.schema import ERRORS, FLAGGED, LEDGER
from pipeline.store import Store
from tests.conftest import small_plan, upload

pytestmark = pytest.mark.usefixtures("ray_session")


def scan(corpus: Path, output: Path, plan: Path, **options) -> dict:
    defaults = {"labels": str(corpus / "labels.parquet"), "salt": "s"}
    return run_scan(ScanConfig(source=str(corpus), output=str(output), plan=str(plan), **(defaults | options)))


def read(output: Path, table: str) -> pa.Table:
    return pq.read_table(sorted(output.glob(f"{table}/scan_date=*/*.parquet")), partitioning=None)


def verdicts(output: Path) -> dict[str, tuple]:
    """What a scan decided, by image: everything but names of runs, shards and times."""
    columns = ["outcome", "decided_stage", "decided_round", "group_id", "group_size", "category", "error_code"]
    ledger = read(output, "ledger")
    assert ledger.num_rows == len(set(ledger["image_id"].to_pylist()))
    return {row["source_uri"]: tuple(row[name] for name in columns) for row in ledger.to_pylist()}


@pytest.fixture(scope="module")
def scanned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("scanned")
    return output, scan(corpus, output, small_plan(output), shard_size=100, run_id="first")


def test_every_image_has_one_outcome_and_counts_add_up(scanned, corpus):
    output, record = scanned
    counts = record["counts"]
    assert record["status"] == "complete"
    assert counts["listed"] == 320 == sum(counts[kind] for kind in ("cleared", "flagged", "error", "skipped"))
    assert counts["flagged"] > 0 < counts["cleared"]
    ledger = read(output, "ledger")
    assert ledger.schema.names == LEDGER.names
    assert sorted(ledger["source_uri"].to_pylist()) == sorted(
        set(read_labels(str(corpus / "labels.parquet"))["uri"].to_pylist())
    )
    assert sorted(ledger["ordinal"].to_pylist()) == list(range(320))
    assert json.loads((output / "runs/first.json").read_text()) == json.loads(json.dumps(record))


FUSED = {"num_cpus": 1, "actors": {"min": 2, "max": 2}, "windows_per_call": 2}


def test_fused_operators_decide_as_those_that_stand_alone(scanned, corpus, tmp_path):
    output, record = scanned
    fused = scan(corpus, tmp_path, small_plan(tmp_path, fused=FUSED), shard_size=100, run_id="first")
    assert verdicts(tmp_path) == verdicts(output)
    assert (fused["counts"], fused["plan_version"]) == (record["counts"], record["plan_version"])
    counted = ("operator", "round", "images_in", "tests", "positive_tests", "images_out")
    mine, theirs = (
        sorted((tuple(work[name] for name in counted) for work in each["operators"]), key=str)
        for each in (fused, record)
    )
    assert mine == theirs
    for each in (fused, record):
        spent = {one.operator: one for one in spent_by(each["operators"])}
        assert list(spent) == ["fetch", "decode:group", "group", "single", "write"]
        assert all(0 < one.transfer_seconds < one.seconds for name, one in spent.items() if name in ("group", "single"))
        assert not any(one.transfer_seconds for name, one in spent.items() if name not in ("group", "single"))
        assert spent["write"].images_in == spent["fetch"].images_in == 320


def test_quality_is_what_the_tables_say(scanned, corpus):
    output, record = scanned
    rows = read_labels(str(corpus / "labels.parquet")).to_pylist()
    outcomes = {row["source_uri"]: row["outcome"] for row in read(output, "ledger").to_pylist()}
    violating = {row["uri"] for row in rows if row["label"]}
    hits = sum(outcomes[uri] == "flagged" for uri in violating)
    assert record["quality"]["positives"] == len(violating) == 40
    assert record["quality"]["recall"] == pytest.approx(hits / 40)
    assert record["quality"]["recall"] > 0.9


def test_stage_counts_are_what_the_ledger_says(scanned):
    output, record = scanned
    ledger = read(output, "ledger").to_pylist()
    first, last = record["stages"][0], record["stages"][-1]
    cleared = [row for row in ledger if row["outcome"] == "cleared" and row["decided_stage"] == first["name"]]
    assert first["images_in"] - first["images_out"] == len(cleared)
    assert last["images_in"] == first["images_out"] == last["tests"]
    assert last["images_out"] == record["counts"]["flagged"]
    assert first["rounds"][0]["tests"] == 20
    assert first["rounds"][1]["tests"] == 4 * first["rounds"][0]["positive_tests"]
    assert record["relative_cost"] == pytest.approx((first["gmac"] + last["gmac"]) / (320 * record["individual_gmac"]))


def test_a_group_negative_has_no_score_of_its_own(scanned):
    for row in read(scanned[0], "ledger").to_pylist():
        if row["decided_stage"] == "group":
            assert row["score"] is None and row["group_score"] is not None and row["category"] is None
        else:
            assert row["score"] == row["group_score"] and row["group_size"] == 1


def test_flagged_rows_tell_their_history(scanned):
    output, record = scanned
    flagged = read(output, "flagged")
    assert flagged.schema.equals(FLAGGED)
    for row in flagged.to_pylist():
        assert [step["group_size"] <= size for step, size in zip(row["stages"], (16, 4, 1), strict=True)] == [True] * 3
        assert all(step["score"] >= step["threshold"] for step in row["stages"])
        assert row["weights_sha256"] == record["weights_sha256"][row["decided_stage"]]
        assert row["image_format"] in ("JPEG", "PNG", "WEBP") and row["width"] >= 120
    for path in output.glob("flagged/*/*.parquet"):
        scores = pq.read_table(path, partitioning=None)["score"].to_pylist()
        assert scores == sorted(scores, reverse=True)


def test_duckdb_pandas_and_polars_read_the_flagged_table_in_one_line(scanned):
    output, record = scanned
    expected = record["counts"]["flagged"]
    assert duckdb.sql(f"SELECT count(*) FROM '{output}/flagged/*/*.parquet'").fetchall() == [(expected,)]
    assert len(pd.read_parquet(output / "flagged")) == expected
    assert len(pl.read_parquet(output / "flagged/**/*.parquet")) == expected


def test_nothing_is_left_behind_and_a_complete_run_never_changes(scanned, corpus):
    output, record = scanned
    assert not list(output.glob("_attempts/**/*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    again = scan(corpus, output, output / "plan.yaml", shard_size=100, run_id="first")
    assert again == json.loads(json.dumps(record))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("shard_size", "changes"),
    [
        (32, {"windows_per_call": 3, "batch_images": 16, "actors": {"min": 1, "max": 2}, "num_cpus": 0.1}),
        pytest.param(1_000_000, {"windows_per_call": 1, "batch_images": 128}, marks=pytest.mark.slow),
    ],
)
def test_call_pool_and_shard_sizes_do_not_change_a_verdict(scanned, corpus, tmp_path, shard_size, changes):
    scan(corpus, tmp_path / "out", small_plan(tmp_path, **changes), shard_size=shard_size)
    assert verdicts(tmp_path / "out") == verdicts(scanned[0])


def test_windows_in_a_burst_are_marked_in_the_ledger_and_counted_in_record_and_report(corpus, tmp_path):
    plan = small_plan(tmp_path, window={"images": 64})
    content = yaml.safe_load(plan.read_text())
    content["stages"][0]["burst"] = {"first_groups": 2, "positive": 2, "group_size": 4}
    plan.write_text(yaml.safe_dump(content))
    record = scan(corpus, tmp_path / "out", plan, shard_size=128, run_id="burst")
    by_window: dict[int, list[dict]] = {}
    for row in sorted(read(tmp_path / "out", "ledger").to_pylist(), key=lambda row: row["ordinal"]):
        by_window.setdefault(row["ordinal"] // 64, []).append(row)
    fell_back = [rows for rows in by_window.values() if any(row["burst"] for row in rows)]
    assert record["windows"] == 5 and 0 < len(fell_back) == record["stages"][0]["bursts"]
    for rows in fell_back:
        assert [row["burst"] for row in rows] == [False] * 32 + [True] * 32
        assert {row["group_size"] for row in rows[32:] if row["decided_stage"] == "group"} == {4}
        # Both first groups were positive: nobody in them was cleared before the second round.
        assert all((row["decided_stage"], row["decided_round"]) != ("group", 0) for row in rows)
    assert record["stages"][0]["images_in"] == 320 and record["stages"][1]["bursts"] is None
    page = (tmp_path / "out/runs/burst/report.html").read_text()
    assert f"Stage group, windows that fell back: {len(fell_back)} of 5." in page and "Stage single" not in page


def test_survivors_are_decoded_again_for_a_stage_of_another_size(corpus, scanned, tmp_path):
    plan = small_plan(tmp_path, num_cpus=0.3)
    content = yaml.safe_load(plan.read_text())
    content["stages"][1]["input_size"] = 128
    plan.write_text(yaml.safe_dump(content))
    record = scan(corpus, tmp_path / "out", plan)
    operators = {row["operator"]: row for row in record["operators"]}
    assert operators["decode:group"]["images_in"] == 320
    assert (
        operators["decode:single"]["images_in"] == record["stages"][0]["images_out"] == record["stages"][1]["images_in"]
    )
    for name in ("images_in", "tests", "images_out"):
        assert record["stages"][0][name] == scanned[1]["stages"][0][name]
    assert record["quality"]["recall"] > 0.9


def test_a_scan_through_s3_gives_the_verdicts_of_a_local_one(scanned, corpus, s3_endpoint, tmp_path):
    upload(corpus, s3_endpoint, "pictures")
    record = run_scan(
        ScanConfig(
            source="s3://pictures/all/",
            output="s3://pictures/results",
            endpoint_url=s3_endpoint,
            plan=str(small_plan(tmp_path)),
            shard_size=128,
            run_id="remote",
        )
    )
    assert record["counts"]["listed"] == 320
    assert abs(record["counts"]["flagged"] - scanned[1]["counts"]["flagged"]) <= 4  # other ids, other companions
    store = Store("s3://pictures/results", s3_endpoint)
    ledgers = [file for file in record["files"] if file["path"].startswith("ledger/")]
    assert sum(file["rows"] for file in ledgers) == 320 and len(ledgers) == 3
    for file in record["files"]:
        assert hashlib.sha256(store.read(file["path"])).hexdigest() == file["sha256"]


def test_files_that_vanish_or_change_after_listing_are_errors(corpus, tmp_path, monkeypatch):
    import pipeline.run.scan as module

    source = tmp_path / "source"
    source.mkdir()
    pictures = sorted((corpus / "0000").iterdir())[:40]
    for path in pictures:
        (source / path.name).write_bytes(path.read_bytes())
    build = module.build_manifest

    def build_then_break(*args, **kwargs):
        manifest = build(*args, **kwargs)
        (source / pictures[0].name).unlink()
        (source / pictures[1].name).write_bytes(pictures[2].read_bytes())
        return manifest

    monkeypatch.setattr(module, "build_manifest", build_then_break)
    record = scan(source, tmp_path / "out", small_plan(tmp_path), labels=None)
    assert record["errors"] == {"fetch_not_found": 1, "fetch_changed": 1}
    errors = read(tmp_path / "out", "errors")
    assert errors.schema.equals(ERRORS)
    assert {row["source_uri"].rsplit("/", 1)[1]: row["error_code"] for row in errors.to_pylist()} == {
        pictures[0].name: "fetch_not_found",
        pictures[1].name: "fetch_changed",
    }


@pytest.mark.slow  # with a Ray of its own; tests/test_chaos.py kills drivers on a cluster
def test_a_killed_driver_goes_on_where_it_was(corpus, scanned, tmp_path):
    output = tmp_path / "out"
    plan = small_plan(tmp_path, windows_per_call=1)
    command = [sys.executable, "-m", "jobs.scan", "--source", str(corpus), "--output", str(output)]
    command += ["--plan", str(plan), "--run-id", "killed", "--shard-size", "32", "--salt", "s"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        markers = output / "_state/killed/markers"
        deadline = time.monotonic() + 240
        while len(list(markers.glob("*.json"))) < 2:
            assert first.poll() is None and time.monotonic() < deadline, "no shard was committed in time"
            time.sleep(0.02)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    done = {path.name: json.loads(path.read_text()) for path in markers.glob("*.json")}
    assert 2 <= len(done) < 10, "the kill came too late to prove anything"
    # The last marker's files may still have to be copied; those of the others must not be touched.
    complete = [marker for marker in done.values() if all((output / file["path"]).exists() for file in marker["files"])]
    named = {output / file["path"]: file["sha256"] for marker in complete for file in marker["files"]}
    before = {path: path.stat().st_mtime_ns for path in named}
    assert json.loads((output / "runs/killed/status.json").read_text())["status"] == "running"

    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "were committed before" in second.stdout
    assert json.loads((output / "runs/killed.json").read_text())["status"] == "complete"
    for path, digest in named.items():
        assert path.stat().st_mtime_ns == before[path]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert verdicts(output) == verdicts(scanned[0])
