"""What people decided on the review page: a small Parquet file a decision below ``reviews/``, added and never changed.

    OUT/reviews/review_date=D/<time>-<decision_id>.parquet   a row for each category that was asked for
    OUT/reviews/review_date=D/merged-<id>.parquet            many of these in one (``compact_reviews.py``)
    OUT/reviews/_leases/                                     who is looking at what (``leases.py``)

Taking a decision back is a row of its own. Which decision stands is said here and nowhere else (``STANDING``): of
those on one image and category that were not taken back the newest of the highest kind. Only ``jobs.erase`` takes rows
out. While files are merged a row is there twice, and counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import UsageError
from pipeline.output.sink import table_bytes
from pipeline.storage import reason
from pipeline.store import Store

FOLDER = "reviews"
KINDS = ("first", "second", "appeal")
"""From the lowest up: a decision of a higher kind stands whatever lower ones said, and said later."""
LABELS = {"violating": 1, "not violating": 0}
"""Decisions that give a label."""
UNSURE = "unsure"
JUDGEMENTS = (*LABELS, UNSURE)
"""Decisions on what the picture shows. ``not seen`` is none: there was no picture to look at."""
ANSWERS = (*JUDGEMENTS, "not seen")
WITHDRAWN = "withdrawn"
READERS = 32
YOUNG_DAYS = 2
"""Today and yesterday: days whose folder may still get decisions, from machines whose clocks differ."""
REWRITTEN = "decisions"
"""What is held by who replaces files of decisions (``leases.alone``)."""

_RANKS = " ".join(f"WHEN '{kind}' THEN {rank}" for rank, kind in enumerate(KINDS))
_JUDGEMENTS = ", ".join(f"'{name}'" for name in JUDGEMENTS)


def _said_by(decision: str) -> str:
    return f"coalesce(list(DISTINCT reviewer ORDER BY reviewer) FILTER (decision = '{decision}'), [])"


ROWS = "review_rows"
"""What the queries here call the rows of the files."""

# All decisions, each with whether it was taken back, whether it stands, and whether those that count on its image and
# category differ. What an analyst reads comes first.
STANDING = f"""
WITH once AS (
    SELECT DISTINCT ON (decision_id, category) * FROM {ROWS} ORDER BY decided_at
), marked AS (
    SELECT d.*, coalesce(w.withdraws IS NOT NULL, false) AS taken_back,
        w.withdraws IS NULL AND d.decision IN ({_JUDGEMENTS}) AS counts
    FROM once d LEFT JOIN (SELECT DISTINCT withdraws FROM once WHERE withdraws IS NOT NULL) w
        ON w.withdraws = d.decision_id
)
SELECT source_uri, category, decision, kind, reviewer, decided_at,
    counts AND row_number() OVER (
        PARTITION BY image_id, category, counts
        ORDER BY CASE kind {_RANKS} ELSE -1 END DESC, decided_at DESC, decision_id DESC
    ) = 1 AS stands,
    coalesce(min(label) FILTER (WHERE counts) OVER images <> max(label) FILTER (WHERE counts) OVER images, false)
        AS disputed,
    taken_back, label, revealed, run_id, image_id, sha256, decision_id, withdraws
FROM marked
WINDOW images AS (PARTITION BY image_id, category)"""

# One row for each image and category that has a decision.
DECISIONS = """
SELECT source_uri, category, decision, kind, reviewer, decided_at, disputed, label, revealed, run_id, image_id, sha256,
    decision_id
FROM reviews WHERE stands"""

# Where labels differ: what stands, and who says what.
DISPUTED = f"""
SELECT source_uri, category,
    any_value(decision) FILTER (stands) AS decision, any_value(kind) FILTER (stands) AS kind,
    {", ".join(f"{_said_by(name)} AS {name.replace(' ', '_')}" for name in JUDGEMENTS)},
    max(decided_at) AS last_decided_at, image_id
FROM reviews WHERE disputed AND NOT taken_back
GROUP BY source_uri, category, image_id"""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What stands. ``unsure``: images of which the standing decision in some category gives no label."""

    labels: dict[tuple[str, str], int]
    """By (image_id, category): 1 violating, 0 not."""
    unsure: dict[str, str]
    """By image_id: the kind of that decision, the highest where there are several."""


