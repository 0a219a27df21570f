"""SQL over the tables of complete runs: ``python -m jobs.query "SELECT ..." --output OUT``, or statements on stdin."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.output.opening import open_output
from pipeline.storage import check_endpoint, parse_uri, storage_errors_as_usage
from pipeline.tables.sql import explained, open_tables, sql_session

ROWS_SHOWN = 1000
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class JobConfig:
    """Asks the tables of complete runs something, in DuckDB's SQL.

    Views: runs, ledger, flagged, errors, audit, newest_ledger, per_image, flagged_latest, reviews, decisions and
    disputed; docs/tables.md defines them. A query reads the output and never writes to it. Exit codes: 0 answered,
    2 wrong SQL, usage or output.
    """

    sql: str = ""
    """The statement. Without one, statements are read from standard input, each ended by a semicolon."""
    _: KW_ONLY
    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    format: Literal["table", "csv", "json"] = "table"
    """table: for people, a thousand rows at most; csv: safe for spreadsheets; json: an object a line, as it is."""
    files: tuple[str, ...] = ()
    """Local folders in which the statements may read files, and write them with COPY. Default: none."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        output = parse_uri(self.output)
        for folder in (Path(name).resolve() for name in self.files):
            if not folder.is_dir():
                raise UsageError(f"--files {folder}: no such folder")
            kept = Path(output.key).resolve()
            if output.bucket is None and (folder.is_relative_to(kept) or kept.is_relative_to(folder)):
                raise UsageError(f"--files {folder} and the output {kept} share files, and no query writes there")


def run(config: JobConfig) -> None:
    sql = config.sql or sys.stdin.read()
    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url)
        tables = open_tables(store)
    if tables.gone:
        gone = f"{len(tables.gone)} files of complete runs are gone, {tables.gone[0]} first: their rows are missing"
        Console(stderr=True, soft_wrap=True, highlight=False).print(gone)
    try:
        with sql_session(tables, config.files) as session:
            for statement in session.extract_statements(sql):
                answer = session.sql(statement)
                if answer is not None and answer.columns:
                    _show(answer, config.format)
    except duckdb.Error as error:
        raise UsageError(explained(error, tables)) from error


def _show(answer: duckdb.DuckDBPyRelation, format: str) -> None:
    if format == "table":
        answer.show(max_width=shutil.get_terminal_size((200, 0)).columns, max_rows=ROWS_SHOWN)
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if format == "csv":
        writer.writerow(answer.columns)
    for batch in answer.to_arrow_reader():
        for row in batch.to_pylist():
            if format == "json":
                print(json.dumps(row, default=str))
            else:
                writer.writerow(map(_cell, row.values()))


def _cell(value: Any) -> Any:
    """Of CSV: text that a spreadsheet would run begins with an apostrophe, for strangers name objects."""
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


if __name__ == "__main__":
    run_job("jobs.query", JobConfig, run)
