"""How runs stand: the list, one of them, following one to its end; heartbeats of living and of dead drivers. No Ray."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from jobs import status
from pipeline.errors import RunError, RunStopped, RunSuspect, StoreError, UsageError
from pipeline.listing.manifest import Shard
from pipeline.output import commit
from pipeline.plan import load_plan
from pipeline.reporting.heartbeat import STALE_SECONDS, Heartbeat, Listing, Pulse, newest_heartbeat, of_driver
from pipeline.reporting.progress import Progress
from pipeline.reporting.runs import follow, line, list_runs, read_run
from pipeline.run.driver import Driver
from pipeline.run.limits import Budget
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.tables.clean import find_litter
from tests.conftest import QUICK, small_plan
from tests.faults import Faults, fault_proxy
from tests.outputs import run_here, scan_by_hand

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def past(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def written(store: Store, run_id: str, state: str, *, ago: float = 0.0, night: int = 1, **more: Any) -> dict[str, Any]:
    """A run's status, or its record when it is complete, as a driver left it ``ago`` seconds ago."""
    content = {
        "run_id": run_id, "status": state, "started_at": f"2026-01-{night:02d}T01:00:00+00:00", "listed": 1000,
        "source": "s3://b/", "plan_version": "p1",
        "updated_at": past(ago), "plan": {"name": "p"}, "errors": {"truncated": 3},
        "counts": {"listed": 600, "cleared": 590, "flagged": 7, "error": 3, "skipped": 0}, "relative_cost": 0.25,
        "seconds": 60.0, "images_per_s": 10.0, "stages": [], "suspect": [],
    } | more  # fmt: skip
    if state == "complete":
        commit.write_json(store, commit.record_key(run_id), content)
    commit.write_json(store, commit.status_key(run_id), content)
    return content


def beat(store: Store, run_id: str, epoch: int, ago: float, decided: int) -> None:
    moment = past(ago)
    content = {"updated_at": moment, "moved_at": moment, "decided": decided, "images_per_s": 20.0, "ends_at": moment}
    commit.write_json(store, commit.heartbeat_key(run_id, epoch), content)


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path) -> Store:
    if request.param == "folder":
        return Store(str(tmp_path))
    endpoint = request.getfixturevalue("s3_endpoint")
    s3_client(endpoint).create_bucket(Bucket=f"status-{tmp_path.name[-8:].strip('_').lower()}")
    return Store(f"s3://status-{tmp_path.name[-8:].strip('_').lower()}/out", endpoint)


FINDING = {"gate": "errors", "words": "share of images in error is 0.5"}


@pytest.fixture
def filled(store) -> Store:
    written(store, "good", "complete", night=1)
    written(store, "odd", "complete", night=2, suspect=[FINDING])
    written(store, "failed", "failed", night=3, failure="storage: no")
    written(store, "stopped", "stopped", night=4, reason="the limit")
    written(store, "alive", "running", night=5, ago=4000)
    beat(store, "alive", 1, 3000, 700)
    beat(store, "alive", 2, 10, 800)
    written(store, "dead", "running", night=6, ago=4000)
    beat(store, "dead", 1, STALE_SECONDS + 60, 650)
    return store


def test_runs_are_listed_newest_first_as_they_stand(filled):
    runs = list_runs(filled, 20)
    assert [(run.run_id, run.state) for run in runs] == [
        ("dead", "stale"), ("alive", "running"), ("stopped", "stopped"), ("failed", "failed"), ("odd", "suspect"),
        ("good", "complete"),
    ]  # fmt: skip
    alive = runs[1]
    assert (alive.decided, alive.listed, alive.images_per_s) == (800, 1000, 20.0)
    assert 10 <= alive.silent_seconds < 60 < STALE_SECONDS < runs[0].silent_seconds
    assert runs[3].why == "storage: no" and "share of images in error is 0.5" in runs[4].why
    assert len(list_runs(filled, 2)) == 2


