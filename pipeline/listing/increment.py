"""Tonight's listing against what an earlier run listed: which objects are new, changed, gone, or judged already.

An object is the same when its uri and its etag are, which is what an image id is made of, and when it was last
written before the earlier run listed it: an etag is often an MD5, and two pictures of one MD5 can be made. One whose
source tells no etag may have changed: it is tested. So is one that the earlier run has not judged, as after an error.
Both tables may be larger than memory; DuckDB joins them out of core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.listing.source import LISTED_CHUNK
from pipeline.schema import RANKED

JOIN: dict[str, Any] = {"memory_limit": "512MB", "threads": 2, "preserve_insertion_order": "false"}
"""What does not fit it joins on disk, and each of many threads would want memory of its own."""

# What has become of the listed objects, image ids once each, and which run judged the unchanged ones, and how.
_COUNTS = """
    SELECT CASE WHEN same AND judged_run_id IS NOT NULL THEN 'unchanged'
                WHEN same THEN 'unjudged'
                WHEN seen.uri IS NULL THEN 'new'
                ELSE 'changed' END AS what,
           CASE WHEN same THEN judged_run_id END AS judged_by, same AND judged_outcome = 'flagged' AS flagged, count(*)
    FROM (SELECT l.uri, l.traceable AND e.image_id IS NOT NULL AS same, e.judged_run_id, e.judged_outcome
          FROM (SELECT DISTINCT ON (image_id) image_id, uri, traceable FROM listed WHERE NOT canary) AS l
          LEFT JOIN earlier AS e ON e.image_id = l.image_id) AS m
    LEFT JOIN (SELECT DISTINCT uri FROM earlier) AS seen ON seen.uri = m.uri
    GROUP BY ALL
"""
_DELETED = "SELECT count(DISTINCT uri) FROM earlier ANTI JOIN listed USING (uri)"
_JUDGED = """
    SELECT l.* EXCLUDE (traceable), e.judged_run_id, e.judged_outcome, e.sha256 FROM listed AS l
    LEFT JOIN (SELECT * FROM earlier WHERE judged_run_id IS NOT NULL) AS e
      ON e.image_id = l.image_id AND l.traceable AND NOT l.canary
"""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """``folder``: of ``schema.EARLIER`` files. ``listed_at``: when that run began to list, in UTC."""

    folder: Path
    listed_at: datetime


@dataclass(frozen=True, kw_only=True)
class Increment:
    """Objects by what has become of them since the earlier run. The first four add up to what is listed."""

    unchanged: int
    """Judged already: not tested again."""
    new: int
    changed: int
    """Under the same uri another version, or one that may be: written since, or without an etag."""
    unjudged: int
    """The same version, but of no verdict: an error in the earlier run, or judged by one whose tables are gone."""
    deleted: int
    """Objects that the earlier run listed and that are gone."""
    judged_by: dict[str, int]
    """Of the unchanged ones: how many each run has judged."""
    flagged_by: dict[str, int]
    """Of those: how many each run has flagged. Their findings stand, and are in that run's tables."""


def compare(
    listed: Iterable[pa.Table], earlier: Earlier, folder: Path, take: Callable[[pa.Table], None]
) -> Increment | None:
    """Hands ``take`` every listed row (``schema.LISTED``) as ``schema.RANKED``, with the verdict that stands, if one
    does. None when nothing is listed. ``folder``: for what does not fit into memory."""
    there = folder / "listed"
    there.mkdir()
    for number, table in enumerate(listed):
        pq.write_table(table, there / f"{number:06d}.parquet")
    if not any(there.iterdir()):
        return None
    with duckdb.connect(config=JOIN | {"temp_directory": f"{folder}/join"}) as connection:
        _name(connection, there, earlier)
        for batch in connection.sql(_JUDGED).to_arrow_reader(LISTED_CHUNK):
            take(pa.Table.from_batches([batch]).cast(RANKED))
        return _count(connection)


def _name(connection: duckdb.DuckDBPyConnection, listed: Path, earlier: Earlier) -> None:
    """Makes the views ``listed``, of a folder of Parquet files, and ``earlier``."""
    connection.execute(f"CREATE VIEW earlier AS SELECT * FROM '{earlier.folder}/*.parquet'")
    moment = f"TIMESTAMPTZ '{earlier.listed_at.isoformat()}'"
    traceable = f"etag IS NOT NULL AND (modified_at IS NULL OR modified_at < {moment})"
    connection.execute(f"CREATE VIEW listed AS SELECT *, {traceable} AS traceable FROM '{listed}/*.parquet'")


def _count(connection: duckdb.DuckDBPyConnection) -> Increment:
    counts = connection.execute(_COUNTS).fetchall()
    gone = connection.execute(_DELETED).fetchone()
    assert gone is not None
    total: Counter[str] = Counter()
    judged_by: Counter[str] = Counter()
    flagged_by: Counter[str] = Counter()
    for what, run_id, flagged, images in counts:
        total[what] += images
        if what == "unchanged":
            judged_by[run_id] += images
            flagged_by[run_id] += images if flagged else 0
    return Increment(
        unchanged=total["unchanged"],
        new=total["new"],
        changed=total["changed"],
        unjudged=total["unjudged"],
        deleted=gone[0],
        judged_by=dict(sorted(judged_by.items())),
        flagged_by=dict(sorted((+flagged_by).items())),
    )
