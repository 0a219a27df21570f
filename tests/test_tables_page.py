"""docs/tables.md: its columns are the schema's, and every query on it runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from uuid import uuid4

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sqlglot
from sqlglot import exp

from jobs import query
from pipeline import schema
from pipeline.review.decisions import write_decision
from pipeline.review.log import rows_of
from pipeline.review.queue import read_queue
from pipeline.store import Store
from pipeline.tables.run_rows import RUNS
from pipeline.tables.sql import open_tables, sql_session, with_scan_date
from tests.conftest import QUICK, small_plan
from tests.outputs import VERSION_1, judged, run_here, scan_by_hand, unchanged, write_night

PAGE = (Path(__file__).parents[1] / "docs/tables.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
WORDS = {"float": "float32", "double": "float64", "timestamp[us, tz=UTC]": "timestamp", "date32[day]": "date"}


VIEWS = ("per_image", "reviews", "decisions", "disputed")
"""Those with columns of their own."""


def blocks(language: str, dialect: str) -> list[str]:
    found = [text for what, where, text in BLOCKS if (what, where) == (language, dialect)]
    assert found, f"docs/tables.md shows no {language} for {dialect}"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with ``out``: nights as scans leave them, one of version 1, and one that took verdicts over."""
    folder = tmp_path_factory.mktemp("tables-page")
    source = folder / "source"
    source.mkdir()
    (folder / "exports").mkdir()
    for number in range(40):
        (source / f"{number}.jpg").write_bytes(b"a picture" * number)
    store = Store(str(folder / "out"))
    write_night(store, "old", 0, [judged("a", "flagged", "gore"), judged("b", "cleared")], version=1)
    write_night(store, "next", 1, [unchanged("a", "old", "flagged")])
    plan = small_plan(folder, QUICK, audit={"rate": 0.5, "near_rate": 0.5})
    special = {"3.jpg": "flagged", "4.jpg": "truncated", "5.jpg": "flagged"}
    scan_by_hand(source, store.name, plan, "mon", lambda name: special.get(name, "cleared"), shard_size=16)
    (source / "5.jpg").unlink()
    scan_by_hand(source, store.name, plan, "tue", lambda name: special.get(name, "cleared"), shard_size=16)
    for kind, reviewer, answer in (("first", "ann", "violating"), ("second", "bob", "not violating")):
        write_decision(store, decision_on(store, "3.jpg", kind, reviewer, answer))
    return folder


def decision_on(store: Store, name: str, kind: str, reviewer: str, answer: str) -> list[dict]:
    """Rows of a decision on an image of the run on Monday."""
    (item,) = [item for item in read_queue(store, ("mon",)).items if item.uri.endswith(f"/{name}")]
    about = {"run_id": item.run_id, "image_id": item.image_id, "source_uri": item.uri}
    violating = item.categories if answer == "violating" else ()
    return rows_of(
        decision_id=uuid4().hex, kind=kind, reviewer=reviewer, item_rows=about, categories=item.categories,
        answer=answer, violating=violating, revealed=True, sha256="0" * 64,
    )  # fmt: skip


