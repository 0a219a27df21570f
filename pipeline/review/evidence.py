"""What people said of a run's images, joined with what the run said of them."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.review.decisions import Standing
from pipeline.review.estimate import NOT_REVIEWED, Reviewed
from pipeline.schema import ALL
from pipeline.storage import parse_uri, read_object, reason
from pipeline.store import Store

FLAGGED_COLUMNS = ["run_id", "image_id", "source_uri", "category", "score", "judged_run_id"]
AUDIT_COLUMNS = ["run_id", "image_id", "source_uri", "probability", "decided_stage", "decided_round", "scores"]


def read_reviews(uri: str, endpoint_url: str | None = None) -> dict[tuple[str, str], int]:
    """Labels by (image_id, category) from a Parquet file of ``schema.REVIEWS``. Raises UsageError."""
    try:
        table = pq.read_table(io.BytesIO(read_object(parse_uri(uri), endpoint_url)))
        table = table.select(schema.REVIEWS.names).cast(schema.REVIEWS)
    except FileNotFoundError as error:
        raise UsageError(f"reviews {uri}: no such file") from error
    except (KeyError, ValueError, OSError, pa.ArrowException) as error:
        names = ", ".join(schema.REVIEWS.names)
        raise UsageError(f"reviews {uri}: wanted Parquet with {names}; {reason(error)}") from error
    labels: dict[tuple[str, str], int] = {}
    for row in table.to_pylist():
        key, label = (row["image_id"], row["category"]), row["label"]
        if label not in (0, 1):
            raise UsageError(f"reviews {uri}: the label of {key} is {label}, but only 0 and 1 are labels")
        if labels.setdefault(key, label) != label:
            raise UsageError(f"reviews {uri}: {key} is labelled 0 and 1; keep the label that stands")
    return labels


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Flagged and drawn rows of one or several runs, and the labels of those that were reviewed."""

    records: list[dict[str, Any]]
    categories: tuple[str, ...]
    flagged: list[dict[str, Any]] = field(repr=False)
    audited: list[dict[str, Any]] = field(repr=False)
    labels: dict[tuple[str, str], int] = field(repr=False)
    unsure: dict[str, int] = field(default_factory=dict)
    """Images of these of which what people said gives no label, by the kind of review that left them so."""

    def of_category(self, category: str) -> Reviewed:
        """Flagged rows of a category; violating in it or not. What is flagged as something else is not missed."""
        rows = [row for row in self.flagged if row["category"] == category]
        return self._reviewed(category, [self._label(row["image_id"], (category,)) for row in rows], (category,))

    def of_all(self) -> Reviewed:
        """Images; violating in any category or in none."""
        return self._reviewed(ALL, [self._of_image(image) for _, image in self._flagged_as], self.categories)

    def _reviewed(self, name: str, flagged: list[int], categories: tuple[str, ...]) -> Reviewed:
        return Reviewed(
            name=name,
            flagged_F=np.array(flagged, np.int8),
            audited_A=np.array([self._label(row["image_id"], categories) for row in self.audited], np.int8),
            probability_A=np.array([row["probability"] for row in self.audited], float),
            stage_A=np.array([row["decided_stage"] for row in self.audited], object),
            cleared=sum(record["counts"]["cleared"] for record in self.records),
            rates=tuple(sorted({rate for record in self.records for rate in record["plan"]["audit"].values()})),
        )

    def _label(self, image: str, categories: tuple[str, ...]) -> int:
        labels = [self.labels.get((image, category), NOT_REVIEWED) for category in categories]
        return NOT_REVIEWED if NOT_REVIEWED in labels else max(labels)

    def _of_image(self, image: str) -> int:
        return max(self.labels.get((image, category), NOT_REVIEWED) for category in self.categories)

    @cached_property
    def _flagged_as(self) -> dict[tuple[str, str], set[str]]:
        """Categories of each flagged image of each run."""
        images = defaultdict(set)
        for row in self.flagged:
            images[row["run_id"], row["image_id"]].add(row["category"])
        return images

    def check(self) -> None:
        """Raises UsageError for reviews that no row asked for, and for images that were reviewed by half."""
        unknown = sorted({category for _, category in self.labels} - set(self.categories))
        if unknown:
            raise UsageError(f"reviews name categories {unknown}, but the plan's are {list(self.categories)}")
        asked = {row["image_id"] for row in [*self.flagged, *self.audited]}
        strange = sorted({image for image, _ in self.labels} - asked)
        if strange:
            runs = ", ".join(record["run_id"] for record in self.records)
            raise UsageError(
                f"reviews name {len(strange):,} images that are in no flagged or audit table of {runs}, as "
                f"{strange[0]!r}; name the runs they belong to, or leave them out"
            )
        for (_, image), categories in self._flagged_as.items():
            self._check_whole(image, categories, "it is flagged as")
        for row in self.audited:
            self._check_whole(row["image_id"], set(self.categories), "the plan looks for")

    def _check_whole(self, image: str, categories: set[str], which: str) -> None:
        # Labels of what is violating alone would make the misses look many, and the other way about.
        missing = sorted(category for category in categories if (image, category) not in self.labels)
        if missing and len(missing) < len(categories):
            raise UsageError(f"image {image!r} was reviewed, but not for {missing}: give a label for all that {which}")

    def source_labels(self) -> pa.Table:
        """Everything that was reviewed, as ``schema.LABELS``; without what has several labels in several versions."""
        found = defaultdict(set)
        for row in [*self.flagged, *self.audited]:
            for category in self.categories:
                label = self.labels.get((row["image_id"], category))
                if label is not None:
                    found[row["source_uri"], category].add(label)
        rows = [
            {"uri": uri, "category": category, "label": label}
            for (uri, category), (label, *others) in sorted(found.items())
            if not others
        ]
        return pa.Table.from_pylist(rows, schema.LABELS)


