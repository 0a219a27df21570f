"""The tables of an output as an analyst reads them: complete runs only, in SQL, with the verdicts that stand.

Which files count is said by the run records, so a run that is not finished, or a file that a record does not
name, is not there. Files are opened where they are, by Arrow; DuckDB pushes columns and filters down to it.
``docs/tables.md`` defines every view for its readers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import boto3
import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
from botocore.exceptions import NoCredentialsError
from pyarrow import fs

from pipeline import schema
from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.past.records import PastRuns
from pipeline.review.decisions import DECISIONS, DISPUTED, ROWS, STANDING, review_files
from pipeline.storage import parse_uri, reason, region
from pipeline.store import Store
from pipeline.tables.run_rows import SCAN_DATE, runs_table
from pipeline.window import CANARY_REASONS, UNCHANGED

_CANARIES = ", ".join(f"'{name}'" for name in CANARY_REASONS.values())

# A ledger row's key: runs by their start, and in a run by ordinal. That of a source's newest run gets NEWEST on top, so
# that it is larger than all others. Numbers, because there are as many as rows, and DuckDB can spill these.
_KEY = "r.nth * 1099511627776 + l.ordinal"
_NEWEST = 1 << 62

# For each object the row that stands: of the newest run over its source, or of a retry that came after its error.
# Canaries are left out: they are in no source.
_STANDING = f"""
WITH listed AS (
    SELECT l.source_uri, l.image_id, l.outcome, l.score, l.error_code, l.skip_reason, l.judged_run_id,
        l.judged_outcome, l.run_id, l.scan_date, r.scope, r.parent_run_id IS NULL AS over_source, {_KEY} AS key,
        {_KEY} + CASE WHEN r.newest THEN {_NEWEST} ELSE 0 END AS rank
    FROM {{ledger}} l JOIN runs r USING (run_id)
    WHERE coalesce(l.skip_reason NOT IN ({_CANARIES}), true) {{only}}
), by_source AS (
    SELECT scope, source_uri, min(scan_date) AS first_seen, max(scan_date) AS last_seen,
        coalesce(max(rank) FILTER (over_source), max(rank)) AS rank,
        coalesce(max(key) FILTER (over_source), max(key)) AS listed_key,
        max(key) FILTER (over_source AND outcome = 'error') AS error_key,
        max(key) FILTER (NOT over_source AND outcome <> 'error') AS retried_key
    FROM listed GROUP BY scope, source_uri
), by_object AS (
    SELECT source_uri, min(first_seen) AS first_seen, max(last_seen) AS last_seen, max(rank) >= {_NEWEST} AS current,
        arg_max(listed_key, rank) AS listed_key,
        arg_max(
            CASE WHEN error_key = listed_key AND retried_key > listed_key THEN retried_key ELSE listed_key END, rank
        ) AS standing_key
    FROM by_source GROUP BY source_uri
), standing AS (
    SELECT o.first_seen, o.last_seen, o.current, o.listed_key, l.*
    FROM by_object o JOIN listed l ON l.key = o.standing_key
)"""

_PER_IMAGE = f""", followed AS (
    SELECT s.key AS standing_key, earlier.*
    FROM standing s JOIN listed earlier
        ON earlier.image_id = s.image_id
        AND (earlier.run_id = s.judged_run_id OR earlier.judged_run_id = s.judged_run_id)
        AND earlier.skip_reason IS DISTINCT FROM '{UNCHANGED}'
    WHERE s.skip_reason = '{UNCHANGED}'
    QUALIFY row_number() OVER (
        PARTITION BY s.key ORDER BY coalesce(earlier.run_id = s.judged_run_id, false) DESC, earlier.key DESC
    ) = 1
), verdicts AS (
    SELECT key AS standing_key, run_id, image_id, outcome, score, error_code, judged_run_id, judged_outcome
    FROM standing WHERE skip_reason IS DISTINCT FROM '{UNCHANGED}'
    UNION ALL
    SELECT standing_key, run_id, image_id, outcome, score, error_code, judged_run_id, judged_outcome FROM followed
), found AS (
    SELECT run_id, image_id, list(category ORDER BY score DESC, category) AS categories
    FROM flagged GROUP BY run_id, image_id
)
SELECT s.source_uri, s.image_id,
    coalesce(v.judged_outcome, v.outcome, s.judged_outcome) AS outcome,
    v.score, coalesce(f.categories, []) AS categories, v.error_code,
    coalesce(v.judged_run_id, v.run_id, s.judged_run_id) AS decided_run_id,
    r.run_id AS listed_run_id, s.current, s.first_seen, s.last_seen
