"""Makes few files of the many that a complete run's shards left: the same rows, in the same order, once each.

One of the two exceptions to "a complete run never changes"; the other is ``erase.py``. The record is what decides:

    1. the record is replaced by one that counts this compaction, so that an earlier one, should it still be at
       work, fails when it wants to replace the record: what it left can be removed
    2. merged files are written to _attempts/, then published beside the old ones, then read back
    3. the record is replaced by one that names them instead of the old ones
    4. the old ones are removed

Whoever reads by record sees the rows of the old files until 3 and those of the new ones from then on. A compaction
that ends anywhere is finished, or begun again, by the next.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import RunError, StoreError, UsageError
from pipeline.output import commit
from pipeline.output.sink import table_bytes
from pipeline.store import Store, digest

TARGET_BYTES = 256_000_000


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What became of one run: its files and their bytes, before and after."""

    run_id: str
    files_before: int
    bytes_before: int
    files: int
    bytes: int


def runs_to_compact(store: Store, run_ids: tuple[str, ...], older_than: timedelta) -> list[str]:
    """Complete runs by name, or all whose record is older than that. Raises UsageError for a name that is none."""
    complete = commit.complete_runs(store)
    for run in run_ids:
        if run not in complete:
            raise UsageError(f"there is no complete run {run!r} in {store.name}: only complete runs are compacted")
    latest = datetime.now(UTC) - older_than
    records = {run: commit.read_record(store, run) for run in sorted(run_ids or complete)}
    young = [run for run, record in records.items() if record and _completed(record) > latest]
    if run_ids and young:
        raise UsageError(
            f"run {young[0]!r} was completed less than {older_than.total_seconds() / 3600:g} hours ago, and its driver "
            "may still read its files: wait, or give a shorter --older-than"
        )
    return [run for run in records if run not in young]


def _completed(record: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(record["updated_at"])


def compact(store: Store, run_id: str, target_bytes: int = TARGET_BYTES) -> Compacted:
    """Merges a complete run's small files, table by table; one that is compact already is left as it is.

    Raises RunError when a file is not what the record says, or when the record is changed by another at this moment.
    """
    body, version = store.read_version(commit.record_key(run_id))
    record = json.loads(body)
    before = record["files"]
    packs = {table: pack(commit.files_of(table, before), target_bytes) for table in schema.TABLES}
    if any(len(files) > 1 for packed in packs.values() for files in packed):
        record["compactions"] = record.get("compactions", 0) + 1
        version = _replace(store, record, version)
        try:
            record["files"] = _publish(store, record, packs)
            _replace(store, record, version)
        except RunError:
            # No record names these files, and none ever will. After any other error one might: the next one knows.
            _take_back(store, record)
            raise
    _tidy(store, run_id, _last_done(record))
    return Compacted(
        run_id=run_id,
        files_before=len(before),
        bytes_before=sum(file["bytes"] for file in before),
        files=len(record["files"]),
        bytes=sum(file["bytes"] for file in record["files"]),
    )


def pack(files: list[dict[str, Any]], target_bytes: int) -> list[list[dict[str, Any]]]:
    """Neighbours together up to ``target_bytes``. What has half of that stays alone, so that it is merged once."""
    packed: list[list[dict[str, Any]]] = []
    room = 0
    for file in sorted(files, key=lambda file: file["path"]):
        small = 2 * file["bytes"] < target_bytes
        if packed and small and file["bytes"] <= room:
            packed[-1].append(file)
            room -= file["bytes"]
        else:
            packed.append([file])
            room = target_bytes - file["bytes"] if small else 0
    return packed


def read_files(store: Store, files: list[dict[str, Any]], table: str) -> pa.Table:
    """The rows of a record's files of one table, those of older files with null for what they lack.

    Raises RunError when a file is not what the record says.
    """
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(io.BytesIO(store.read(file["path"], file["sha256"]))))
        except (StoreError, FileNotFoundError) as error:
            raise RunError(
                f"{file['path']} is not what its run record says ({error}): finish the erasure that was interrupted, "
                "or put back what was there"
            ) from error
    merged = pa.concat_tables(tables, promote_options="default")
    return merged.select([name for name in schema.TABLES[table].names if name in merged.column_names])


