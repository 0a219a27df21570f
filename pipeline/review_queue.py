"""What there is to review of runs: flagged images and the audit sample, in one order that does not tell them apart.

Flagged images come by priority: hash matches, then from the highest score down. Each drawn image has a place by chance
among all of them. Every image is asked about in all categories of its plan, and what the page is told of one
(``Item.to_page``) is the same for both.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import commit, schema
from pipeline.errors import UsageError
from pipeline.plan import Preparation
from pipeline.records import PastRuns
from pipeline.storage import parse_uri, read_object
from pipeline.store import Store
from pipeline.visible import visible

Order = Literal["priority", "random"]
LOOKED_AT = 50
"""Records, those written last first, among which the newest run is looked for."""
FLAGGED_COLUMNS = [
    "run_id", "image_id", "source_uri", "etag", "size_bytes", "category", "score", "threshold", "decided_stage",
    "stages", "recommended_action", "match_bank", "match_distance",
]  # fmt: skip
AUDIT_COLUMNS = [
    "run_id", "image_id", "source_uri", "etag", "probability", "decided_stage", "decided_round", "group_size", "scores"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image to review. ``rows``: its rows of the table that brought it in, for ``Queue.history``."""

    id: str
    """What the page calls it: another one in each session, and not to be told from the tables."""
    run_id: str
    image_id: str
    uri: str
    etag: str | None
    size_bytes: int | None
    categories: tuple[str, ...]
    """All of its plan: what is asked."""
    near: frozenset[str]
    """What it was flagged as, or, if it was cleared, the category nearest its threshold: what filters go by."""
    flagged: bool
    rows: tuple[int, ...]

    def to_page(self) -> dict[str, Any]:
        return {"id": self.id, "name": visible(self.uri), "categories": list(self.categories)}


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
    """The complete run that was started last. Raises UsageError when there is none."""
    past = PastRuns(store)
    records = past.whole(past.newest(LOOKED_AT))
    started = {record["run_id"]: datetime.fromisoformat(record["started_at"]) for record in records}
    if not started:
        raise UsageError(f"there is no complete run in {store.name}: scan first, or name another --output")
    return max(started, key=lambda run_id: (started[run_id], run_id))


def read_queue(store: Store, run_ids: tuple[str, ...], order: Order = "priority") -> Queue:
    """The queue of complete runs. An image of several is in it once, as what the newest says; flagged comes first.

    Raises UsageError for a run that is not complete.
    """
    records = [_read_record(store, run_id) for run_id in run_ids]
    records.sort(key=lambda record: record["started_at"], reverse=True)
    flagged = _read(store, records, "flagged", schema.FLAGGED, FLAGGED_COLUMNS)
    audit = _read(store, records, "audit", schema.AUDIT, AUDIT_COLUMNS)
    plans = {record["run_id"]: tuple(record["plan"]["categories"]) for record in records}
    key = secrets.token_bytes(32)
    found = [*_flagged_items(flagged, plans, key)]
    seen = {item.image_id for item in found}
    drawn = [*_audit_items(audit, records, plans, key, seen)]
    return Queue(
        run_ids=tuple(run_ids),
        items=_mixed(found, drawn, order),
        categories=tuple(dict.fromkeys(name for names in plans.values() for name in names)),
        limits=_limits(records),
        flagged=flagged,
        audit=audit,
        plans=plans,
    )


def _read_record(store: Store, run_id: str) -> dict[str, Any]:
    record = commit.read_json(store, commit.record_key(run_id))
    if record is None:
        raise UsageError(f"there is no complete run {run_id!r} in {store.name}: only complete runs are reviewed")
    return record


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


def _flagged_items(table: pa.Table, plans: dict[str, tuple[str, ...]], key: bytes) -> list[Item]:
    """By priority."""
    rows: dict[str, list[int]] = defaultdict(list)
    for place, image in enumerate(table["image_id"].to_pylist()):
        rows[image].append(place)
    slim = table.select(["run_id", "image_id", "source_uri", "etag", "size_bytes", "category", "score"]).to_pylist()
    # A hash match has no score: it is known content, and comes before all that nets suspect.
    highest = {image: max(_priority(slim[place]["score"]) for place in places) for image, places in rows.items()}
    items = []
    for image in sorted(rows, key=lambda image: (-highest[image], image)):
        newest = slim[rows[image][0]]
        places = tuple(place for place in rows[image] if slim[place]["run_id"] == newest["run_id"])
        items.append(
            Item(
                id=_page_id(image, key),
                run_id=newest["run_id"],
                image_id=image,
                uri=newest["source_uri"],
                etag=newest["etag"],
                size_bytes=newest["size_bytes"],
                categories=plans[newest["run_id"]],
                near=frozenset(slim[place]["category"] for place in places),
                flagged=True,
                rows=places,
            )
        )
    return items


