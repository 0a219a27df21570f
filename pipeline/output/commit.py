"""Exactly once: from attempt files to tables, one shard at a time, by whichever driver comes first.

    OUT/_state/<run_id>/run.json             what the run is: frozen when it starts
    OUT/_state/<run_id>/listing/             one file per driver that lists the source, which says that it is alive
    OUT/_state/<run_id>/manifest-*/          one file per shard; run.json names the folder that counts
    OUT/_state/<run_id>/epochs/000001.json   one per driver that took the run over
    OUT/_state/<run_id>/heartbeats/          one file per driver, which says every half minute that it is alive
    OUT/_state/<run_id>/markers/shard-*.json the decision that a shard is done, and with which files
    OUT/_attempts/<run_id>/                  what the sink wrote; read by nobody but this module
    OUT/<table>/scan_date=D/<run_id>-shard-00000.parquet
    OUT/runs/<run_id>/status.json            running or failed, and how far: overwritten as it goes
    OUT/runs/<run_id>.json                   the run record: created last; only erase.py and compact.py replace it

A marker is created by conditional PUT and comes before the files it names: it decides which attempt
counts, and copying that attempt to its name in the table is a step that any driver may repeat. So a
driver puts no file into a table that no marker names, and two drivers cannot disagree.
"""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import RunError, UsageError
from pipeline.listing.manifest import Shard
from pipeline.output.merge import GROUP_ROWS, in_order, unchanged_rows, write_ledger
from pipeline.output.reconcile import check_outage, reconcile
from pipeline.output.record import fault
from pipeline.output.sink import table_bytes
from pipeline.output.tally import Tally
from pipeline.store import Store, digest

READERS = 16
"""Threads that read a shard's attempts: from a distant store one after the other would take minutes."""


def state_prefix(run_id: str) -> str:
    return f"_state/{run_id}"


def attempts_prefix(run_id: str) -> str:
    return f"_attempts/{run_id}"


def record_key(run_id: str) -> str:
    return f"runs/{run_id}.json"


def status_key(run_id: str) -> str:
    return f"runs/{run_id}/status.json"


def failure_key(run_id: str) -> str:
    return f"runs/{run_id}/failure.txt"


def heartbeat_key(run_id: str, epoch: int) -> str:
    """Of a driver, not of the run: one that was cut off and goes on does not write over that of who took over."""
    return f"{state_prefix(run_id)}/heartbeats/{epoch:06d}.json"


def listing_prefix(run_id: str) -> str:
    return f"{state_prefix(run_id)}/listing"


def accepted_key(run_id: str) -> str:
    return f"runs/{run_id}/accepted.json"


def audit_key(run_id: str) -> str:
    return f"runs/{run_id}/audit.json"


def report_key(run_id: str) -> str:
    return f"runs/{run_id}/report.html"


def complete_runs(store: Store) -> list[str]:
    """Names of the runs that have a record: it is written last, so theirs are the tables that count."""
    return recorded(store.sizes("runs"))


def recorded(found: Iterable[str]) -> list[str]:
    """The same, of the keys below ``runs``."""
    keys = (key for key in found if key.count("/") == 1 and key.endswith(".json"))
    return sorted(key.removeprefix("runs/").removesuffix(".json") for key in keys)


