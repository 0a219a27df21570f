"""Takes an object out of everything that complete runs and reviewers keep of it: tables, manifests, records, reports,
decisions.

One of the two exceptions to "a complete run never changes"; the other is ``compact.py``. A log below ``erasures/``
says which files are rewritten and by how many rows, and not which object it is about.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RunError, UsageError
from pipeline.listing.manifest import manifest_bytes
from pipeline.output import commit
from pipeline.output.sink import table_bytes
from pipeline.past.contents import CONTENTS_FILE
from pipeline.plan import parse_plan
from pipeline.reporting.report import write_report
from pipeline.review.decisions import REWRITTEN, read_decisions, read_each, review_files
from pipeline.review.leases import LEASES, alone, image_of
from pipeline.store import Store, digest
from pipeline.tables.compact import unnamed_files


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be forgotten: versions of objects by id, or objects by uri in all their versions."""

    image_ids: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()

    def rows(self, table: pa.Table) -> pa.ChunkedArray:
        """Mask of the rows about it."""
        return pc.or_(
            pc.is_in(table["image_id"], pa.array(self.image_ids, pa.string())),
            pc.is_in(table[_uri_column(table)], pa.array(self.uris, pa.string())),
        )


def _uri_column(table: pa.Table) -> str:
    """Tables name it ``source_uri``, manifests ``uri``."""
    return "source_uri" if "source_uri" in table.column_names else "uri"


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    path: str
    rows: int
    """Rows that go."""
    sha256: str | None = None
    """Of the file without them; None for what is made from the tables, or goes."""
    deleted: bool = False
    """Whether the file goes as a whole."""
    uris: frozenset[str] = field(default=frozenset(), repr=False)
    images: frozenset[str] = field(default=frozenset(), repr=False)
    """Of the rows that go."""


def erase(store: Store, subject: Subject, *, dry_run: bool) -> list[Rewritten]:
    """Rewrites what holds the subject. Raises UsageError, before anything is touched, when an unfinished run does.

    Can be repeated: an erasure that was interrupted is finished by the next. Raises RunError when a table is not
    what its record says, or when somebody else erases or merges decisions, or changes a file, at this moment.
    """
    complete = set(commit.complete_runs(store))
    for run in sorted({*store.folders("_state"), *store.folders("_attempts")} - complete):
        if any(_holds(store, key, subject) for key in _parquet(store, run)):
            raise UsageError(
                f"run {run!r} lists the object and is not complete: finish it with jobs.scan --run-id {run}, or give "
                f"it up with jobs.clean --abandon {run} --delete, then erase"
            )
    # Two erasures at once would each write back what the other takes out.
    with nullcontext(lambda: None) if dry_run else alone(store, REWRITTEN) as hold:
        return _erase(store, subject, sorted(complete), hold, dry_run=dry_run)


def _erase(
    store: Store, subject: Subject, complete: list[str], hold: Callable[[], None], *, dry_run: bool
) -> list[Rewritten]:
    """``hold``: keeps others out who erase, or merge decisions."""
    known = _digests_of_erasures(store)
    versions = {run: store.read_version(commit.record_key(run))[1] for run in complete}
    changes = {run: _changes_in_run(store, run, subject, known, hold) for run in versions}
    reviews = _changes_in_reviews(store, subject, hold)
    rewritten = [*(change for found in changes.values() for change in found), *reviews]
    if rewritten and not dry_run:
        # The log first: with it an erasure that stops half-way is known, and its files' new digests are.
        _log(store, rewritten)
        for change in reviews:
            hold()
            _rewrite_reviews(store, change, subject)
        for run, found in changes.items():
            if found:
                try:
                    _rewrite(store, run, found, subject, versions[run], hold)
                except FileNotFoundError as error:
                    raise _changed_meanwhile(run) from error
        images = {*subject.image_ids, *(image for change in rewritten for image in change.images)}
        store.delete([key for key in store.sizes(LEASES) if image_of(key) in images])
    return rewritten


def _changes_in_reviews(store: Store, subject: Subject, hold: Callable[[], None]) -> list[Rewritten]:
    found = []
    for key, decisions in read_each(store, review_files(store)):
        hold()
        gone = decisions.filter(subject.rows(decisions))
        if gone.num_rows:
            images = frozenset(gone["image_id"].to_pylist())
            whole = gone.num_rows == decisions.num_rows
            found.append(Rewritten(path=key, rows=gone.num_rows, images=images, deleted=whole))
    return found


def _rewrite_reviews(store: Store, change: Rewritten, subject: Subject) -> None:
    """The page writes a file for each decision, of which nothing is left then."""
    decisions = read_decisions(store, [change.path])
    kept = decisions.filter(pc.invert(subject.rows(decisions)))
    if kept.num_rows:
        store.write(change.path, table_bytes(kept))
    else:
        store.delete([change.path])


def _changes_in_run(
    store: Store, run: str, subject: Subject, known: set[str], hold: Callable[[], None]
) -> list[Rewritten]:
    """Files that hold the subject, and those that are made from the tables when any has changed."""
    record = commit.read_record(store, run)
    assert record is not None
    found: list[Rewritten] = []
    stale = False
    for file in record["files"]:
        hold()
        body = store.read(file["path"])
        stale |= digest(body) != file["sha256"]
        if digest(body) not in {file["sha256"], *known}:
            raise RunError(f"{file['path']} is not what the record of run {run!r} says: somebody has changed it")
        found += _change(file["path"], body, subject)
    for key in [*_parquet(store, run), *unnamed_files(store, record)]:
        hold()
        found += _change(key, store.read(key), subject)
    return [*found, *_derived(store, run)] if found or stale else []