FROM standing s
JOIN runs r ON r.nth = s.listed_key // 1099511627776
LEFT JOIN verdicts v ON v.standing_key = s.key
LEFT JOIN found f ON f.run_id = v.run_id AND f.image_id = v.image_id"""

_FLAGGED_LATEST = f"""
SELECT f.*
FROM standing s JOIN flagged f ON f.image_id = s.image_id JOIN runs r ON r.run_id = f.run_id
WHERE s.current AND CASE WHEN s.skip_reason = '{UNCHANGED}'
    THEN f.run_id = s.judged_run_id OR f.judged_run_id = s.judged_run_id
    ELSE f.run_id = s.run_id END
QUALIFY rank() OVER (
    PARTITION BY s.source_uri ORDER BY coalesce(f.run_id = s.judged_run_id, false) DESC, r.nth DESC
) = 1"""

_VIEWS = {
    "reviews": STANDING,
    "decisions": DECISIONS,
    "disputed": DISPUTED,
    "per_image": _STANDING.format(ledger="ledger", only="") + _PER_IMAGE,
    # Findings are few: of the ledgers only those of the newest runs are read, and of these the objects ever flagged.
    "flagged_latest": _STANDING.format(
        ledger="newest_ledger", only="AND l.source_uri IN (SELECT source_uri FROM flagged)"
    )
    + _FLAGGED_LATEST,
}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """``runs``: of ``run_rows.RUNS``. ``datasets``: by name. ``gone``: files that records name and nobody can read."""

    runs: pa.Table
    datasets: dict[str, ds.Dataset]
    gone: tuple[str, ...]


def open_tables(store: Store) -> Tables:
    """The tables of the complete runs at this moment. Raises UsageError when there is none.

    What a life-cycle rule has removed of them is ``gone``, and its rows are not there.
    """
    past = PastRuns(store, with_files=True)
    records = list(_read_records(past))
    if not records:
        raise UsageError(
            f"there is no complete run in {store.name}; a run is complete when runs/<run_id>.json is there"
        )
    runs = runs_table([record for record, _ in records], past)
    filesystem, root = _filesystem(store)
    names = [*schema.TABLES, "newest_ledger"]
    fragments: dict[str, list[ds.Fragment]] = {name: [] for name in names}
    format = ds.ParquetFileFormat()
    gone: list[str] = []
    current = _current(runs)
    for record, missing in records:
        # What every row of a file has in common: files of other runs and days are not even opened.
        same = (ds.field("run_id") == record["run_id"]) & (
            ds.field(SCAN_DATE.name) == pa.scalar(date.fromisoformat(record["scan_date"]), SCAN_DATE.type)
        )
        gone += missing
        for table in schema.TABLES:
            for file in commit.files_of(table, record["files"]):
                if file["path"] in missing or not file["rows"]:
                    continue
                fragment = format.make_fragment(f"{root}/{file['path']}", filesystem, partition_expression=same)
                fragments[table].append(fragment)
                if table == "ledger" and record["run_id"] in current:
                    fragments["newest_ledger"].append(fragment)
    datasets = {
        name: ds.FileSystemDataset(files, with_scan_date(name), format, filesystem) for name, files in fragments.items()
    }
    # Of reviews there is no record: each is a file of its own, complete when it is there.
    decided = [format.make_fragment(f"{root}/{key}", filesystem) for key in review_files(store)]
    datasets[ROWS] = ds.FileSystemDataset(decided, schema.DECISIONS, format, filesystem)
    return Tables(runs=runs, datasets=datasets, gone=tuple(gone))


def with_scan_date(table: str) -> pa.Schema:
    """Columns of a table as its readers have them. What files of an older version lack is null."""
    return schema.TABLES[table.removeprefix("newest_")].append(SCAN_DATE)


def _read_records(past: PastRuns) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Records by start of the run, each with those of its files that are gone."""
    records = list(past.whole(commit.recorded(past.found)))
    # Listed after the records were read: what they named and is not there was removed, or replaced.
    there = {key for table in schema.TABLES for key in past.store.sizes(table)}
    for record in sorted(records, key=_start):
        missing = {file["path"] for file in record["files"]} - there
        yield _look_again(past.store, record) if missing else (record, missing)