def files_of(table: str, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a record's files those that belong to one table."""
    return [file for file in files if file["path"].startswith(f"{table}/")]


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """None where there is none. Raises UsageError for what is no JSON object: anybody may have written over it."""
    try:
        content = json.loads(store.read(key))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise spoilt(store, key, str(error)) from error
    if not isinstance(content, dict):
        raise spoilt(store, key, "no object")
    return content


def spoilt(store: Store, key: str, why: str) -> UsageError:
    told = f"{key} in {store.name} is not the JSON that was written there: put it back from a copy, or take it away"
    return UsageError(f"{told} ({why})")


def checked(store: Store, key: str, content: dict[str, Any]) -> dict[str, Any]:
    """A record, or the status of a run that is not complete. Raises UsageError for JSON that is none."""
    if why := fault(content):
        raise spoilt(store, key, why)
    return content


def read_record(store: Store, run_id: str) -> dict[str, Any] | None:
    """A complete run's record; None where there is none. Raises UsageError for what is no run record."""
    return _read_checked(store, record_key(run_id))


def read_status(store: Store, run_id: str) -> dict[str, Any] | None:
    """The same of the status that a run leaves as it goes."""
    return _read_checked(store, status_key(run_id))


def _read_checked(store: Store, key: str) -> dict[str, Any] | None:
    content = read_json(store, key)
    return None if content is None else checked(store, key, content)


def read_complete(store: Store, run_id: str, purpose: str) -> dict[str, Any]:
    """A complete run's record. Raises UsageError that says what it was wanted for, as in "only ... are reviewed"."""
    record = read_record(store, run_id)
    if record is None:
        raise UsageError(f"there is no complete run {run_id!r} in {store.name}: only complete runs are {purpose}")
    return record


def write_json(store: Store, key: str, content: dict[str, Any]) -> None:
    store.write(key, json_bytes(content))


def json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def freeze(store: Store, run_id: str, content: dict[str, Any]) -> None:
    """Fixes what the run is. Raises UsageError when another driver has just done so."""
    if store.create(f"{state_prefix(run_id)}/run.json", json_bytes(content)):
        return
    # An earlier try of this PUT may have gone through unheard: the manifest's folder is this driver's alone.
    if read_frozen(store, run_id) != json.loads(json_bytes(content)):
        raise UsageError(f"run {run_id!r} was started by another driver at this moment; start again to join it")


def read_frozen(store: Store, run_id: str) -> dict[str, Any] | None:
    return read_json(store, f"{state_prefix(run_id)}/run.json")


Attempt = tuple[int, str, str]
"""Of one table: its first window, key and SHA-256."""


@dataclass(kw_only=True)
class _Begun:
    """A shard of which not every window is there: what its receipts say, and no more, for there may be thousands."""

    windows: set[int] = field(default_factory=set)
    attempts: dict[str, list[Attempt]] = field(default_factory=lambda: defaultdict(list))
    tally: Tally = field(default_factory=Tally)

    def add(self, receipt: dict[str, Any]) -> None:
        self.windows.update(receipt["windows"])
        for file in receipt["files"]:
            key = f"{receipt['attempt']}/{file['table']}.parquet"
            self.attempts[file["table"]].append((min(receipt["windows"]), key, file["sha256"]))
        self.tally.add_work(receipt["work"])


class Ledger:
    """The driver's view of one run: which shards are done, and the one way to make another one so."""

    def __init__(self, store: Store, run_id: str, scan_date: str, shards: list[Shard], max_outage: float = 1.0) -> None:
        self.store = store
        self.max_outage = max_outage
        self.run_id = run_id
        self.scan_date = scan_date
        self.shards = {shard.index: shard for shard in shards}
        self.tally = Tally()
        self.newest = Tally()
        """What the shard that was counted last adds to it."""
        self.files: list[dict[str, Any]] = []
        self.commit_seconds = self.newest_seconds = 0.0
        self.begun: dict[int, _Begun] = defaultdict(_Begun)
        self.epoch = self._take_over()
        self.done: set[int] = set()
        self._adopt_markers()

    @property
    def pending(self) -> list[Shard]:
        return [shard for index, shard in self.shards.items() if index not in self.done]

    def add(self, receipt: dict[str, Any]) -> Shard | None:
        """Takes one receipt; commits its shard, and returns it, when that was the last one missing."""
        shard = self.shards[receipt["shard"]]
        if shard.index in self.done:
            return None
        begun, new = self.begun[shard.index], set(receipt["windows"])
        if new <= begun.windows:
            return None
        if new & begun.windows:
            raise RunError(
                f"windows {sorted(new & begun.windows)} of shard {shard.index} came twice, in different calls"
            )
        begun.add(receipt)
        if len(begun.windows) < shard.windows:
            return None
        del self.begun[shard.index]
        with self._committing():
            tables = {name: self._merge(name, begun.attempts[name]) for name in schema.TABLES if name != "ledger"}
            self._commit(shard, in_order(self._read(sorted(begun.attempts["ledger"]))), tables, begun.tally)
        return shard

    def add_judged(self, shard: Shard) -> None:
        """Commits a shard that earlier runs have judged: its ledger follows from its manifest."""
        with self._committing():
            manifest = pq.ParquetFile(io.BytesIO(self.store.read(shard.key, shard.sha256)))
            batches = manifest.iter_batches(GROUP_ROWS)
            ledger = (unchanged_rows(pa.Table.from_batches([batch]), self.run_id) for batch in batches)
            self._commit(shard, ledger, {}, Tally())

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """While a shard is committed nothing else is done here: the seconds are counted."""
        began = time.perf_counter()
        self.check_epoch()
        yield
        pa.default_memory_pool().release_unused()  # or the driver would hold for ever what one commit takes
        self.newest_seconds = time.perf_counter() - began
        self.commit_seconds += self.newest_seconds

    def _commit(self, shard: Shard, ledger: Iterable[pa.Table], found: dict[str, pa.Table], tally: Tally) -> None:
        """``ledger``: its rows in order, some at a time. ``found``: the other tables; one without rows may lack."""
        tables = {name: found.get(name, table.empty_table()) for name, table in schema.TABLES.items()}
        # Before the ledger: the file that they are read from takes memory while it is.
        listed = pq.read_table(io.BytesIO(self.store.read(shard.key, shard.sha256)), columns=["image_id"])["image_id"]
        body, tables["ledger"] = write_ledger(ledger)
        reconcile(shard, listed, tables, tally)
        check_outage(shard, tally, self.max_outage)
        folder = f"{attempts_prefix(self.run_id)}/shard-{shard.index:05d}/merged-{self.epoch:06d}"
        files = [
            self._write_merged(shard, folder, name, table.num_rows, body if name == "ledger" else table_bytes(table))
            for name, table in tables.items()
        ]
        marker: dict[str, Any] = {
            "shard": shard.index,
            "manifest_sha256": shard.sha256,
            "epoch": self.epoch,
            "files": files,
            "tally": tally.to_json(),
        }
        if not self.store.create(self._marker_key(shard.index), json_bytes(marker)):
            # Another driver was faster, or an earlier try of this PUT went through unheard: its word counts.
            self.check_epoch()
            marker = self._read_marker(self._marker_key(shard.index))
        self._publish(marker["files"])
        self._count(shard.index, marker)

    def _merge(self, name: str, files: list[Attempt]) -> pa.Table:
        """One table of a shard, which is no ledger."""
        return pa.concat_tables([schema.TABLES[name].empty_table(), *self._read(files)]).sort_by(schema.SORT_KEYS[name])

    def _read(self, files: list[Attempt]) -> Iterator[pa.Table]:
        """The attempts' rows, in the order of ``files``, ``READERS`` of them at a time."""
        with ThreadPoolExecutor(READERS) as readers:
            for first in range(0, len(files), READERS):
                bodies = readers.map(lambda file: self.store.read(*file[1:]), files[first : first + READERS])
                # Here, in one thread: what each of many allocates it keeps.
                yield pa.concat_tables(pq.read_table(io.BytesIO(body), use_threads=False) for body in bodies)

    def _write_merged(self, shard: Shard, folder: str, name: str, rows: int, body: bytes) -> dict[str, Any]:
        self.store.write(f"{folder}/{name}.parquet", body)
        return {
            "attempt": f"{folder}/{name}.parquet",
            "path": f"{name}/scan_date={self.scan_date}/{self.run_id}-shard-{shard.index:05d}.parquet",
            "rows": rows,
            "bytes": len(body),
            "sha256": digest(body),
        }

    def _publish(self, files: list[dict[str, Any]]) -> None:
        for file in files:
            self.store.publish(file["attempt"], file["path"])

    def _count(self, index: int, marker: dict[str, Any]) -> None:
        self.done.add(index)
        self.newest = Tally.from_json(marker["tally"])
        self.tally.add(self.newest)
        self.files += [{key: file[key] for key in ("path", "rows", "bytes", "sha256")} for file in marker["files"]]

    def _adopt_markers(self) -> None:
        """Takes committed shards as they are; finishes the copies of a driver that died before it did."""
        # Markers before tables: a marker that comes after this may have its files swept by who finishes the run.
        markers = sorted(self.store.sizes(f"{state_prefix(self.run_id)}/markers"))
        published = {name: self.store.sizes(f"{name}/scan_date={self.scan_date}") for name in schema.TABLES if markers}
        for key in markers:
            marker = self._read_marker(key)
            missing = []
            for file in marker["files"]:
                size = published[file["path"].split("/")[0]].get(file["path"])
                if size is None:
                    missing.append(file)
                elif size != file["bytes"]:
                    raise RunError(
                        f"{file['path']} has {size:,} bytes, its marker says {file['bytes']:,}: somebody has changed "
                        "it; put back what was there, or remove it to have it published again"
                    )
            self._publish(missing)
            self._count(marker["shard"], marker)

    def _read_marker(self, key: str) -> dict[str, Any]:
        """Raises RunError when it belongs to another manifest than this run's."""
        marker = read_json(self.store, key)
        if marker is None:
            raise RunError(f"{key} was there a moment ago: somebody removes files of run {self.run_id!r}")
        shard = self.shards.get(marker["shard"])
        if shard is None or marker["manifest_sha256"] != shard.sha256:
            raise RunError(
                f"{key} was made for another manifest: files of run {self.run_id!r} were removed and it was started "
                "anew; give another --run-id"
            )
        return marker

    def _marker_key(self, index: int) -> str:
        return f"{state_prefix(self.run_id)}/markers/shard-{index:05d}.json"

    def _take_over(self) -> int:
        """Creates the next epoch; whoever holds the highest drives the run."""
        body = json_bytes({"taken_over_at": datetime.now(UTC).isoformat()})
        epoch = self._latest_epoch() + 1
        while not self.store.create(self._epoch_key(epoch), body):
            epoch += 1
        return epoch

    def _latest_epoch(self) -> int:
        keys = self.store.sizes(f"{state_prefix(self.run_id)}/epochs")
        return max((int(key.rsplit("/", 1)[1].removesuffix(".json")) for key in keys), default=0)

    def _epoch_key(self, epoch: int) -> str:
        return f"{state_prefix(self.run_id)}/epochs/{epoch:06d}.json"

    def is_current(self) -> bool:
        return self._latest_epoch() == self.epoch

    def check_epoch(self) -> None:
        """Raises RunError when another driver has taken over."""
        latest = self._latest_epoch()
        if latest != self.epoch:
            raise RunError(f"run {self.run_id!r} was taken over by another driver (epoch {latest} after {self.epoch})")

    def complete(self, record: dict[str, Any]) -> dict[str, Any]:
        """Creates the run record, the point of visibility; returns the one that stands. Raises RunError."""
        assert not self.pending
        self.check_epoch()
        if self.store.create(record_key(self.run_id), json_bytes(record)):
            return record
        # Another driver was faster, or an earlier try of this PUT went through unheard.
        decided = read_json(self.store, record_key(self.run_id))
        if decided is None:
            raise RunError(f"the record of run {self.run_id!r} was there a moment ago: somebody has removed it")
        return decided


def sweep_attempts(store: Store, run_id: str) -> None:
    """Removes what a complete run was merged from."""
    # Shard by shard: of a night's billion images there are millions of attempts.
    for folder in store.folders(attempts_prefix(run_id)):
        store.delete(list(store.sizes(f"{attempts_prefix(run_id)}/{folder}")))
