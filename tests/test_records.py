"""Records of earlier runs: read side by side, once, without their files, and the broken ones as what they are."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.past.baseline import earlier_runs
from pipeline.past.history import read_history
from pipeline.past.records import READERS, PastRuns, last_started
from pipeline.review.queue import newest_run
from pipeline.store import Store
from tests.test_report import run_record


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often each object has been read."""
    counted: Counter = Counter()
    read = Store.read

    def count(self: Store, key: str, *args: Any) -> bytes:
        counted[key] += 1
        return read(self, key, *args)

    monkeypatch.setattr(Store, "read", count)
    return counted


def written(store: Store, runs: int) -> list[dict[str, Any]]:
    records = [
        run_record(run_id=f"n{number:02d}", started_at=f"2026-03-{1 + number:02d}T02:00:00+00:00", banks_sha256={})
        | {"parent_run_id": None, "files": [{"path": "ledger/a", "rows": 1}]}
        for number in range(runs)
    ]
    for record in records:
        commit.write_json(store, commit.record_key(record["run_id"]), record)
    return records


def test_gates_and_trends_read_each_record_once_and_only_audits_that_are_there(tmp_path, reads):
    store = Store(str(tmp_path))
    records = written(store, 20)
    commit.write_json(store, commit.audit_key("n03"), {"estimates": {}, "run_ids": [], "confidence": 0.95})
    past = PastRuns(store)
    tonight = records[-1]
    assert [run["run_id"] for run in earlier_runs(past, tonight)] == [f"n{number:02d}" for number in range(18, 4, -1)]
    assert len(read_history(past, tonight).nights) == 20
    assert reads == Counter({commit.record_key(f"n{number:02d}"): 1 for number in range(20)} | {
        commit.audit_key("n03"): 1
    })  # fmt: skip


def test_records_are_read_side_by_side(tmp_path, monkeypatch):
    """Each of ``READERS`` reads waits until all of them have begun: one after the other would never end."""
    store = Store(str(tmp_path))
    written(store, READERS)
    together, read = threading.Barrier(READERS, timeout=60), Store.read

    def wait(self: Store, key: str, *args: Any) -> bytes:
        together.wait()
        return read(self, key, *args)

    monkeypatch.setattr(Store, "read", wait)
    names = [f"n{number:02d}" for number in np.random.default_rng(1).permutation(READERS)]
    found = list(PastRuns(store).read(names))
    assert [name for name, _ in found] == names == [content["run_id"] for _, content in found]
    assert all("files" not in content for _, content in found)


def test_what_is_broken_is_raised_where_whole_records_are_wanted_and_what_is_gone_is_not_there(tmp_path):
    store = Store(str(tmp_path))
    written(store, 2)
    store.write(commit.record_key("n01"), b"{")
    past = PastRuns(store)
    found = dict(past.read(["n00", "n01", "gone"]))
    assert found["n00"]["run_id"] == "n00" and found["gone"] is None
    with pytest.raises(ValueError, match="Expecting property name"):
        list(past.whole(["n00", "n01"]))
    assert [run["run_id"] for run in past.whole(["gone", "n00"])] == ["n00"]


def test_the_newest_are_those_that_were_started_last_whenever_they_were_written():
    """An erasure has written sixty old records anew: of the others little more is read than is wanted."""
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    started = {f"r{number:03d}": noon + timedelta(days=number) for number in range(300)}
    written = {run_id: moment + timedelta(hours=2) for run_id, moment in started.items()}
    read: list[str] = []

    def read_them(run_ids: Iterable[str]) -> Iterator[tuple[str, Any]]:
        read.extend(run_ids)
        return ((run_id, {"started_at": started[run_id].isoformat()}) for run_id in run_ids)

    newest = [f"r{number:03d}" for number in range(299, 285, -1)]
    assert [run_id for run_id, _ in last_started(written, read_them, 14)] == newest
    assert len(read) == READERS
    written |= {f"r{number:03d}": noon + timedelta(days=400) for number in range(60)}
    read.clear()
    assert [run_id for run_id, _ in last_started(written, read_them, 14)] == newest
    assert set(newest) < set(read) and len(read) <= 60 + 14 + READERS
    read.clear()
    rare = last_started(written, read_them, 2, lambda run_id, _: run_id in ("r070", "r003", "r002"))
    assert [run_id for run_id, _ in rare] == ["r070", "r003"] and len(read) == 300, "others come between"


def test_what_is_broken_stands_where_it_was_written_and_takes_no_place():
    days = {name: datetime(2026, 3, 1 + day, tzinfo=UTC) for day, name in enumerate(("a", "b", "old", "c", "new"))}
    contents = {name: {"started_at": days[name].isoformat()} for name in "abc"} | {
        "old": {"started_at": "then"}, "new": UsageError("no JSON"),
    }  # fmt: skip
    found = last_started(days, lambda run_ids: ((name, contents[name]) for name in run_ids), 2)
    assert [name for name, _ in found] == ["new", "c", "old", "b"]
    assert [type(content) for _, content in found] == [UsageError, dict, ValueError, dict]


def test_gates_and_trends_and_reviews_look_past_old_records_that_were_written_anew(tmp_path):
    store = Store(str(tmp_path))
    tonight = written(store, 20)[-1]
    for number in range(500):
        old = tonight | {"run_id": f"old-{number}", "started_at": f"2025-01-01T{number // 60:02d}:{number % 60:02d}:00"}
        commit.write_json(store, commit.record_key(old["run_id"]), old | {"source": "s3://elsewhere/"})
    past = PastRuns(store)
    assert [run["run_id"] for run in earlier_runs(past, tonight)] == [f"n{number:02d}" for number in range(18, 4, -1)]
    assert [night.run_id for night in read_history(past, tonight).nights] == [f"n{number:02d}" for number in range(20)]
    assert newest_run(store) == "n19"
    store.write(commit.record_key("old-7"), b"{")
    with pytest.raises(UsageError, match=r"runs/old-7\.json .+ put it back from a copy"):
        newest_run(store)
