"""Makes one file of the many that a day of reviewing left: the same rows, once each.

    1. the rows of all files of a day are written to a new one beside them, and read back
    2. the old ones are removed

No record says which files count. So between the two a reader finds rows twice, and takes them once; and who finds a
file gone that was listed a moment ago lists again (``decisions.read_all``). What ends anywhere is done by the next.
A day that may still grow is left as it is: open pages look for new decisions there (``ReviewLog.refresh``).

An erasure rewrites the same files, and a row that it takes out must not come back with a merged one: each keeps the
other out (``leases.alone``).
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline.output.sink import table_bytes
from pipeline.review.decisions import FOLDER, REWRITTEN, YOUNG_DAYS, distinct, read_decisions, review_files
from pipeline.review.leases import alone
from pipeline.store import Store, digest


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What became of a day's files. ``day``: YYYY-MM-DD, UTC."""

    day: str
    files_before: int
    decisions: int


def compact_reviews(store: Store) -> list[Merged]:
    """Merges the files of each day that has several and cannot grow any more, one day after the other.

    Raises RunError while an erasure or another merge is at work.
    """
    if not _days(store):
        return []
    merged = []
    with alone(store, REWRITTEN) as hold:
        # Listed once more: another merge may have come to its end since.
        for day, keys in _days(store).items():
            hold()
            merged.append(_merge(store, day, keys, hold))
    return merged


def _days(store: Store) -> dict[str, list[str]]:
    """Files by day, where there is something to merge."""
    young = f"{datetime.now(UTC) - timedelta(days=YOUNG_DAYS - 1):%Y-%m-%d}"
    days: dict[str, list[str]] = defaultdict(list)
    for key in review_files(store):
        days[key.split("/")[1].partition("=")[2]].append(key)
    return {day: keys for day, keys in days.items() if day < young and len(keys) > 1}


def _merge(store: Store, day: str, keys: list[str], hold: Callable[[], None]) -> Merged:
    table = distinct(read_decisions(store, keys))
    body = table_bytes(table)
    hold()  # many files take long to read
    key = f"{FOLDER}/review_date={day}/merged-{uuid.uuid4().hex}.parquet"
    store.write(key, body)
    store.read(key, digest(body))  # what is removed next must be there
    store.delete(keys)
    return Merged(day=day, files_before=len(keys), decisions=len(table["decision_id"].unique()))
