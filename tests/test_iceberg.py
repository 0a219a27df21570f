"""Complete runs as snapshots of Iceberg tables in a local catalog: once each, read back as they were written."""

from __future__ import annotations

import functools
import sys
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog, load_catalog

from jobs import iceberg as job
from pipeline import schema
from pipeline.errors import RunError
from pipeline.store import Store
from pipeline.tables.compact import compact
from pipeline.tables.iceberg import RUN_ID, open_catalog, publish
from pipeline.tables.sql import with_scan_date
from tests.outputs import judged, run_here, unchanged, write_night
from tests.test_jobs import expect


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "out"))
    write_night(store, "mon", 0, [judged("a", "flagged", "gore", "weapon"), judged("b", "cleared")], version=1)
    write_night(store, "tue", 1, [unchanged("a", "mon", "flagged"), judged("c", "error", error_code="truncated")])
    return store


@pytest.fixture
def catalog(tmp_path, monkeypatch) -> Catalog:
    """A catalog "local" in a file. pyiceberg reads its own configuration once, when it is imported."""
    described = {"type": "sql", "uri": f"sqlite:///{tmp_path}/catalog.db", "warehouse": f"file://{tmp_path}/warehouse"}
    load = functools.partial(load_catalog, **described)
    monkeypatch.setattr(
        "pipeline.tables.iceberg.load_catalog", lambda name: load(name) if name == "local" else load_catalog(name)
    )
    return open_catalog("local", "nights")


def rows(catalog: Catalog, name: str) -> list[dict]:
    table = catalog.load_table(f"nights.{name}").scan().to_arrow()
    assert table.schema.names == with_scan_date(name).names
    return sorted(table.to_pylist(), key=str)


def snapshots(catalog: Catalog, name: str) -> list[str]:
    return [snapshot.summary[RUN_ID] for snapshot in catalog.load_table(f"nights.{name}").snapshots()]


def in_output(store: Store, name: str) -> list[dict]:
    found = []
    for key in sorted(store.sizes(name)):
        night = key.split("scan_date=")[1].split("/")[0]
        for row in pq.read_table(pa.BufferReader(store.read(key))).to_pylist():
            row |= {"scan_date": date.fromisoformat(night)}
            found.append({column: row.get(column) for column in with_scan_date(name).names})
    return sorted(found, key=str)


def test_runs_are_published_once_and_read_back_as_they_are(store, catalog):
    first = list(publish(store, ("mon",), catalog, "nights"))
    assert [(done.run_id, done.rows) for done in first] == [
        ("mon", {"ledger": 2, "flagged": 2, "errors": 0, "audit": 0})
    ]
    again = list(publish(store, ("mon",), catalog, "nights"))
    assert [(done.run_id, done.rows) for done in again] == [("mon", {})]
    assert snapshots(catalog, "ledger") == ["mon"] == snapshots(catalog, "audit")
    both = list(publish(store, (), catalog, "nights"))
    assert [(done.run_id, list(done.rows)) for done in both] == [("mon", []), ("tue", list(schema.TABLES))]
    for name in schema.TABLES:
        assert snapshots(catalog, name) == ["mon", "tue"]
        assert rows(catalog, name) == in_output(store, name)
        assert [str(field.name) for field in catalog.load_table(f"nights.{name}").spec().fields] == ["scan_date"]
    compact(store, "mon")
    assert [done.rows for done in publish(store, (), catalog, "nights")] == [{}, {}]


def test_what_expired_snapshots_published_is_not_published_again(store, catalog):
    list(publish(store, (), catalog, "nights"))
    for name in ("ledger", "flagged"):
        table = catalog.load_table(f"nights.{name}")
        table.maintenance.expire_snapshots().by_id(table.snapshots()[0].snapshot_id).commit()
        assert snapshots(catalog, name) == ["tue"]
    assert "ledger" not in next(publish(store, ("mon",), catalog, "nights")).rows
    assert rows(catalog, "ledger") == in_output(store, "ledger")


@pytest.mark.parametrize("rival", ["mon", "tue"])
def test_of_two_publishers_at_once_one_wins_and_the_other_looks_again(store, catalog, monkeypatch, rival):
    from pipeline.tables import iceberg as module

    append = module._append
    came = []

    def append_late(*args: object) -> None:
        """Behind another publisher, who came between the look at the snapshots and the commit."""
        if not came:
            came.append(rival)
            list(publish(store, (rival,), open_catalog("local", "nights"), "nights"))
        append(*args)

    monkeypatch.setattr(module, "_append", append_late)
    (done,) = publish(store, ("mon",), catalog, "nights")
    assert ("ledger" in done.rows) == (rival == "tue")
    assert sorted(snapshots(catalog, "ledger")) == sorted({"mon", rival})
    list(publish(store, (), catalog, "nights"))
    for name in schema.TABLES:
        assert rows(catalog, name) == in_output(store, name)


def test_tables_of_an_older_version_gain_the_columns_of_the_newer(store, catalog, monkeypatch):
    older = {
        name: pa.schema(
            [
                field
                for field in table
                if field.name not in ("judged_run_id", "judged_outcome", "sha256", "match_ignored")
            ]
        )
        for name, table in schema.TABLES.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(schema, "TABLES", older)
        list(publish(store, ("mon",), catalog, "nights"))
    assert "judged_run_id" not in catalog.load_table("nights.ledger").schema().column_names
    list(publish(store, ("tue",), catalog, "nights"))
    found = {
        (row["run_id"], row["judged_run_id"])
        for row in catalog.load_table("nights.ledger").scan().to_arrow().to_pylist()
    }
    assert found == {("mon", None), ("tue", "mon"), ("tue", None)}


def test_a_file_that_is_not_what_its_record_says_is_not_published(store, catalog):
    (path,) = (key for key in store.sizes("ledger") if "mon" in key)
    store.write(path, b"edited")
    with pytest.raises(RunError, match=r"ledger/.* is not what its run record says"):
        list(publish(store, ("mon",), catalog, "nights"))
    assert snapshots(catalog, "ledger") == []


def test_the_command_line(store, catalog, tmp_path, monkeypatch):
    publishing = ["--output", store.name, "--catalog", "local", "--namespace", "nights"]
    done = run_here(job, *publishing)
    assert "run mon: 2 of ledger, 2 of flagged, 0 of errors, 0 of audit published" in done.stdout
    assert "run tue: was published" in run_here(job, *publishing, "--run-id", "tue").stdout
    expect(run_here(job, *publishing, "--run-id", "wed"), 2, "there is no complete run 'wed'")
    monkeypatch.setenv("HOME", str(tmp_path))
    expect(
        run_here(job, "--output", store.name, "--catalog", "none", "--namespace", "n"),
        2,
        "catalog 'none'",
        ".pyiceberg.yaml",
    )
    monkeypatch.setitem(sys.modules, "pyiceberg.catalog", None)
    monkeypatch.delitem(sys.modules, "pipeline.tables.iceberg")
    expect(run_here(job, *publishing), 2, "pip install 'dorfman[iceberg]'")
