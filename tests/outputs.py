"""Outputs of scans, written by hand: rows as the schema has them and the records that name their files."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import run_job
from pipeline import schema
from pipeline.flow import Destination
from pipeline.listing.source import image_id
from pipeline.output import commit
from pipeline.output.sink import Sink, table_bytes
from pipeline.plan import Plan
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.store import Store, digest
from pipeline.window import OUTCOMES, GroupTest, Image, Window, Work

FIRST_NIGHT = date(2026, 1, 1)
VERSION_1 = {
    "ledger": ["sha256", "judged_run_id", "judged_outcome", "match_ignored"],
    "flagged": ["judged_run_id", "match_bank", "match_distance", "match_quality", "match_entry"],
}
"""The columns that came with version 2."""


def blank(table: str, **values: Any) -> dict[str, Any]:
    """A row whose other columns are null."""
    return dict.fromkeys(schema.TABLES[table].names) | values


def judged(name: str, outcome: str, *categories: str, etag: str = "1", **values: Any) -> dict[str, Any]:
    """What a night says of object ``name``: a ledger row, and how it is to be flagged."""
    row = {"image_id": image_id(f"s3://b/{name}", etag), "source_uri": f"s3://b/{name}", "outcome": outcome}
    if categories:
        row |= {"score": 0.95, "category": categories[0]}
    return row | values | {"categories": categories}


def unchanged(name: str, judged_run_id: str, judged_outcome: str = "cleared", **values: Any) -> dict[str, Any]:
    taken_over = {"judged_run_id": judged_run_id, "judged_outcome": judged_outcome}
    return judged(name, "skipped", skip_reason="unchanged", **taken_over, **values)


def write_night(
    store: Store, run_id: str, night: int, rows: list[dict[str, Any]], *, version: int = 2, **record: Any
) -> dict[str, Any]:
    """A complete run of the night, with one shard; ``rows`` of ``judged``."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in schema.TABLES}
    moment = datetime(2026, 1, 1, 1, tzinfo=UTC) + timedelta(days=night)
    for ordinal, row in enumerate(rows):
        named = {"run_id": run_id, "image_id": row["image_id"], "source_uri": row["source_uri"]}
        values = {key: value for key, value in row.items() if key != "categories"}
        tables["ledger"].append(blank("ledger", **values, run_id=run_id, shard=0, ordinal=ordinal))
        for place, category in enumerate(row["categories"]):
            found = {
                "score": row["score"] - place / 10,
                "threshold": 0.5,
                "scanned_at": moment,
                "judged_run_id": row.get("judged_run_id"),
            }
            tables["flagged"].append(blank("flagged", **named, category=category, stages=[], **found))
        if row["outcome"] == "error":
            tables["errors"].append(blank("errors", **named, error_code=row["error_code"], shard=0, ordinal=ordinal))
    day = (FIRST_NIGHT + timedelta(days=night)).isoformat()
    files = []
    for name, content in tables.items():
        table = pa.Table.from_pylist(content, schema.TABLES[name])
        if version == 1:
            table = table.drop_columns(VERSION_1.get(name, []))
        body = table_bytes(table)
        path = f"{name}/scan_date={day}/{run_id}-shard-00000.parquet"
        store.write(path, body)
        files.append({"path": path, "rows": table.num_rows, "bytes": len(body), "sha256": digest(body)})
    outcomes = [row["outcome"] for row in rows]
    content = {
        "run_id": run_id, "parent_run_id": None, "source": "s3://b/", "scan_date": day, "plan_version": "p1",
        "started_at": moment.isoformat(), "updated_at": (moment + timedelta(hours=1)).isoformat(), "status": "complete",
        "plan": {"name": "plan", "categories": ["gore", "weapon"]}, "relative_cost": 0.2, "seconds": 3600.0,
        "counts": {"listed": len(rows), **{kind: outcomes.count(kind) for kind in OUTCOMES}},
        "files": files, **({"schema_version": version} if version > 1 else {}), **record,
    }  # fmt: skip
    commit.write_json(store, commit.record_key(run_id), content)
    return content


def scan_by_hand(
    source: Path | str, output: str, plan: Path, run_id: str, decide: Callable[[str], str], **options: Any
) -> dict[str, Any]:
    """A whole ``run_scan`` of the files in a folder whose stream is neither nets nor Ray.

    ``decide`` says of each name what it is: cleared, flagged, or an error's code.
    """

    def stream(plan: Plan, refs: pa.Table, destination: Destination) -> Iterator[dict[str, Any]]:
        last = plan.stages[-1]
        named = (run_id, plan, destination.models.versions, destination.salt, destination.policy)
        sink = Sink(destination.store, destination.attempts, *named)
        for ref in refs.to_pylist():
            rows = pq.read_table(pa.BufferReader(destination.store.read(ref["key"])))
            rows = rows.slice(ref["first_row"], ref["rows"]).to_pylist()
            images = [_decided(row, decide(row["uri"].rsplit("/", 1)[1]), plan) for row in rows]
            work = [
                Work(operator=last.name, round=len(last.rounds) - 1, images_in=len(images), tests=len(images), gmac=1.0)
            ]
            window = Window(
                shard=ref["shard"], window=ref["window"], first_ordinal=rows[0]["ordinal"], images=images, work=work
            )
            yield from sink([window])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.run.driver.stream", stream)
        for name in ("pipeline.run.driver.ray_session", "pipeline.run.scan.starting_ray"):
            patch.setattr(name, lambda *_: nullcontext())
        config = ScanConfig(source=str(source), output=output, plan=str(plan), run_id=run_id, salt="s", **options)
        return run_scan(config)


def _decided(row: dict[str, Any], verdict: str, plan: Plan) -> Image:
    known = {name: row[name] for name in ("image_id", "uri", "size_bytes", "etag", "modified_at")}
    image = Image(**known)
    if verdict not in ("cleared", "flagged"):
        image.fail(verdict, "as the test wants it")
        return image
    last = plan.stages[-1]
    scores = [last.thresholds[category][-1] if verdict == "flagged" else 0.0 for category in plan.categories]
    test = GroupTest(stage=last.name, round=len(last.rounds) - 1, group_id=row["image_id"], group_size=1, scores=scores)
    image.tests.append(test)
    image.decide(verdict)
    return image


def run_here(job: ModuleType, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """A job's command line in this process: a new interpreter takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [job.__name__, *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            run_job(job.__name__, job.JobConfig, job.run)
    return subprocess.CompletedProcess(arguments, end.value.code, out.getvalue(), err.getvalue())