def _look_again(store: Store, record: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """A run of which files are missing: it may have been compacted between the two looks."""
    while True:
        missing = {file["path"] for file in record["files"] if not store.exists(file["path"])}
        again = commit.read_json(store, commit.record_key(record["run_id"]))
        if not missing or again is None or again["files"] == record["files"]:
            return record, missing
        record = again


def _start(record: dict[str, Any]) -> tuple[datetime, str]:
    return datetime.fromisoformat(record["started_at"]), record["run_id"]


def _current(runs: pa.Table) -> set[str]:
    """The newest run of each source, and the retries that came after it."""
    rows = runs.to_pylist()
    newest = {row["scope"]: row["nth"] for row in rows if row["newest"]}
    return {row["run_id"] for row in rows if row["nth"] >= newest.get(row["scope"], len(rows))}


def _filesystem(store: Store) -> tuple[fs.FileSystem, str]:
    """Arrow's way to the output, and the output's path there. Its credentials are those of this moment."""
    location = parse_uri(store.uri)
    if location.bucket is None:
        return fs.LocalFileSystem(), location.key
    credentials = boto3.Session().get_credentials()
    if credentials is None:
        raise UsageError(reason(NoCredentialsError()))
    keys = credentials.get_frozen_credentials()
    return fs.S3FileSystem(
        access_key=keys.access_key,
        secret_key=keys.secret_key,
        session_token=keys.token,
        region=region(),
        endpoint_override=store.endpoint_url,
    ), f"{location.bucket}/{location.key}".rstrip("/")


@contextmanager
def sql_session(tables: Tables, folders: tuple[str, ...] = ()) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of its own with the views, which can read and write no file but those below ``folders``.

    Nothing in it is written back to the output: the tables are views on what is there.
    """
    with tempfile.TemporaryDirectory(prefix="dorfman-query-") as spill, duckdb.connect() as connection:
        connection.register("runs", tables.runs)
        for name, dataset in tables.datasets.items():
            connection.register(name, dataset)
        for name, query in _VIEWS.items():
            connection.execute(f"CREATE VIEW {name} AS {query}")
        allowed = [f"{Path(folder).resolve()}/" for folder in folders]
        connection.execute("SET temp_directory = $1", [spill])
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET allowed_directories = $1", [allowed])
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def explained(error: duckdb.Error, tables: Tables) -> str:
    """What DuckDB says, in one line, and the remedy that it cannot know."""
    said = " ".join(str(error).split("\n\nLINE ")[0].split())
    file = re.match(r'Permission Error: Cannot access file "([^"]+)"', said)
    if file and "://" not in file[1]:
        return f"{said}; files are read and written in folders that --files names, none of which is the output"
    if re.match("Catalog Error: Table with name [^/]+ does not exist", said):
        views = ["runs", *(name for name in tables.datasets if name != ROWS), *_VIEWS]
        return f"{said}; the views are {', '.join(views)}"
    return said
