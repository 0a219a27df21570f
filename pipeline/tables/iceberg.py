"""Publishes complete runs as snapshots of Iceberg tables, each exactly once however often it is tried.

A run's rows are copied: compaction and erasure replace the output's own files, which no catalog would notice. What
is published of a run and table comes in one commit, whose snapshots name the run. Who publishes looks for that name
first, and the commit fails when anybody has committed since; then it looks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, TableAlreadyExistsError
from pyiceberg.expressions import And, EqualTo
from pyiceberg.table import Table

from pipeline import schema
from pipeline.errors import RunError, UsageError
from pipeline.output import commit
from pipeline.storage import reason
from pipeline.store import Store
from pipeline.tables.compact import TARGET_BYTES, pack, read_files
from pipeline.tables.run_rows import SCAN_DATE
from pipeline.tables.sql import with_scan_date

RUN_ID = "dorfman.run-id"
"""In the summary of a run's snapshots."""
PROPERTIES = {
    "write.parquet.compression-codec": "zstd",
    # pyiceberg would repeat a commit that lost a race on top of the winner's, which may be of the same run.
    "commit.retry.num-retries": "0",
}
ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class Published:
    """``rows`` by table, of those that were published now; the others had been."""

    run_id: str
    rows: dict[str, int]


def open_catalog(name: str, namespace: str) -> Catalog:
    """The catalog as pyiceberg's own configuration describes it, with the namespace. Raises UsageError."""
    try:
        catalog = load_catalog(name)
        catalog.create_namespace_if_not_exists(namespace)
    except Exception as error:
        raise UsageError(
            f"catalog {name!r}: {reason(error)}; describe it in .pyiceberg.yaml or in the environment, as "
            f"PYICEBERG_CATALOG__{name.upper()}__URI"
        ) from error
    return catalog


def publish(store: Store, run_ids: tuple[str, ...], catalog: Catalog, namespace: str) -> Iterator[Published]:
    """Publishes complete runs, by name or all, in the order in which they were started.

    Raises UsageError for a name that is none, and RunError when a table cannot be written.
    """
    complete = commit.complete_runs(store)
    for run in run_ids:
        if run not in complete:
            raise UsageError(f"there is no complete run {run!r} in {store.name}: only complete runs are published")
    records = [commit.read_record(store, run) for run in run_ids or complete]
    for record in sorted(filter(None, records), key=lambda record: (record["started_at"], record["run_id"])):
        rows = {}
        for table in schema.TABLES:
            if _publish_table(store, record, catalog, f"{namespace}.{table}", table):
                rows[table] = sum(file["rows"] for file in commit.files_of(table, record["files"]))
        yield Published(run_id=record["run_id"], rows=rows)


def _publish_table(store: Store, record: dict[str, Any], catalog: Catalog, identifier: str, name: str) -> bool:
    """Whether it was this call that did it."""
    for _ in range(ATTEMPTS):
        try:
            table = _open_table(catalog, identifier, name)
            if _is_published(table, record):
                return False
            _append(store, record, table, name)
        except (CommitFailedException, TableAlreadyExistsError):
            continue  # another publisher was faster, perhaps with this very run
        except RunError:
            raise
        except Exception as error:
            raise RunError(
                f"run {record['run_id']!r}: table {identifier} was not written: {reason(error)}; publish again"
            ) from error
        return True
    raise RunError(f"table {identifier} is being changed all the time: publish run {record['run_id']!r} again later")


def _open_table(catalog: Catalog, identifier: str, name: str) -> Table:
    """The table with all columns there are today; what is made here is partitioned by the night."""
    columns = with_scan_date(name)
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError:
        creation = catalog.create_table_transaction(identifier, columns, properties=PROPERTIES)
        with creation, creation.update_spec() as partitions:
            partitions.add_identity(SCAN_DATE.name)
        table = catalog.load_table(identifier)
    lacking = not set(columns.names) <= set(table.schema().column_names)
    if lacking or PROPERTIES.items() - table.properties.items():
        with table.transaction() as change:
            if lacking:
                with change.update_schema() as evolution:
                    evolution.union_by_name(columns)
            change.set_properties(PROPERTIES)
        table = catalog.load_table(identifier)
    return table


def _is_published(table: Table, record: dict[str, Any]) -> bool:
    if any(snapshot.summary and snapshot.summary.get(RUN_ID) == record["run_id"] for snapshot in table.snapshots()):
        return True
    # Old snapshots expire, and with them what they say of themselves; their rows stay.
    night, run = (EqualTo(term=name, value=record[name]) for name in (SCAN_DATE.name, "run_id"))
    return table.scan(row_filter=And(night, run), selected_fields=("run_id",), limit=1).to_arrow().num_rows > 0


def _append(store: Store, record: dict[str, Any], table: Table, name: str) -> None:
    """One commit, with a snapshot for every file that a compacted run has: no more of them is held in memory."""
    with table.transaction() as transaction:
        for files in pack(commit.files_of(name, record["files"]), TARGET_BYTES) or [[]]:
            rows = read_files(store, files, name) if files else schema.TABLES[name].empty_table()
            complete = pa.concat_tables([schema.TABLES[name].empty_table(), rows], promote_options="default")
            night = pa.repeat(pa.scalar(date.fromisoformat(record["scan_date"]), SCAN_DATE.type), rows.num_rows)
            transaction.append(complete.append_column(SCAN_DATE, night), {RUN_ID: record["run_id"]})