def documented(name: str) -> list[list[str]]:
    """Rows of the table of columns of one section."""
    section = re.search(rf"^### {name}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, name
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \| (.+) \| (.+) \|$", section.group(1), re.MULTILINE)
    return [list(row) for row in rows]


def in_words(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {in_words(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else WORDS.get(str(kind), str(kind))


def columns(fields: pa.Schema | pa.StructType, prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for field in fields:
        found.append((prefix + field.name, in_words(field.type)))
        if pa.types.is_list(field.type) and pa.types.is_struct(field.type.value_type):
            found += columns(field.type.value_type, f"{field.name}.")
    return found


def of_view(folder: Path, name: str) -> pa.Schema:
    with sql_session(open_tables(Store(str(folder / "out")))) as session:
        return session.sql(f"FROM {name}").to_arrow_table().schema


@pytest.mark.parametrize("name", [*schema.TABLES, "runs", *VIEWS])
def test_columns_and_types_on_the_page_are_those_of_the_schema(folder, name):
    if name in VIEWS:
        expected = columns(of_view(folder, name))
    else:
        expected = columns(RUNS if name == "runs" else with_scan_date(name))
    assert [tuple(row[:2]) for row in documented(name)] == expected
    assert all(len(row[2]) > 3 for row in documented(name))


def test_what_the_page_says_is_never_null_is_never_null(folder):
    with sql_session(open_tables(Store(str(folder / "out")))) as session:
        for name in (*schema.TABLES, "runs", *VIEWS):
            # Hand-made rows leave out what views do not ask for.
            rows = session.sql(
                f"FROM {name}" + ("" if name in ("per_image", "disputed") else " WHERE run_id IN ('mon', 'tue')")
            )
            table = rows.to_arrow_table()
            assert table.num_rows
            for column, _, _, null in documented(name):
                if null.startswith("never") and "." not in column:
                    assert table[column].null_count == 0, (name, column)


def test_the_columns_of_each_version_are_on_the_page():
    added = re.search(r"^\| 2 \| (.*) \|$", PAGE, re.MULTILINE)
    assert added
    expected = "; ".join(f"{table}: {', '.join(f'`{name}`' for name in names)}" for table, names in VERSION_1.items())
    assert added.group(1) == expected and schema.VERSION == 2


def test_views_of_findings_and_of_the_newest_nights_have_the_columns_of_their_tables(folder):
    assert of_view(folder, "flagged_latest").names == with_scan_date("flagged").names
    assert of_view(folder, "newest_ledger").names == with_scan_date("ledger").names


def test_queries_of_the_views_run(folder):
    with sql_session(open_tables(Store(str(folder / "out")))) as session:
        answers = [session.execute(sql).fetchall() for sql in blocks("sql", "views")]
    joined, disputed, gone, tests, nights = answers
    decided = [(row[0].rsplit("/", 1)[1], *row[3:]) for row in joined if row[3]]
    assert decided == [("3.jpg", "not violating", "second", "bob")] * 2 and len(joined) == 4
    assert [(row[0].rsplit("/", 1)[1], *row[1:]) for row in disputed] == [
        ("3.jpg", "automobile", "not violating", ["ann"], ["bob"])
    ]
    assert [(row[0].rsplit("/", 1)[1], row[1], row[2]) for row in gone] == [("5.jpg", ["automobile"], "mon")]
    assert [(row[0].rsplit("/", 1)[1], row[2], row[4]) for row in tests] == [("3.jpg", "tree", 1)]
    assert sum(row[2] for row in nights) == 2 + 1 + 40 + 39


def test_command_lines_of_the_page_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (shell,) = blocks("sh", "")
    said = [command_line(line) for line in shell.splitlines()]
    runs, findings, counts, _ = said
    assert all(word in runs for word in ("old", "next", "mon", "tue", "relative_cost"))
    assert findings.splitlines()[0] == "source_uri,category,score" and len(findings.splitlines()) == 3
    assert '{"outcome": "flagged", "images": 2}' in counts and '{"error_code": "truncated", "images": 1}' in counts
    assert pl.read_parquet("exports/findings.parquet")["category"].sort().to_list() == ["automobile", "gore"]


def command_line(line: str) -> str:
    before, _, command = line.rpartition(" | ")
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "jobs.query"]
    result = run_here(query, *words[3:], stdin=shlex.split(before)[1] if before else "")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_queries_over_the_files_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with duckdb.connect() as session:
        found, outcomes = (session.execute(sql).fetchall() for sql in blocks("sql", "duckdb"))
    assert sorted(row[:2] for row in found) == [("automobile", 3), ("gore", 1)]
    assert ("mon", "flagged", 2) in outcomes and ("next", "skipped", 1) in outcomes


def test_pandas_and_polars_read_the_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    for code in blocks("python", "pandas"):
        exec(code, names)
    assert isinstance(names["worst"], pd.DataFrame) and list(names["worst"]["category"]) == ["gore"]
    assert names["nights"].loc["tue"].to_dict() == {"cleared": 37, "error": 1, "flagged": 1, "skipped": 0}
    assert list(names["taken_over"]["judged_run_id"]) == ["old"]
    for code in blocks("python", "polars"):
        exec(code, names)
    assert dict(names["worst"].select("category", "findings").iter_rows()) == {"automobile": 3, "gore": 1}


DIALECTS = {
    "athena": {"int32": "int", "int64": "bigint", "float": "float", "bool": "boolean"},
    "trino": {"string": "varchar", "int32": "integer", "int64": "bigint", "float": "real", "bool": "boolean"},
}


def typed(kind: pa.DataType, dialect: str) -> str:
    if pa.types.is_list(kind):
        inner = typed(kind.value_type, dialect)
        return f"array<{inner}>" if dialect == "athena" else f"array({inner})"
    if pa.types.is_struct(kind):
        colon, ends = (": ", "<>") if dialect == "athena" else (" ", "()")
        fields = ", ".join(f"{field.name}{colon}{typed(field.type, dialect)}" for field in kind)
        return f"{'struct' if dialect == 'athena' else 'row'}{ends[0]}{fields}{ends[1]}"
    return DIALECTS[dialect].get(str(kind), str(kind).removesuffix("[us, tz=UTC]"))


def parse(sql: str, dialect: str) -> exp.Expression:
    """What sqlglot does not know it keeps as a command, unread: that is no parse."""
    statement = sqlglot.parse_one(sql, dialect=dialect, error_level=sqlglot.ErrorLevel.RAISE)
    assert not statement.find(exp.Command), sql
    return statement


@pytest.mark.parametrize("dialect", ["athena", "trino"])
def test_declarations_for_engines_have_the_columns_of_the_schema(dialect):
    declared = {}
    for sql in blocks("sql", dialect):
        statement = parse(sql, dialect)
        if isinstance(statement, exp.Create):
            table = statement.this.this.name
            definitions = [column for column in statement.this.expressions if isinstance(column, exp.ColumnDef)]
            declared[table] = {column.name: column.args["kind"] for column in definitions}
            assert f"s3://my-results/dorfman/{table}/" in sql and "yyyy-MM-dd" in sql
    assert list(declared) == list(schema.TABLES)
    for table, found in declared.items():
        found.pop("scan_date", None)  # Athena declares it among the partitions
        expected = {
            field.name: exp.DataType.build(typed(field.type, dialect), dialect=dialect)
            for field in schema.TABLES[table]
        }
        assert list(found) == list(expected)
        for name, kind in found.items():
            assert kind.sql(dialect) == expected[name].sql(dialect), (table, name)


@pytest.mark.parametrize("dialect", ["athena", "trino", "spark"])
def test_queries_for_engines_run_in_translation(folder, dialect):
    queries = [sql for sql in blocks("sql", dialect) if isinstance(parse(sql, dialect), exp.Select)]
    assert len(queries) == 2
    with sql_session(open_tables(Store(str(folder / "out")))) as session:
        for sql in queries:
            translated = parse(sql, dialect).sql("duckdb", unsupported_level=sqlglot.ErrorLevel.RAISE)
            assert session.execute(translated).fetchall(), sql


def test_lines_for_spark_are_python():
    for code in blocks("python", "spark"):
        compile(code, "docs/tables.md", "exec")
