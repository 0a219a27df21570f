"""All decisions of an output as a session of the review page knows them: its own, and those of others as they come."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.review.decisions import (
    JUDGEMENTS,
    LABELS,
    YOUNG_DAYS,
    distinct,
    file_key,
    read_all,
    read_each,
    review_files,
    write_decision,
)
from pipeline.review.leases import now
from pipeline.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One decision on one image. ``answer``: violating when any category is; then ``categories`` says which."""

    decision_id: str
    kind: str
    reviewer: str
    decided_at: datetime
    answer: str
    categories: tuple[str, ...]
    asked: frozenset[str]
    """All categories that it is about."""

    @property
    def judges(self) -> bool:
        """Whether it says something of what the picture shows."""
        return self.answer in JUDGEMENTS

    def to_page(self) -> dict[str, Any]:
        moment = self.decided_at.strftime("%Y-%m-%d %H:%M UTC")
        return {
            "kind": self.kind,
            "reviewer": self.reviewer,
            "decided_at": moment,
            "answer": self.answer,
            "categories": list(self.categories),
        }


class ReviewLog:
    """Reads everything when it is made, and afterwards what is new. Writes before it remembers."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.withdrawn: set[str] = set()
        self.of_image: dict[str, dict[str, Decision]] = defaultdict(dict)
        self.read_at = now()
        """All that had been decided by then is known."""
        decisions, self.known = read_all(store)
        self._remember(decisions.to_pylist())

    def refresh(self) -> bool:
        """Reads what others have decided since; whether that was anything. Lists the days that may have grown."""
        moment = now()
        fresh = [
            key for day in _days(self.read_at, moment) for key in review_files(self.store, day) if key not in self.known
        ]
        tables = [table for _, table in read_each(self.store, fresh)]
        self._remember(distinct(pa.concat_tables([schema.DECISIONS.empty_table(), *tables])).to_pylist())
        self.known.update(fresh)
        # A file that was listed and is gone may have been merged into one that was not: its day is listed again.
        if all(table.num_rows for table in tables):
            self.read_at = moment
        return bool(fresh)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Returns when one decision is durable. ``rows``: of ``schema.DECISIONS``, with the same decision id."""
        write_decision(self.store, rows)
        self.known.add(file_key(rows[0]["decision_id"], rows[0]["decided_at"]))
        self._remember(rows)

    def _remember(self, rows: list[dict[str, Any]]) -> None:
        together: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            together[row["decision_id"]].append(row)
        for decision_id, parts in together.items():
            first = parts[0]
            if first["withdraws"]:
                self.withdrawn.add(first["withdraws"])
                continue
            violating = tuple(row["category"] for row in parts if row["label"] == LABELS["violating"])
            self.of_image[first["image_id"]][decision_id] = Decision(
                **{name: first[name] for name in ("decision_id", "kind", "reviewer", "decided_at")},
                answer="violating" if violating else first["decision"],
                categories=violating,
                asked=frozenset(row["category"] for row in parts),
            )

    def on(self, image_id: str) -> list[Decision]:
        """Decisions on an image that were not taken back, the oldest first."""
        found = self.of_image.get(image_id, {}).values()
        kept = [decision for decision in found if decision.decision_id not in self.withdrawn]
        return sorted(kept, key=lambda decision: (decision.decided_at, decision.decision_id))

    def judgement(self, image_id: str, kind: str) -> Decision | None:
        """The newest of a kind that says something of the picture and was not taken back."""
        found = [decision for decision in self.on(image_id) if decision.kind == kind and decision.judges]
        return found[-1] if found else None


def _days(since: datetime, until: datetime) -> list[str]:
    """Days with decisions that were made between two moments. The machine of an open page may have slept for many."""
    first = (min(since, until) - timedelta(days=YOUNG_DAYS - 1)).date()  # clocks differ
    return [f"{first + timedelta(days=day):%Y-%m-%d}" for day in range((until.date() - first).days + 1)]


def rows_of(
    *,
    decision_id: str,
    kind: str,
    reviewer: str,
    item_rows: dict[str, str],
    categories: tuple[str, ...],
    answer: str,
    violating: tuple[str, ...],
    revealed: bool,
    sha256: str | None,
) -> list[dict[str, Any]]:
    """``schema.DECISIONS`` rows of one decision made now; ``item_rows``: run_id, image_id and source_uri."""
    moment = now()
    rows = []
    for category in categories:
        said = answer if answer != "violating" or category in violating else "not violating"
        row = dict.fromkeys(schema.DECISIONS.names) | item_rows
        row |= {"decision_id": decision_id, "kind": kind, "reviewer": reviewer, "decided_at": moment}
        row |= {"category": category, "decision": said, "label": LABELS.get(said)}
        rows.append(row | {"revealed": revealed, "sha256": sha256})
    return rows


def count_answers(decisions: Iterable[Decision]) -> dict[str, int]:
    return dict(Counter(decision.answer for decision in decisions))