def _derived(store: Store, run: str) -> list[Rewritten]:
    """What is made from the tables, and the traceback of a driver that failed, which may name any object."""
    made = [Rewritten(path=key(run), rows=0) for key in (commit.record_key, commit.status_key, commit.report_key)]
    failure = commit.failure_key(run)
    return [*made, Rewritten(path=failure, rows=0, deleted=True)] if store.exists(failure) else made


def _change(path: str, body: bytes, subject: Subject) -> list[Rewritten]:
    """What erasing would do to a file: one change, or none."""
    table = _table(body)
    gone = table.filter(subject.rows(table))
    if not gone.num_rows:
        return []
    uris = frozenset(gone[_uri_column(table)].to_pylist())
    images = frozenset(gone["image_id"].to_pylist())
    swept = path.startswith("_attempts/")
    sha256 = None if swept else digest(_without(path, table, subject))
    return [Rewritten(path=path, rows=gone.num_rows, sha256=sha256, deleted=swept, uris=uris, images=images)]


def _table(body: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(body))


def _without(path: str, table: pa.Table, subject: Subject) -> bytes:
    """A file without the subject's rows; the same bytes whenever it is made, for the log names them by digest."""
    kept = table.filter(pc.invert(subject.rows(table)))
    return manifest_bytes(kept) if path.startswith("_state/") else table_bytes(kept)


def _rewrite(
    store: Store, run: str, changes: list[Rewritten], subject: Subject, version: str, hold: Callable[[], None]
) -> None:
    """``version``: of the record that the changes were found by."""
    # Made a second time, file by file: a year of nightly runs holds an object in more than memory holds.
    for change in changes:
        if change.sha256 is not None:
            _rewrite_file(store, run, change, subject, hold)
    record = json.loads(store.read(commit.record_key(run)))
    for file in record["files"]:
        hold()
        file.update(_described(store, run, file["path"], subject))
    if record["quality"]:
        # Violating images that a labelled run missed are named in its record.
        gone = {*subject.uris, *(uri for change in changes for uri in change.uris)}
        record["quality"]["missed"] = [uri for uri in record["quality"]["missed"] if uri not in gone]
    hold()
    commit.write_json(store, commit.status_key(run), record)
    write_report(store, record, parse_plan(record["plan"], run), None, thumbnails=False)
    store.delete([change.path for change in changes if change.deleted])
    commit.sweep_attempts(store, run)
    hold()
    # Last: until the record names the new digests, the next erasure does all of this again.
    if not store.replace(commit.record_key(run), commit.json_bytes(record), version):
        raise _changed_meanwhile(run)


def _rewrite_file(store: Store, run: str, change: Rewritten, subject: Subject, hold: Callable[[], None]) -> None:
    """Over the version that was read and no other: who comes between would have what it took out written back.

    And only what the log names: a file of another digest is one that no later erasure would touch.
    """
    body, version = store.read_version(change.path)
    kept = _without(change.path, _table(body), subject)
    hold()
    if digest(kept) != change.sha256 or store.replace(change.path, kept, version) is None:
        raise _changed_meanwhile(run)


def _described(store: Store, run: str, path: str, subject: Subject) -> dict[str, Any]:
    """What the record says of a file. Raises RunError when the subject is in it: somebody has written it back."""
    body = store.read(path)
    table = _table(body)
    if _is_in(table, subject):
        raise _changed_meanwhile(run)
    return {"rows": table.num_rows, "bytes": len(body), "sha256": digest(body)}


def _changed_meanwhile(run: str) -> RunError:
    return RunError(f"the files of run {run!r} were compacted, or others erased in them, at this moment: erase again")


def _parquet(store: Store, run: str) -> list[str]:
    """Manifests and attempts of a run, those of a start that came to nothing included.

    Without the digests of content that the run knew: they name no object.
    """
    found = store.sizes(commit.state_prefix(run)) | store.sizes(commit.attempts_prefix(run))
    return [key for key in found if key.endswith(".parquet") and not key.rsplit("/", 1)[1].startswith(CONTENTS_FILE)]


def _holds(store: Store, key: str, subject: Subject) -> bool:
    return _is_in(_table(store.read(key)), subject)


def _is_in(table: pa.Table, subject: Subject) -> bool:
    return bool(pc.any(subject.rows(table), min_count=0).as_py())


def _digests_of_erasures(store: Store) -> set[str]:
    logs = (commit.read_json(store, key) for key in store.sizes("erasures"))
    return {file["sha256"] for log in logs if log for file in log["files"] if file["sha256"]}


def _log(store: Store, rewritten: list[Rewritten]) -> None:
    moment = datetime.now(UTC)
    files = [
        {"path": file.path, "rows_removed": file.rows, "sha256": file.sha256, "deleted": file.deleted}
        for file in rewritten
    ]
    key = f"erasures/{moment:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}.json"
    commit.write_json(store, key, {"begun_at": moment.isoformat(), "files": files})
