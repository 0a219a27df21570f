"""Rows of a run's tables as images to review, in one order that does not tell flagged from drawn ones.

Flagged images come by priority: hash matches, then from the highest score down. Each drawn image has a place by chance
among all of them. Every image is asked about in all categories of its plan, and what the page is told of one
(``Item.to_page``) is the same for both.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pipeline.reporting.visible import visible

Order = Literal["priority", "random"]


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


def flagged_items(table: pa.Table, plans: dict[str, tuple[str, ...]], key: bytes) -> list[Item]:
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


def drawn_items(
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


def mixed(flagged: list[Item], drawn: list[Item], order: Order) -> list[Item]:
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
