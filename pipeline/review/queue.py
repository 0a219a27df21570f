"""What there is to review of runs: flagged images and the audit sample, read from their tables, with their history."""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.past.records import PastRuns
from pipeline.plan import Preparation
from pipeline.review.items import Item, Order, drawn_items, flagged_items, mixed
from pipeline.store import Store

FLAGGED_COLUMNS = [
    "run_id", "image_id", "source_uri", "etag", "size_bytes", "category", "score", "threshold", "decided_stage",
    "stages", "recommended_action", "match_bank", "match_distance",
]  # fmt: skip
AUDIT_COLUMNS = [
    "run_id", "image_id", "source_uri", "etag", "probability", "decided_stage", "decided_round", "group_size", "scores"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Queue:
    """``items``: each image once, in order. ``limits``: the widest that any of the runs read pictures under."""

    run_ids: tuple[str, ...]
    items: list[Item]
    categories: tuple[str, ...]
    limits: Preparation
    flagged: pa.Table
    audit: pa.Table
    plans: dict[str, tuple[str, ...]]

    def history(self, item: Item) -> list[dict[str, Any]]:
        """What the run said of an image, a part for each category: score, threshold and the tests it went through."""
        table = self.flagged if item.flagged else self.audit
        rows = table.take(list(item.rows)).to_pylist()
        if item.flagged:
            return [_finding(row) for row in rows]
        return list(_clearing(rows[0], self.plans[item.run_id]))


def _finding(row: dict[str, Any]) -> dict[str, Any]:
    tests = [
        {name: test[name] for name in ("stage", "round", "group_size", "score", "threshold")}
        for test in row["stages"] or ()
    ]
    return {
        "outcome": "flagged",
        **{name: row[name] for name in ("run_id", "category", "score", "threshold", "decided_stage")},
        **{name: row[name] for name in ("recommended_action", "match_bank", "match_distance")},
        "tests": tests,
    }


def _clearing(row: dict[str, Any], categories: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for category, score in zip(categories, row["scores"] or (), strict=False):
        test = {"stage": row["decided_stage"], "round": row["decided_round"], "group_size": row["group_size"]}
        yield {
            "outcome": "cleared",
            **{name: row[name] for name in ("run_id", "decided_stage", "probability")},
            "category": category,
            "score": score,
            "tests": [test | {"score": score}],
        }


def newest_run(store: Store) -> str:
    """The complete run that was started last. Raises UsageError when there is none, or when its record is spoilt."""
    for run_id, content in PastRuns(store).newest(1):
        if isinstance(content, Exception):
            raise content  # it may be of the newest run
        return run_id
    raise UsageError(f"there is no complete run in {store.name}: scan first, or name another --output")


def read_queue(store: Store, run_ids: tuple[str, ...], order: Order = "priority") -> Queue:
    """The queue of complete runs. An image of several is in it once, as what the newest says; flagged comes first.

    Raises UsageError for a run that is not complete.
    """
    records = [commit.read_complete(store, run_id, "reviewed") for run_id in run_ids]
    records.sort(key=lambda record: record["started_at"], reverse=True)
    flagged = _read(store, records, "flagged", schema.FLAGGED, FLAGGED_COLUMNS)
    audit = _read(store, records, "audit", schema.AUDIT, AUDIT_COLUMNS)
    plans = {record["run_id"]: tuple(record["plan"]["categories"]) for record in records}
    key = secrets.token_bytes(32)
    found = [*flagged_items(flagged, plans, key)]
    seen = {item.image_id for item in found}
    drawn = [*drawn_items(audit, records, plans, key, seen)]
    return Queue(
        run_ids=tuple(run_ids),
        items=mixed(found, drawn, order),
        categories=tuple(dict.fromkeys(name for names in plans.values() for name in names)),
        limits=_limits(records),
        flagged=flagged,
        audit=audit,
        plans=plans,
    )


def _read(store: Store, records: list[dict[str, Any]], table: str, whole: pa.Schema, columns: list[str]) -> pa.Table:
    parts = [
        pq.read_table(io.BytesIO(store.read(file["path"], file["sha256"])), columns=columns, schema=whole)
        for record in records
        for file in commit.files_of(table, record["files"])
        if file["rows"]
    ]
    return pa.concat_tables([whole.empty_table().select(columns), *parts]).combine_chunks()


def _limits(records: list[dict[str, Any]]) -> Preparation:
    each = [Preparation.model_validate(record["plan"].get("preparation", {})) for record in records]
    widest = {
        name: max(getattr(limits, name) for limits in each)
        for name in ("max_megabytes", "max_megapixels", "decode_seconds", "decode_gigabytes", "max_frames")
    }
    return Preparation(**widest)