def read_evidence(store: Store, run_ids: tuple[str, ...], labels: dict[tuple[str, str], int] | Standing) -> Evidence:
    """Reads the tables of complete runs by digest. Raises UsageError when they and the reviews do not fit.

    Labels of a file must be of these runs. What stands in an output is of all its runs, so of that these take their
    own. What a run flagged because another had flagged the same content is a finding of that other: copies of what had
    been flagged are found, copies of misses are nowhere. Their labels may be given, and count nowhere.
    """
    records = [_read_record(store, run_id) for run_id in run_ids]
    first = records[0]
    for record in records:
        if set(record["plan"]["categories"]) != set(first["plan"]["categories"]):
            raise UsageError(
                f"run {record['run_id']!r} looked for {record['plan']['categories']}, run {first['run_id']!r} for "
                f"{first['plan']['categories']}: audit them apart"
            )
    categories = tuple(first["plan"]["categories"])
    found = [row for record in records for row in _rows(store, record, "flagged", FLAGGED_COLUMNS)]
    flagged = [row for row in found if row["judged_run_id"] is None]
    audited = [row for record in records for row in _rows(store, record, "audit", AUDIT_COLUMNS)]
    asked = {row["image_id"] for row in (*flagged, *audited)}
    unsure: dict[str, int] = {}
    if isinstance(labels, Standing):
        unsure = Counter(kind for image, kind in labels.unsure.items() if image in asked)
        labels = _own(labels.labels, asked, categories)
    else:
        copies = {row["image_id"] for row in found} - asked
        labels = {key: label for key, label in labels.items() if key[0] not in copies}
    evidence = Evidence(
        records=records, categories=categories, flagged=flagged, audited=audited, labels=labels, unsure=unsure
    )
    evidence.check()
    return evidence


def _own(
    labels: dict[tuple[str, str], int], asked: set[str], categories: tuple[str, ...]
) -> dict[tuple[str, str], int]:
    """Labels of images that these runs ask about, where there is one for every category."""
    whole = [image for image in asked if all((image, category) in labels for category in categories)]
    return {(image, category): labels[image, category] for image in whole for category in categories}


def _read_record(store: Store, run_id: str) -> dict[str, Any]:
    record = commit.read_complete(store, run_id, "audited")
    if not commit.files_of("audit", record["files"]):
        raise UsageError(f"run {run_id!r} has no audit table: it was made by a version that drew no sample")
    return record


def _rows(store: Store, record: dict[str, Any], table: str, columns: list[str]) -> list[dict[str, Any]]:
    return [
        row
        for file in commit.files_of(table, record["files"])
        if file["rows"]
        for row in pq.read_table(
            io.BytesIO(store.read(file["path"], file["sha256"])),
            columns=columns,
            schema=schema.TABLES[table],
        ).to_pylist()
    ]
