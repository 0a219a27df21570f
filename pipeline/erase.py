"""Takes an object out of everything that complete runs keep of it: tables, manifests, records, reports.

The one exception to "a complete run never changes". A log below ``erasures/`` says which files were
rewritten and by how many rows, and not which object it was about.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import commit, schema
from pipeline.errors import UsageError
from pipeline.plan import parse_plan
from pipeline.report import write_report
from pipeline.sink import table_bytes
from pipeline.source import manifest_bytes
from pipeline.store import Store, digest

Listed = tuple[str, pa.Table, pa.Table]
"""A manifest file that lists the subject: its key, its rows, and those that stay."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be forgotten: versions of objects by id, or objects by uri in all their versions."""

    image_ids: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()

    def rows(self, table: pa.Table) -> pa.ChunkedArray:
        """Mask of the rows about it. Tables name the uri ``source_uri``, manifests ``uri``."""
        uri = "source_uri" if "source_uri" in table.column_names else "uri"
        return pc.or_(
            pc.is_in(table["image_id"], pa.array(self.image_ids, pa.string())),
            pc.is_in(table[uri], pa.array(self.uris, pa.string())),
        )


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    path: str
    rows: int
    """Rows that went."""


def erase(store: Store, subject: Subject, *, dry_run: bool) -> list[Rewritten]:
    """Rewrites what holds the subject. Raises UsageError, before anything is touched, when an unfinished run does.

    Can be repeated: an erasure that was interrupted is finished by the next.
    """
    runs = [run for run in store.folders("_state") if commit.read_frozen(store, run)]
    done = {run: commit.read_json(store, commit.record_key(run)) for run in runs}
    for run, record in done.items():
        if record is None and any(_manifests(store, run, subject)):
            raise UsageError(
                f"run {run!r} lists the object and is not complete: finish it with jobs.scan --run-id {run}, or give "
                f"it up with jobs.clean --abandon {run}, then erase"
            )
    rewritten: list[Rewritten] = []
    for run, record in done.items():
        if record is not None:
            rewritten += _erase_from_run(store, run, record, subject, dry_run=dry_run)
    if rewritten and not dry_run:
        _log(store, rewritten)
    return rewritten


def _erase_from_run(
    store: Store, run: str, record: dict[str, Any], subject: Subject, *, dry_run: bool
) -> list[Rewritten]:
    """Tables first, then the record and the report that are made from them, and the manifest last.

    While the manifest still lists the object, an erasure that is started again finds the run.
    """
    manifests = list(_manifests(store, run, subject))
    if not manifests:
        return []
    rewritten = []
    for file in record["files"]:
        body = store.read(file["path"])
        table = pq.read_table(io.BytesIO(body))
        kept = table.filter(pc.invert(subject.rows(table)))
        if kept.num_rows < table.num_rows:
            rewritten.append(Rewritten(path=file["path"], rows=table.num_rows - kept.num_rows))
            body = table_bytes(kept)
            if not dry_run:
                store.write(file["path"], body)
        # Also of a file that an erasure rewrote which got no further.
        file |= {"rows": kept.num_rows, "bytes": len(body), "sha256": digest(body)}
    rewritten += [Rewritten(path=path, rows=0) for path in _derived(run)]
    rewritten += [Rewritten(path=key, rows=rows.num_rows - kept.num_rows) for key, rows, kept in manifests]
    if not dry_run:
        _forget_missed(record, subject, manifests)
        commit.write_json(store, commit.record_key(run), record)
        commit.write_json(store, commit.status_key(run), record)
        write_report(store, record, parse_plan(record["plan"], run), None, thumbnails=False)
        store.delete(list(store.sizes(commit.attempts_prefix(run))))
        for key, _, kept in manifests:
            store.write(key, manifest_bytes(kept))
    return rewritten


def _derived(run: str) -> list[str]:
    """What is made from the tables, and so is made again."""
    return [commit.record_key(run), commit.status_key(run), f"runs/{run}/report.html"]


def _manifests(store: Store, run: str, subject: Subject) -> Iterator[Listed]:
    for key in store.sizes(commit.state_prefix(run)):
        if key.endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(store.read(key)), schema=schema.MANIFEST)
            kept = rows.filter(pc.invert(subject.rows(rows)))
            if kept.num_rows < rows.num_rows:
                yield key, rows, kept


def _forget_missed(record: dict[str, Any], subject: Subject, manifests: list[Listed]) -> None:
    """Violating images that a labelled run missed are named in its record."""
    if record["quality"]:
        gone = {uri for _, rows, _ in manifests for uri in rows.filter(subject.rows(rows))["uri"].to_pylist()}
        record["quality"]["missed"] = [uri for uri in record["quality"]["missed"] if uri not in gone]


def _log(store: Store, rewritten: list[Rewritten]) -> None:
    moment = datetime.now(UTC)
    files = [{"path": file.path, "rows_removed": file.rows} for file in rewritten]
    key = f"erasures/{moment:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}.json"
    commit.write_json(store, key, {"erased_at": moment.isoformat(), "files": files})