def _priority(score: float | None) -> float:
    return 2.0 if score is None else score


def _audit_items(
    table: pa.Table, records: list[dict[str, Any]], plans: dict[str, tuple[str, ...]], key: bytes, seen: set[str]
) -> Iterator[Item]:
    stages = {
        (record["run_id"], stage["name"]): stage["thresholds"]
        for record in records
        for stage in record["plan"].get("stages", ())
    }
    for place, row in enumerate(table.to_pylist()):
        if row["image_id"] in seen:
            continue
        seen.add(row["image_id"])
        categories = plans[row["run_id"]]
        thresholds = stages.get((row["run_id"], row["decided_stage"]), {})
        yield Item(
            id=_page_id(row["image_id"], key),
            run_id=row["run_id"],
            image_id=row["image_id"],
            uri=row["source_uri"],
            etag=row["etag"],
            size_bytes=None,
            categories=categories,
            near=_nearest(row, categories, thresholds),
            flagged=False,
            rows=(place,),
        )


def _nearest(row: dict[str, Any], categories: tuple[str, ...], thresholds: dict[str, list[float]]) -> frozenset[str]:
    """The category whose score is the largest share of its threshold; all where there are no scores."""
    scores = dict(zip(categories, row["scores"] or (), strict=False))
    if not scores:
        return frozenset(categories)
    limits = {name: thresholds[name][row["decided_round"]] if name in thresholds else 1.0 for name in scores}
    return frozenset([max(scores, key=lambda name: scores[name] / limits[name])])


def _mixed(flagged: list[Item], drawn: list[Item], order: Order) -> list[Item]:
    """One order: the flagged ones in theirs, or all by lot, and each drawn one where its lot falls."""
    ranks = {item.image_id: _lot(item.image_id) for item in drawn}
    for place, item in enumerate(flagged):
        ranks[item.image_id] = (place + 0.5) / len(flagged) if order == "priority" else _lot(item.image_id)
    return sorted([*flagged, *drawn], key=lambda item: (ranks[item.image_id], item.image_id))


def _lot(image_id: str) -> float:
    """Uniform in [0, 1), the same in every session: two reviewers begin at one end, a restart goes on where it was."""
    lot = hashlib.blake2b(image_id.encode(), digest_size=8, person=b"dorfman review").digest()
    return int.from_bytes(lot, "big") / 2**64


def _page_id(image_id: str, key: bytes) -> str:
    return hashlib.blake2b(image_id.encode(), key=key, digest_size=12).hexdigest()


def find_appealed(queue: Queue, named: list[str]) -> list[Item]:
    """The images of the queue with these uris or ids, in this order. Raises UsageError for a name that is none."""
    by_name: dict[str, list[Item]] = defaultdict(list)
    for item in queue.items:
        by_name[item.uri].append(item)
        by_name[item.image_id].append(item)
    strange = [name for name in named if name not in by_name]
    if strange:
        raise UsageError(
            f"{len(strange)} of {len(named)} appeals are about nothing that {', '.join(queue.run_ids)} flagged or "
            f"drew, {visible(strange[0])!r} first: name the runs that did with --run-id"
        )
    return list(dict.fromkeys(item for name in named for item in by_name[name]))


def read_names(uri: str, endpoint_url: str | None) -> list[str]:
    """Uris or image ids from a text file, one a line. Raises UsageError."""
    try:
        lines = read_object(parse_uri(uri), endpoint_url).decode().splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"appeals {uri}: no such file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"appeals {uri}: it is no text in UTF-8; write one uri or image id a line") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UsageError(f"appeals {uri}: it names nothing; write one uri or image id a line")
    return names