def _publish(
    store: Store, record: dict[str, Any], packs: dict[str, list[list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """The run's files when those of each pack are one; they are in the tables then, beside the old ones."""
    files, staged = [], []
    for table, packed in packs.items():
        for place, pack in enumerate(packed):
            if len(pack) == 1:
                files += pack
                continue
            name = f"{record['run_id']}-compact-{record['compactions']:05d}-{place:05d}.parquet"
            merged = read_files(store, pack, table).sort_by(schema.SORT_KEYS[table])
            assert merged.num_rows == sum(file["rows"] for file in pack)
            body = table_bytes(merged)
            file = {
                "path": f"{table}/scan_date={record['scan_date']}/{name}",
                "rows": merged.num_rows,
                "bytes": len(body),
                "sha256": digest(body),
            }
            staged.append((f"{_staging(record['run_id'], record['compactions'])}/{table}/{name}", file))
            store.write(staged[-1][0], body)
            files.append(file)
    # All at once and as late as can be: from here on a reader of the folder sees rows twice.
    try:
        for key, file in staged:
            store.publish(key, file["path"])
        for _, file in staged:
            store.read(file["path"], file["sha256"])  # what is removed next must be there
    except FileNotFoundError as error:
        raise _changed_meanwhile(record["run_id"]) from error
    return sorted(files, key=lambda file: file["path"])


def _replace(store: Store, record: dict[str, Any], version: str) -> str:
    replaced = store.replace(commit.record_key(record["run_id"]), commit.json_bytes(record), version)
    if replaced is None:
        raise _changed_meanwhile(record["run_id"])
    return replaced


def _changed_meanwhile(run_id: str) -> RunError:
    return RunError(
        f"files of run {run_id!r} were changed at this moment, by an erasure or another compaction: compact again"
    )


def _take_back(store: Store, record: dict[str, Any]) -> None:
    """Removes what a compaction that came to nothing has written."""
    written = [*unnamed_files(store, record | {"files": []}), *store.sizes(commit.attempts_prefix(record["run_id"]))]
    store.delete([key for key in written if _number(key) == record["compactions"]])


def _last_done(record: dict[str, Any]) -> int:
    """Number of the last compaction that has come to its end: the one that the record counts may be at work."""
    count = record.get("compactions", 0)
    return count if any(_number(file["path"]) == count for file in record["files"]) else count - 1


def _tidy(store: Store, run_id: str, done: int) -> None:
    """Removes what compactions up to ``done`` have left, and the shards' files when they have been merged."""
    record = _copy_record(store, run_id)
    store.delete([key for key in unnamed_files(store, record) if _number(key) <= done])
    staged = store.sizes(commit.attempts_prefix(run_id))
    store.delete([key for key in staged if 0 < _number(key) <= done])


def _copy_record(store: Store, run_id: str) -> dict[str, Any]:
    """Makes the status of a complete run what its record is, and returns that."""
    while True:
        record = json.loads(store.read(commit.record_key(run_id)))
        if commit.read_json(store, commit.status_key(run_id)) == record:
            return record
        # Looked at once more: an erasure may have come between, and its copy must not be written over for good.
        commit.write_json(store, commit.status_key(run_id), record)


def unnamed_files(store: Store, record: dict[str, Any]) -> dict[str, tuple[int, datetime]]:
    """Files of a complete run in the tables that its record does not name, with size and time of the last write.

    A compaction that was interrupted left them, or is at work.
    """
    named = {file["path"] for file in record["files"]}
    ours = re.compile(re.escape(record["run_id"]) + r"-(shard|compact-\d+)-\d+\.parquet")
    found: dict[str, tuple[int, datetime]] = {}
    for table in schema.TABLES:
        found |= store.objects(f"{table}/scan_date={record['scan_date']}")
    return {key: about for key, about in found.items() if key not in named and ours.fullmatch(key.rsplit("/", 1)[1])}


def _staging(run_id: str, number: int) -> str:
    return f"{commit.attempts_prefix(run_id)}/compact-{number:05d}"


def _number(key: str) -> int:
    """Of the compaction that a file is of; 0 for a shard's."""
    found = re.search(r"-compact-(\d+)-\d+\.parquet$", key)
    return int(found[1]) if found else 0