def review_files(store: Store, day: str | None = None) -> list[str]:
    """Keys of all decisions, or of those of a day (``YYYY-MM-DD``, UTC)."""
    below = f"{FOLDER}/review_date={day}" if day else FOLDER
    return sorted(key for key in store.sizes(below) if key.endswith(".parquet"))


def file_key(decision_id: str, decided_at: datetime) -> str:
    return f"{FOLDER}/review_date={decided_at:%Y-%m-%d}/{decided_at:%H%M%S}-{decision_id}.parquet"


def write_decision(store: Store, rows: list[dict[str, Any]]) -> None:
    """Returns when the rows of one decision are in the store. May be repeated with the same rows."""
    (decision_id,), (decided_at,) = ({row[name] for row in rows} for name in ("decision_id", "decided_at"))
    store.create(file_key(decision_id, decided_at), table_bytes(pa.Table.from_pylist(rows, schema.DECISIONS)))


def read_decisions(store: Store, keys: Iterable[str]) -> pa.Table:
    """The rows of these files, without those of files that are gone. Raises UsageError for one that is no review."""
    return pa.concat_tables([schema.DECISIONS.empty_table(), *(table for _, table in read_each(store, keys))])


def read_all(store: Store) -> tuple[pa.Table, set[str]]:
    """All decisions, once each, and the keys of their files. Raises UsageError for a file that is no review."""
    tables, read = [schema.DECISIONS.empty_table()], set[str]()
    while fresh := [key for key in review_files(store) if key not in read]:
        found = [table for _, table in read_each(store, fresh)]
        tables += found
        read.update(fresh)
        if all(table.num_rows for table in found):
            break
        # A file is gone that was listed: its rows may be in another one by now.
    return distinct(pa.concat_tables(tables)), read


def distinct(decisions: pa.Table) -> pa.Table:
    """Each decision once a category: while files are merged, and when a PUT was repeated, there are more."""
    numbered = decisions.append_column("row", pa.array(np.arange(len(decisions))))
    first = numbered.group_by(["decision_id", "category"]).aggregate([("row", "min")])["row_min"]
    return decisions.take(first.combine_chunks().sort())


def read_each(store: Store, keys: Iterable[str]) -> Iterator[tuple[str, pa.Table]]:
    """The same file by file, many requests in flight."""
    wanted = list(keys)
    with ThreadPoolExecutor(READERS) as readers:
        yield from zip(wanted, readers.map(lambda key: _read(store, key), wanted), strict=True)


def _read(store: Store, key: str) -> pa.Table:
    try:
        # One after the other within a thread: that many small files are slower with Arrow's threads on top. And not by
        # read_table, which makes a dataset of each.
        table = pq.ParquetFile(pa.BufferReader(store.read(key))).read(use_threads=False)
        if table.schema.equals(schema.DECISIONS):
            return table
        return table.select(schema.DECISIONS.names).cast(schema.DECISIONS)
    except FileNotFoundError:
        return schema.DECISIONS.empty_table()  # erased or merged since it was listed
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{store.uri_of(key)} is no file of reviews: {reason(error)}; take it away") from error


def read_standing(store: Store) -> Standing:
    """What stands of all decisions in an output."""
    return standing(read_all(store)[0])


def standing(decisions: pa.Table) -> Standing:
    """What stands of ``schema.DECISIONS`` rows."""
    with duckdb.connect() as connection:
        connection.register(ROWS, decisions)
        found = connection.execute(f"SELECT image_id, category, label, kind FROM ({STANDING}) WHERE stands").fetchall()
    unsure = sorted(
        ((image, kind) for image, _, label, kind in found if label is None), key=lambda of: KINDS.index(of[1])
    )
    return Standing(
        labels={(image, category): label for image, category, label, _ in found if label is not None},
        unsure=dict(unsure),
    )


def source_labels(decisions: pa.Table) -> pa.Table:
    """What stands as ``schema.LABELS``; without objects that have several labels in several versions."""
    with duckdb.connect() as connection:
        connection.register(ROWS, decisions)
        answer = connection.sql(
            f"SELECT source_uri AS uri, category, min(label) AS label FROM ({STANDING}) WHERE stands "
            "GROUP BY ALL HAVING min(label) = max(label) AND count(label) = count(*) ORDER BY ALL"
        )
        return answer.to_arrow_table().cast(schema.LABELS)
