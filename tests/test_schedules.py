"""Several drivers of one run, interleaved operation by operation and killed at any of them.

Hypothesis chooses who goes on next and who dies. After every operation on the store the promises must
hold: what a marker or the record says never changes, and no table holds anything else.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.output import commit
from pipeline.output.commit import Ledger
from pipeline.store import Store
from tests.test_commit import Run

T = TypeVar("T")
DRIVERS = 3
STEP, DIE_BEFORE, DIE_AFTER = range(3)


class Killed(BaseException):
    """SIGKILL: nothing of the driver runs any more."""


class GatedStore(Store):
    """Does what changes or asks for state only when it is this driver's turn."""

    driver: Driver

    def create(self, key: str, body: bytes) -> bool:
        return self.driver.wait_for_turn(lambda: super(GatedStore, self).create(key, body))

    def write(self, key: str, body: bytes) -> str:
        return self.driver.wait_for_turn(lambda: super(GatedStore, self).write(key, body))

    def publish(self, source: str, target: str) -> None:
        self.driver.wait_for_turn(lambda: super(GatedStore, self).publish(source, target))

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            self.driver.wait_for_turn(lambda key=key: super(GatedStore, self).delete([key]))

    def sizes(self, prefix: str) -> dict[str, int]:
        return self.driver.wait_for_turn(lambda: super(GatedStore, self).sizes(prefix))


class Driver:
    """One driver in a thread: adopts what is there, commits what is pending, completes, sweeps."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number = run, number
        self.store = GatedStore(run.output)
        object.__setattr__(self.store, "driver", self)
        self.turn, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.action = STEP
        self.over = False
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._drive, daemon=True)
        self.thread.start()
        self.paused.acquire()

    def wait_for_turn(self, operation: Callable[[], T]) -> T:
        self.paused.release()
        self.turn.acquire()
        if self.action == DIE_BEFORE:
            raise Killed
        result = operation()
        if self.action == DIE_AFTER:
            raise Killed
        return result

    def go(self, action: int) -> None:
        """One operation of this driver, and to the brink of its next."""
        self.action = action
        self.turn.release()
        self.paused.acquire()

    def failed_rightly(self) -> bool:
        """Killed, taken over, or late: one that was taken over may find the attempts it wanted swept by the other."""
        taken_over = len(Store(self.run.output).sizes("_state/r/epochs")) > 1
        return (
            self.failure is None
            or isinstance(self.failure, Killed)
            or (isinstance(self.failure, RunError) and "taken over" in str(self.failure))
            or (isinstance(self.failure, FileNotFoundError) and taken_over)
        )

    def _drive(self) -> None:
        try:
            drive(self.run, self.store, self.number)
        except BaseException as failure:  # noqa: BLE001  failed_rightly looks at it
            self.failure = failure
        finally:
            self.over = True
            self.paused.release()


def drive(run: Run, store: Store, number: int) -> None:
    shards = list(run.manifest.shards)
    if commit.read_json(store, commit.record_key("r")):
        return
    ledger = Ledger(store, "r", "2026-01-01", shards)
    pending = {shard.index for shard in ledger.pending}
    windows = [window for window in run.windows() if window.shard in pending]
    for receipt in run.receipts(windows):
        ledger.add(receipt)
    ledger.complete({"status": "complete", "driver": number, "files": ledger.files})
    commit.sweep_attempts(store, "r")


class Promises:
    """What was seen once stays."""

    def __init__(self, run: Run) -> None:
        self.run, self.folder = run, Path(run.output)
        self.seen: dict[Path, str] = {}

    def check(self) -> None:
        markers = [json.loads(path.read_text()) for path in self.folder.glob("_state/r/markers/*.json")]
        named = {file["path"]: file["sha256"] for marker in markers for file in marker["files"]}
        for path in [*self.folder.glob("_state/r/markers/*.json"), *self.folder.glob("runs/*.json")]:
            self._stays(path)
        for table in ("ledger", "flagged", "errors", "audit"):
            for path in self.folder.glob(f"{table}/*/*.parquet"):
                self._stays(path)
                assert named[str(path.relative_to(self.folder))] == self.seen[path], "no marker names these bytes"
        assert all(path.exists() for path in self.seen), "something that was there has gone"
        record = self.folder / "runs/r.json"
        if record.exists():
            self._complete(json.loads(record.read_text()))

    def _stays(self, path: Path) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert self.seen.setdefault(path, digest) == digest, f"{path.name} changed"

    def _complete(self, record: dict[str, Any]) -> None:
        for file in record["files"]:
            assert hashlib.sha256((self.folder / file["path"]).read_bytes()).hexdigest() == file["sha256"]
        ledger = self.run.table("ledger").sort_by("ordinal")
        assert ledger["ordinal"].to_pylist() == list(range(self.run.manifest.images))
        listed = [
            row
            for shard in self.run.manifest.shards
            for row in pq.read_table(self.folder / shard.key)["image_id"].to_pylist()
        ]
        assert sorted(ledger["image_id"].to_pylist()) == sorted(listed)


TURN = st.tuples(
    st.integers(0, DRIVERS - 1), st.sampled_from([STEP] * 30 + [DIE_BEFORE, DIE_AFTER]), st.integers(1, 12)
)
"""Who goes on, how, and for how many operations."""


RUSHED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=20, **RUSHED)
@given(st.lists(TURN, max_size=40))
@example([(0, STEP, 9), (1, STEP, 60), (0, STEP, 60)])
@example([(0, STEP, 60), (1, STEP, 60), (0, DIE_AFTER, 1), (2, STEP, 60)])
# Two drivers publish one file: in a folder this once left a half-named copy that doubled its rows.
@example([(0, STEP, 6), (2, STEP, 12), (0, STEP, 2), (2, STEP, 1)])
def test_no_interleaving_of_drivers_breaks_a_promise(tmp_path_factory, turns):
    interleave(tmp_path_factory.mktemp("schedule"), turns)


@pytest.mark.slow
@settings(max_examples=1000, **RUSHED)
@given(st.lists(TURN, max_size=60))
def test_a_thousand_interleavings_break_no_promise(tmp_path_factory, turns):
    interleave(tmp_path_factory.mktemp("schedule"), turns)


def interleave(folder: Path, turns: list[tuple[int, int, int]]) -> None:
    run = Run(folder, images=48, shard_size=16)
    promises = Promises(run)
    drivers: dict[int, Driver] = {}
    for number, action, steps in turns:
        for _ in range(steps):
            driver = drivers.get(number)
            if driver is not None and driver.over:
                assert driver.failed_rightly(), repr(driver.failure)
            if driver is None or driver.over:
                # In the place of one that ended or died comes the next.
                drivers[number] = Driver(run, number)
                continue
            driver.go(action)
            promises.check()
    for driver in drivers.values():
        if not driver.over:
            driver.go(DIE_BEFORE)
        assert driver.failed_rightly(), repr(driver.failure)
    drive(run, Store(run.output), DRIVERS)
    promises.check()
    assert (Path(run.output) / "runs/r.json").exists()