def test_the_job_says_so_as_a_table_as_objects_and_for_prometheus(filled):
    where = ("--output", filled.name, *(("--endpoint-url", filled.endpoint_url) if filled.endpoint_url else ()))
    table = run_here(status, *where).stdout
    names = ("dead", "alive", "stopped", "failed", "odd", "good")
    assert re.findall(rf"^│ ({'|'.join(names)}) ", table, re.MULTILINE) == list(names) and "0.250" in table
    objects = [json.loads(line) for line in run_here(status, *where, "--json").stdout.splitlines()]
    assert [entry["state"] for entry in objects] == ["stale", "running", "stopped", "failed", "suspect", "complete"]
    one = run_here(status, *where, "--run-id", "failed")
    assert one.returncode == 0 and "why: storage: no" in one.stdout
    text = run_here(status, *where, "--prometheus").stdout
    series = {
        (sample.name, sample.labels["run_id"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert series["dorfman_run_suspect_gates", "odd"] == 1 and series["dorfman_run_suspect_gates", "good"] == 0
    said = newest_heartbeat(filled, "dead")
    assert said is not None
    moment = datetime.fromisoformat(said["updated_at"]).timestamp()
    assert series["dorfman_run_heartbeat_timestamp_seconds", "dead"] == pytest.approx(moment, abs=1e-3)
    assert ("dorfman_run_heartbeat_timestamp_seconds", "good") not in series
    assert run_here(status, *where, "--accept", "odd").stdout == "run odd: accepted\n"
    assert read_run(filled, "odd").state == "complete"
    text = run_here(status, *where, "--prometheus").stdout
    assert 'dorfman_run_suspect_gates{plan="p",run_id="odd"} 0.0\n' in text


def test_what_was_started_last_is_listed_and_so_is_what_goes_on_whenever_it_was_written(tmp_path):
    """As after an erasure, which writes old records anew, beside a run that has been going on for weeks."""
    store = Store(str(tmp_path))
    written(store, "weeks", "running", night=1, ago=4000)
    written(store, "given-up", "failed", night=2)
    for night in range(9, 19):
        written(store, f"n{night:02d}", "complete", night=night)
    for night in range(2, 9):
        written(store, f"n{night:02d}", "complete", night=night)
    assert [run.run_id for run in list_runs(store, 3)] == ["n18", "n17", "n16", "weeks"]
    text = run_here(status, "--output", store.name, "--prometheus", "--limit", "3").stdout
    families = text_string_to_metric_families(text)
    assert {sample.labels["run_id"] for family in families for sample in family.samples} == {
        "n18", "n17", "n16", "weeks"
    }  # fmt: skip


LACKING = b'{"run_id": "x", "source": "s", "started_at": "2026-01-09", "plan_version": "p", "status": "complete"}'


@pytest.mark.parametrize("body", [b"{}", b"{", LACKING], ids=["empty", "cut off", "lacking"])
@pytest.mark.parametrize("key", [commit.record_key("x"), commit.status_key("x")])
def test_a_spoilt_record_is_named_and_takes_no_other_run_away(tmp_path, caplog, key, body):
    store = Store(str(tmp_path))
    written(store, "good", "complete")
    store.write(key, body.replace(b"complete", b"failed") if "status" in key else body)
    told = f"{key} in {store.name} is not the JSON that was written there: put it back from a copy, or take it away"
    table = run_here(status, "--output", store.name, "--json")
    assert [json.loads(line)["run_id"] for line in table.stdout.splitlines()] == ["good"] and table.returncode == 0
    text = run_here(status, "--output", store.name, "--prometheus").stdout
    assert 'run_id="good"' in text and 'run_id="x"' not in text
    assert [record.getMessage().startswith(told) for record in caplog.records] == [True, True]
    one = run_here(status, "--output", store.name, "--run-id", "x")
    assert one.returncode == 2 and one.stderr.startswith(f"jobs.status: {told}")


@pytest.mark.parametrize(
    ("run_id", "code", "words"),
    [("good", 0, ""), ("odd", 3, "complete but suspect"), ("failed", 1, "storage: no"), ("stopped", 4, "the limit"),
     ("dead", 1, "start it again with --run-id dead"), ("none", 2, "there is no run 'none'")],
)  # fmt: skip
def test_who_follows_a_run_ends_as_it_did(filled, run_id, code, words):
    where = ("--output", filled.name, *(("--endpoint-url", filled.endpoint_url) if filled.endpoint_url else ()))
    result = run_here(status, *where, "--run-id", run_id, "--follow")
    assert result.returncode == code and words in result.stderr


def test_a_run_is_followed_while_it_goes_on(tmp_path):
    store = Store(str(tmp_path))
    written(store, "r", "running")
    said, pauses = [], []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            beat(store, "r", 1, 0, 900)
        elif len(pauses) == 3:
            written(store, "r", "complete", counts={"listed": 1000, "flagged": 9, "error": 3})

    assert follow(store, "r", said.append, pause).state == "complete"
    assert [(run.state, run.decided) for run in said] == [("running", 600), ("running", 900), ("complete", 1000)]
    assert len(pauses) == 3 and set(pauses) == {5.0}


class Away:
    """An output that does not answer, once it has been followed for a moment, for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.until = seconds, 0.0
        self.faults = Faults(share={"503": 1.0}, matches=lambda *_: time.monotonic() < self.until)

    def begin(self) -> None:
        self.until = time.monotonic() + self.seconds


@pytest.fixture
def followed(s3_endpoint: str, tmp_path: Path) -> Store:
    bucket = f"followed-{tmp_path.name[-8:].strip('_').lower()}"
    s3_client(s3_endpoint).create_bucket(Bucket=bucket)
    store = Store(f"s3://{bucket}/out", s3_endpoint)
    written(store, "r", "running")
    return store


def test_an_output_that_is_away_for_a_while_is_waited_for_and_its_driver_too(followed, monkeypatch):
    """Away for longer than a driver may be silent, which could not say that it is alive."""
    monkeypatch.setattr("pipeline.reporting.runs.BEAT_SECONDS", 0.5)
    away, said, pauses = Away(1.5), [], []

    def pause(_: float) -> None:
        pauses.append(1)
        if len(pauses) == 1:
            written(followed, "r", "running", ago=STALE_SECONDS + 60)
            away.begin()
        else:
            written(followed, "r", "complete")

    with fault_proxy(followed.endpoint_url, away.faults) as url:
        follow(replace(followed, endpoint_url=url), "r", lambda run: said.append(run.state), pause)
    assert said == ["running", "stale", "complete"] and away.faults.hits["503"] > 1


def test_an_output_that_stays_away_ends_who_follows_as_a_failure_of_no_run(followed, monkeypatch):
    monkeypatch.setattr("pipeline.reporting.runs.FOLLOW_PATIENCE", 0.2)
    away = Away(600)
    with fault_proxy(followed.endpoint_url, away.faults) as url:
        store = replace(followed, endpoint_url=url)
        with pytest.raises(
            RunError, match=r"^storage: .*503.*; how run 'r' stands cannot be seen .*: follow it again$"
        ):
            follow(store, "r", lambda _: None, lambda _: away.begin())


def test_wrong_usage_is_named(tmp_path):
    written(Store(str(tmp_path)), "r", "complete")
    for arguments, words in (
        (("--follow",), "--follow wants to know which run"),
        (("--limit", "0"), "limit is 0"),
        (("--prometheus", "--json"), "--prometheus lists runs"),
        (("--accept", "none"), "no complete run of that name"),
    ):
        result = run_here(status, "--output", str(tmp_path), *arguments)
        assert result.returncode == 2 and words in result.stderr


def test_errors_carry_the_exit_codes_of_a_scan():
    codes = {error: error.exit_code for error in (RunError, UsageError, RunSuspect, RunStopped)}
    assert list(codes.values()) == [1, 2, 3, 4]


def test_a_status_starts_without_torch_and_ray():
    code = "import sys, jobs.status; sys.exit(', '.join({'torch', 'ray'} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pulse_tells_rate_and_end_of_the_last_minutes():
    pulse = Pulse(10_000, 100, NOW)
    for number in range(1, 21):
        seen = pulse.beat(100 + 60 * number, 60 * number, NOW + timedelta(seconds=30 * number))
    assert (seen["decided"], seen["images_per_s"]) == (1300, 2.0)
    assert datetime.fromisoformat(seen["ends_at"]) == NOW + timedelta(seconds=600 + 8700 / 2)
    moved = seen["moved_at"]
    for number in range(21, 32):
        seen = pulse.beat(1300, 1200, NOW + timedelta(seconds=30 * number))
    assert seen["moved_at"] == moved and seen["ends_at"] is None and seen["images_per_s"] == 0


def test_what_earlier_runs_judged_moves_a_pulse_and_tells_no_rate():
    pulse = Pulse(10_000, 0, NOW)
    seen = pulse.beat(9_000, 0, NOW + timedelta(seconds=30))
    assert (seen["decided"], seen["images_per_s"], seen["ends_at"]) == (9_000, 0, None)
    assert datetime.fromisoformat(seen["moved_at"]) == NOW + timedelta(seconds=30)
    seen = pulse.beat(9_060, 60, NOW + timedelta(seconds=60))
    assert seen["images_per_s"] == 1 and seen["ends_at"] == (NOW + timedelta(seconds=60 + 940)).isoformat()


def test_an_incremental_night_is_as_fast_as_what_it_looks_at(tmp_path):
    """Its rate and its windows leave out what the night before has judged."""
    source, output = tmp_path / "source", str(tmp_path / "out")
    source.mkdir()
    for number in range(99):
        (source / f"{number}.jpg").write_bytes(b"a picture")
    plan = small_plan(tmp_path, QUICK, window={"images": 32})
    first = scan_by_hand(source, output, plan, "one", lambda _: "cleared")
    assert first["images_per_s"] * first["seconds"] == pytest.approx(99)
    (source / "new.jpg").write_bytes(b"another")
    second = scan_by_hand(source, output, plan, "two", lambda _: "cleared", since="last", known_content=False)
    assert second["counts"]["listed"] == 100 and second["images_per_s"] * second["seconds"] == pytest.approx(1)
    assert (first["windows"], second["windows"]) == (4, 1)
    idle = scan_by_hand(source, output, plan, "three", lambda _: "cleared", since="last")
    assert idle["counts"]["listed"] == 100 and (idle["images_per_s"], idle["windows"]) == (0, 0)


def test_a_line_of_progress_counts_what_earlier_runs_judged_and_has_the_rate_of_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.reporting.progress.LINE_SECONDS", -1)
    printed = io.StringIO()
    progress = Progress("r", load_plan(str(small_plan(tmp_path, QUICK))), 1_000, 50, Console(file=printed, width=200))
    progress.committed(Shard(index=0, images=900, windows=9, key="", sha256="", judged=True), 1, 2)
    progress.began -= 10
    progress.add({"outcomes": [{"outcome": "cleared", "images": 20}], "work": []})
    assert "970 of 1,000 images, 2/s;" in printed.getvalue()


def wait_for(happened: threading.Event) -> None:
    assert happened.wait(10), "nothing came for ten seconds"


def test_a_heartbeat_moves_between_commits_and_ends_with_its_driver(tmp_path):
    store, decided, told = Store(str(tmp_path)), [5], []
    twice = threading.Event()

    def tell(seen: dict[str, Any]) -> None:
        told.append(seen)
        decided[0] = 9
        if len(told) > 2:
            twice.set()

    with of_driver(store, "r", 3, 10, lambda: (decided[0], decided[0]), tell, seconds=0.02) as heartbeat:
        wait_for(twice)
    heartbeat.thread.join(10)
    seen = newest_heartbeat(store, "r")
    assert seen is not None and (seen["decided"], seen["listed"], seen["epoch"]) == (9, 10, 3)
    count = len(told)
    time.sleep(0.1)
    assert len(told) == count
    assert newest_heartbeat(store, "other") is None


def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    tries, thrice = [], threading.Event()

    def write(*_: Any) -> str:
        tries.append(1)
        if len(tries) > 2:
            thrice.set()
        raise OSError("the output is away")

    monkeypatch.setattr(Store, "write", write)
    with Heartbeat(Store(str(tmp_path)), "beat.json", dict, seconds=0.01):
        wait_for(thrice)


def test_a_write_that_hangs_keeps_no_driver(tmp_path, monkeypatch):
    hangs, released = threading.Event(), threading.Event()

    def write(*_: Any) -> str:
        hangs.set()
        released.wait(30)
        return ""

    monkeypatch.setattr(Store, "write", write)
    began = time.perf_counter()
    with Heartbeat(Store(str(tmp_path)), "beat.json", dict) as heartbeat:
        wait_for(hangs)
    assert time.perf_counter() - began < 5 and heartbeat.thread.daemon
    released.set()


def until(seen: Callable[[], bool]) -> None:
    """Waits until it is so."""
    end = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < end, "it did not come in a minute"
        time.sleep(0.02)


def test_a_run_is_listing_while_its_source_is_listed_and_nothing_when_that_fails(tmp_path, monkeypatch):
    """Looked at from within the listing: the first beat says that it has begun, a later one how much has come."""
    store, seen = Store(str(tmp_path / "out")), []
    monkeypatch.setattr("pipeline.run.scan.Listing", partial(Listing, seconds=0.02))

    def listing(*_: Any) -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"uri": f"s3://b/{number}.jpg", "size_bytes": 1, "etag": "e", "modified_at": None}
        until(lambda: [run.listed for run in list_runs(store, 5)] == [3])
        seen.extend(list_runs(store, 5))
        text = run_here(status, "--output", store.name, "--prometheus").stdout
        assert 'dorfman_run_listed{plan="emblem",run_id="night"} 3.0' in text
        raise UsageError("the source is gone")

    monkeypatch.setattr("pipeline.run.scan.list_source", listing)
    with pytest.raises(UsageError, match="the source is gone"):
        run_scan(ScanConfig(source="s3://b/", output=store.name, run_id="night"))
    (run,) = seen
    assert (run.run_id, run.state, run.listed, run.decided) == ("night", "listing", 3, 0)
    assert line(run).startswith("run night: listing, 3 images so far")
    assert list_runs(store, 5) == []


def test_a_source_without_images_leaves_no_run(tmp_path):
    (tmp_path / "source").mkdir()
    store = Store(str(tmp_path / "out"))
    with pytest.raises(UsageError, match="holds no images"):
        run_scan(ScanConfig(source=str(tmp_path / "source"), output=store.name, run_id="night"))
    assert list_runs(store, 5) == [] and not store.sizes("_state/night")


def test_the_record_of_a_failed_run_is_made_once_and_says_why(tmp_path, monkeypatch):
    """And without the files, which would make a status of a large run as large as its record."""
    made, record_of = [], Driver._record

    def record(self: Driver, status: str, *rest: Any) -> dict[str, Any]:
        made.append(status)
        return record_of(self, status, *rest)

    monkeypatch.setattr(Driver, "_record", record)
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"a picture")

    def break_off(_: str) -> str:
        raise OSError("the disk is gone")

    with pytest.raises(RunError, match="the disk is gone"):
        scan_by_hand(source, str(tmp_path / "out"), small_plan(tmp_path, QUICK), "night", break_off)
    assert made == ["running", "failed"]
    status = commit.read_json(Store(str(tmp_path / "out")), commit.status_key("night"))
    assert status is not None and "the disk is gone" in status["failure"] and "files" not in status


@pytest.mark.parametrize("how", ["refused", "taken over"])
def test_a_run_that_stops_at_a_limit_ends_as_stopped_whatever_becomes_of_its_status(tmp_path, monkeypatch, how):
    """Where the output refuses it, or a newer driver has written its own."""
    source, store, check = tmp_path / "source", Store(str(tmp_path / "out")), Budget.check
    source.mkdir()
    for number in range(96):
        (source / f"{number}.jpg").write_bytes(b"a picture")
    key = commit.status_key("night")

    def check_late(*arguments: Any) -> None:
        if how == "refused":
            monkeypatch.setattr(Store, "write", refuse)
        else:
            store.create("_state/night/epochs/000002.json", b"{}")
            commit.write_json(store, key, {"status": "running", "of": "the newer one"})
        check(*arguments)

    def refuse(*_: Any) -> str:
        raise StoreError("the output refuses")

    monkeypatch.setattr(Budget, "check", check_late)
    with pytest.raises(RunStopped, match=r"run 'night' stopped: 1\.0 GMAC are done, .*--run-id night to go on"):
        scan_by_hand(
            source, store.name, small_plan(tmp_path, QUICK, window={"images": 32}), "night", lambda _: "cleared",
            shard_size=32, limit_cost=1.5,
        )  # fmt: skip
    left = commit.read_json(store, key)
    assert left is not None and left["status"] == "running" and ("of" in left) == (how == "taken over")


def test_a_driver_that_died_while_it_listed_is_stale_until_somebody_goes_on(store):
    def listed(name: str, ago: float) -> None:
        content = {"run_id": "r", "plan": {"name": "p"}, "started_at": past(ago + 60), "updated_at": past(ago)}
        commit.write_json(store, f"{commit.listing_prefix('r')}/{name}.json", content | {"listed": int(ago)})

    listed("b", STALE_SECONDS + 100)
    assert (read_run(store, "r").state, read_run(store, "r").listed) == ("stale", 280)
    with pytest.raises(RunError, match="start it again with --run-id r"):
        follow(store, "r", lambda _: None)
    litter = find_litter(store, timedelta(0))
    assert [entry.keys for entry in litter] == [("_state/r/listing/b.json",)]
    listed("a", 10)
    assert (read_run(store, "r").state, read_run(store, "r").listed) == ("listing", 10)
    said: list[str] = []

    def begin(_: float) -> None:
        written(store, "r", "complete")

    follow(store, "r", lambda run: said.append(run.state), begin)
    assert said == ["listing", "complete"] and [run.state for run in list_runs(store, 5)] == ["complete"]
