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
    """Of the file without them; None for what is made from the tables."""
    uris: frozenset[str] = field(default=frozenset(), repr=False)
    images: frozenset[str] = field(default=frozenset(), repr=False)
    """Of the rows that go."""


def erase(store: Store, subject: Subject, *, dry_run: bool) -> list[Rewritten]:
    """Rewrites what holds the subject. Raises UsageError, before anything is touched, when an unfinished run does.

    Can be repeated: an erasure that was interrupted is finished by the next. Raises RunError when a table is not
    what its record says.
    """
    complete = set(commit.complete_runs(store))
    for run in sorted({*store.folders("_state"), *store.folders("_attempts")} - complete):
        if any(_holds(store, key, subject) for key in _parquet(store, run)):
            raise UsageError(
                f"run {run!r} lists the object and is not complete: finish it with jobs.scan --run-id {run}, or give "
                f"it up with jobs.clean --abandon {run} --delete, then erase"
            )
    reviewed = not dry_run and bool(review_files(store))
    with alone(store, REWRITTEN) if reviewed else nullcontext(lambda: None) as hold:
        return _erase(store, subject, sorted(complete), hold, dry_run=dry_run)


def _erase(
    store: Store, subject: Subject, complete: list[str], hold: Callable[[], None], *, dry_run: bool
) -> list[Rewritten]:
    """``hold``: keeps those out who merge decisions."""
    known = _digests_of_erasures(store)
    versions = {run: store.read_version(commit.record_key(run))[1] for run in complete}
    changes = {run: _changes_in_run(store, run, subject, known) for run in versions}
    reviews = _changes_in_reviews(store, subject, hold)
    rewritten = [*(change for found in changes.values() for change in found), *reviews]
    if rewritten and not dry_run:
        # The log first: with it an erasure that stops half-way is known, and its files' new digests are.
        _log(store, rewritten)
        # Reviews before runs, which may take longer than they are held.
        for change in reviews:
            hold()
            _rewrite_reviews(store, change, subject)
        for run, found in changes.items():
            if found:
                try:
                    _rewrite(store, run, found, subject, versions[run])
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
            found.append(Rewritten(path=key, rows=gone.num_rows, images=frozenset(gone["image_id"].to_pylist())))
    return found


def _rewrite_reviews(store: Store, change: Rewritten, subject: Subject) -> None:
    """The page writes a file for each decision, of which nothing is left then."""
    decisions = read_decisions(store, [change.path])
    kept = decisions.filter(pc.invert(subject.rows(decisions)))
    if kept.num_rows:
        store.write(change.path, table_bytes(kept))
    else:
        store.delete([change.path])


def _changes_in_run(store: Store, run: str, subject: Subject, known: set[str]) -> list[Rewritten]:
    """Files that hold the subject, and those that are made from the tables when any has changed."""
    record = commit.read_json(store, commit.record_key(run))
    assert record is not None
    found: list[Rewritten] = []
    stale = False
    for file in record["files"]:
        body = store.read(file["path"])
        stale |= digest(body) != file["sha256"]
        if digest(body) not in {file["sha256"], *known}:
            raise RunError(f"{file['path']} is not what the record of run {run!r} says: somebody has changed it")
        found += _change(file["path"], body, subject)
    for key in [*_parquet(store, run), *unnamed_files(store, record)]:
        found += _change(key, store.read(key), subject)
    derived = [key(run) for key in (commit.record_key, commit.status_key, commit.report_key, commit.failure_key)]
    return [*found, *(Rewritten(path=path, rows=0) for path in derived)] if found or stale else []


def _change(path: str, body: bytes, subject: Subject) -> list[Rewritten]:
    """What erasing would do to a file: one change, or none."""
    table = _table(body)
    gone = table.filter(subject.rows(table))
    if not gone.num_rows:
        return []
    uris = frozenset(gone[_uri_column(table)].to_pylist())
    images = frozenset(gone["image_id"].to_pylist())
    sha256 = digest(_without(path, table, subject))
    return [Rewritten(path=path, rows=gone.num_rows, sha256=sha256, uris=uris, images=images)]


def _table(body: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(body))


def _without(path: str, table: pa.Table, subject: Subject) -> bytes:
    """A file without the subject's rows; the same bytes whenever it is made, for the log names them by digest."""
    kept = table.filter(pc.invert(subject.rows(table)))
    return manifest_bytes(kept) if path.startswith("_state/") else table_bytes(kept)


def _rewrite(store: Store, run: str, changes: list[Rewritten], subject: Subject, version: str) -> None:
    """``version``: of the record that the changes were found by."""
    # Made a second time, file by file: a year of nightly runs holds an object in more than memory holds.
    for change in changes:
        if change.sha256 is not None:
            store.write(change.path, _without(change.path, _table(store.read(change.path)), subject))
    record = json.loads(store.read(commit.record_key(run)))
    for file in record["files"]:
        body = store.read(file["path"])
        rows = pq.read_metadata(io.BytesIO(body)).num_rows
        file |= {"rows": rows, "bytes": len(body), "sha256": digest(body)}
    if record["quality"]:
        # Violating images that a labelled run missed are named in its record.
        gone = {*subject.uris, *(uri for change in changes for uri in change.uris)}
        record["quality"]["missed"] = [uri for uri in record["quality"]["missed"] if uri not in gone]
    commit.write_json(store, commit.status_key(run), record)
    write_report(store, record, parse_plan(record["plan"], run), None, thumbnails=False)
    if store.exists(commit.failure_key(run)):
        store.delete([commit.failure_key(run)])
    commit.sweep_attempts(store, run)
    # Last: until the record names the new digests, the next erasure does all of this again.
    if not store.replace(commit.record_key(run), commit.json_bytes(record), version):
        raise _changed_meanwhile(run)


def _changed_meanwhile(run: str) -> RunError:
    return RunError(f"the files of run {run!r} were compacted, or others erased in them, at this moment: erase again")


def _parquet(store: Store, run: str) -> list[str]:
    """Manifests and attempts of a run, those of a start that came to nothing included.

    Without the digests of content that the run knew: they name no object.
    """
    found = store.sizes(commit.state_prefix(run)) | store.sizes(commit.attempts_prefix(run))
    return [key for key in found if key.endswith(".parquet") and not key.rsplit("/", 1)[1].startswith(CONTENTS_FILE)]


def _holds(store: Store, key: str, subject: Subject) -> bool:
    return bool(pc.any(subject.rows(_table(store.read(key))), min_count=0).as_py())


def _digests_of_erasures(store: Store) -> set[str]:
    logs = (commit.read_json(store, key) for key in store.sizes("erasures"))
    return {file["sha256"] for log in logs if log for file in log["files"] if file["sha256"]}


def _log(store: Store, rewritten: list[Rewritten]) -> None:
    moment = datetime.now(UTC)
    files = [{"path": file.path, "rows_removed": file.rows, "sha256": file.sha256} for file in rewritten]
    key = f"erasures/{moment:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}.json"
    commit.write_json(store, key, {"begun_at": moment.isoformat(), "files": files})
