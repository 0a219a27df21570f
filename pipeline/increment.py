"""Tonight's listing against what an earlier run listed: which objects are new, changed, gone, or judged already.

An object is the same when its uri and its etag are, which is what an image id is made of, and when it was last
written before the earlier run listed it: an etag is often an MD5, and two pictures of one MD5 can be made. One whose
source tells no etag may have changed: it is tested. So is one that the earlier run has not judged, as after an error.
Both tables may be larger than memory; DuckDB joins them out of core.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb

from pipeline.schema import EARLIER

# Image ids of ``listed`` once each, with what stands of them in ``earlier``.
_MATCHED = """
    SELECT l.image_id, l.uri, l.traceable AND e.image_id IS NOT NULL AS same, e.judged_run_id
    FROM (SELECT DISTINCT ON (image_id) image_id, uri, traceable FROM listed WHERE NOT canary) AS l
    LEFT JOIN earlier AS e ON e.image_id = l.image_id
"""
_COUNTS = f"""
    SELECT count(*) FILTER (same AND judged_run_id IS NOT NULL),
           count(*) FILTER (NOT same AND seen.uri IS NULL),
           count(*) FILTER (NOT same AND seen.uri IS NOT NULL),
           count(*) FILTER (same AND judged_run_id IS NULL)
    FROM ({_MATCHED}) AS m LEFT JOIN (SELECT DISTINCT uri FROM earlier) AS seen ON seen.uri = m.uri
"""
_DELETED = "SELECT count(DISTINCT uri) FROM earlier WHERE uri NOT IN (SELECT uri FROM listed)"
_JUDGED_BY = f"SELECT judged_run_id, count(*) FROM ({_MATCHED}) WHERE same AND judged_run_id IS NOT NULL GROUP BY 1"
# Judged objects come last: what is tested fills whole windows.
_ORDERED = """
    SELECT l.* EXCLUDE (traceable), e.judged_run_id, e.judged_outcome, e.sha256 FROM listed AS l
    LEFT JOIN (SELECT * FROM earlier WHERE judged_run_id IS NOT NULL) AS e
      ON e.image_id = l.image_id AND l.traceable AND NOT l.canary
    ORDER BY e.judged_run_id IS NOT NULL, l.rank, l.image_id, l.uri
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


def match(connection: duckdb.DuckDBPyConnection, listed: Path, earlier: Earlier | None) -> None:
    """Makes the tables ``listed`` (of a folder of Parquet files) and ``earlier``, which may be none."""
    if earlier is None:
        connection.register("earlier", EARLIER.empty_table())
        traceable = "false"
    else:
        connection.execute(f"CREATE VIEW earlier AS SELECT * FROM '{earlier.folder}/*.parquet'")
        moment = f"TIMESTAMPTZ '{earlier.listed_at.isoformat()}'"
        traceable = f"etag IS NOT NULL AND (modified_at IS NULL OR modified_at < {moment})"
    connection.execute(f"CREATE VIEW listed AS SELECT *, {traceable} AS traceable FROM '{listed}/*.parquet'")


def ordered(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyRelation:
    """Every listed row, in the order of the manifest, with the verdict that stands, if one does."""
    return connection.sql(_ORDERED)


def count(connection: duckdb.DuckDBPyConnection) -> Increment:
    row = connection.execute(_COUNTS).fetchone()
    gone = connection.execute(_DELETED).fetchone()
    assert row is not None and gone is not None
    unchanged, new, changed, unjudged = row
    return Increment(
        unchanged=unchanged,
        new=new,
        changed=changed,
        unjudged=unjudged,
        deleted=gone[0],
        judged_by=dict(sorted(connection.execute(_JUDGED_BY).fetchall())),
    )
