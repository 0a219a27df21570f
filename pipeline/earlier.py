"""The run that tonight's is compared with, and what its ledger says of each object that it listed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import commit
from pipeline.errors import UsageError
from pipeline.inventory import scope
from pipeline.records import PastRuns
from pipeline.schema import EARLIER, LEDGER
from pipeline.store import Store

LAST = "last"


def find_earlier(store: Store, since: str, source: str, decides: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record that ``since`` means: a run by its name, or for ``last`` the newest one that compares.

    That is a complete run over the same source, by whose record the same ``decides`` (plan, nets, banks) and whose
    tables are there; or None. A run that is named is taken whatever its plan was. Runs that took up errors listed a
    few objects only, so none of them compares. Raises UsageError.
    """
    if since != LAST:
        record = commit.read_json(store, commit.record_key(since))
        if record is None:
            raise UsageError(f"--since {since}: no complete run of that name in {store.uri}; give another, or 'last'")
        if record["parent_run_id"]:
            raise UsageError(
                f"--since {since}: that run took up the errors of {record['parent_run_id']} and lists nothing else; "
                "name a run over the whole source"
            )
        return record
    past = PastRuns(store)
    comparable = [
        record
        for record in past.whole(commit.recorded(past.found))
        if record["parent_run_id"] is None and scope(record["source"]) == scope(source) and compares(record, decides)
    ]
    for candidate in sorted(comparable, key=lambda record: record["started_at"], reverse=True):
        record = commit.read_json(store, commit.record_key(candidate["run_id"]))  # with its files
        if record is not None and _stands(store, record):
            return record
    return None


def judged_otherwise(store: Store, judged_by: Mapping[str, int], decides: Mapping[str, Any]) -> int:
    """Of objects by the run that judged them: how many were judged by other plans, nets or banks than ``decides``."""
    records = {run_id: commit.read_json(store, commit.record_key(run_id)) for run_id in judged_by}
    return sum(
        judged_by[run_id] for run_id, record in records.items() if record is None or not compares(record, decides)
    )


def compares(record: Mapping[str, Any], decides: Mapping[str, Any]) -> bool:
    """Whether a run was judged by the same plan, nets and banks."""
    return all(record.get(name, {}) == now for name, now in decides.items())  # older records know no banks


def write_earlier(store: Store, record: Mapping[str, Any], folder: Path) -> None:
    """One ``schema.EARLIER`` file for each file of the run's ledger. Raises UsageError when its tables are gone."""
    for number, file in enumerate(commit.files_of("ledger", record["files"])):
        try:
            body = store.read(file["path"], file["sha256"])
        except FileNotFoundError:
            raise UsageError(
                f"--since {record['run_id']}: {file['path']} is gone, so nobody knows what that run has judged; name "
                "another run, or scan without --since"
            ) from None
        pq.write_table(_earlier_rows(body, record["run_id"]), folder / f"{number:06d}.parquet")
    _forget_lost(store, folder)


def _earlier_rows(body: bytes, run_id: str) -> pa.Table:
    columns = [
        "image_id", "source_uri", "outcome", "skip_reason", "judged_run_id", "judged_outcome", "sha256",
        "match_ignored",
    ]  # fmt: skip
    ledger = pq.read_table(io.BytesIO(body), columns=columns, schema=LEDGER)  # files of version 1 lack the last four
    # What an earlier scan injected itself is no object of the source.
    canary = pc.starts_with(ledger["skip_reason"], "canary").fill_null(False)
    ledger = ledger.filter(pc.invert(canary))
    # Also of content that it knew: its own tables have the rows of this object.
    own = pc.is_in(ledger["outcome"], pa.array(["cleared", "flagged"]))
    # Who matched a bank and was cleared all the same is asked again, and no content to be known by.
    own = pc.and_(
        own, pc.invert(pc.and_(pc.equal(ledger["outcome"], "cleared"), ledger["match_ignored"].fill_null(False)))
    )
    return pa.table(
        {
            "image_id": ledger["image_id"],
            "uri": ledger["source_uri"],
            "judged_run_id": pc.if_else(own, run_id, ledger["judged_run_id"]),
            "judged_outcome": pc.if_else(own, ledger["outcome"], ledger["judged_outcome"]),
            "sha256": ledger["sha256"],
        }
    ).cast(EARLIER)


def _forget_lost(store: Store, folder: Path) -> None:
    """A verdict that nobody can look up any more is none: its run's tables were removed, so it is made anew."""
    files = sorted(folder.iterdir())
    named: set[str] = set()
    for path in files:
        named.update(pq.read_table(path, columns=["judged_run_id"])["judged_run_id"].unique().drop_null().to_pylist())
    lost = pa.array(sorted(named - _standing(store, named)), pa.string())
    if not len(lost):
        return
    for path in files:
        table = pq.read_table(path)
        gone = pc.is_in(table["judged_run_id"], lost)
        for name in ("judged_run_id", "judged_outcome"):
            column = pc.if_else(gone, pa.scalar(None, pa.string()), table[name])
            table = table.set_column(EARLIER.get_field_index(name), EARLIER.field(name), column)
        pq.write_table(table, path)


def _standing(store: Store, run_ids: Iterable[str]) -> set[str]:
    """Those of the runs whose record is there with all of its ledgers and findings."""
    records = {run_id: commit.read_json(store, commit.record_key(run_id)) for run_id in run_ids}
    return {run_id for run_id, record in records.items() if record is not None and _stands(store, record)}


def _stands(store: Store, record: Mapping[str, Any]) -> bool:
    files = [file for table in ("ledger", "flagged") for file in commit.files_of(table, record["files"])]
    there = {key for folder in {file["path"].rsplit("/", 1)[0] for file in files} for key in store.sizes(folder)}
    return all(file["path"] in there for file in files)
