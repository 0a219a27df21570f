"""The report of a run: one HTML page that needs nothing but itself.

Whoever can upload chooses file names, so the page treats every value as hostile: each one is escaped,
no script is on the page, and a Content-Security-Policy forbids any request and any script.
Tables are read back one file at a time; what is kept of them is histograms and the top of the list.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from obstore.exceptions import BaseError
from PIL import Image as PillowImage

from pipeline import schema
from pipeline.codes import CODES
from pipeline.output import commit
from pipeline.output.tally import spent_by
from pipeline.past.history import read_history
from pipeline.past.records import PastRuns
from pipeline.plan import Plan
from pipeline.reporting import prices, takeover, trends
from pipeline.reporting.histogram import PLOT_HEIGHT, PLOT_WIDTH, SCORE_TICKS, Scores, axis_position
from pipeline.reporting.thresholds import AUDITED, SCORES, OtherThresholds
from pipeline.reporting.visible import visible
from pipeline.steps.bank import OPERATOR as MATCH
from pipeline.steps.decode import Decoder
from pipeline.storage import parse_uri, read_object, reason
from pipeline.store import Store
from pipeline.window import KNOWN_CONTENT, Image, Window

TOP_FLAGGED = 100
TOP_COLUMNS = [
    "image_id", "source_uri", "size_bytes", "category", "score", "threshold", "decided_stage", "recommended_action"
]  # fmt: skip
TOP_ORDER = [("score", "descending"), ("image_id", "ascending"), ("category", "ascending")]
MISSED_SHOWN = 20
THUMBNAIL_SIDE = 128

# Bars whose shortest would be under this share of the longest are drawn on a log scale.
LINEAR_SHARE = 0.02


def write_report(
    store: Store,
    record: dict[str, Any],
    plan: Plan,
    endpoint_url: str | None,
    *,
    thumbnails: bool,
    labels: pa.Table | None = None,
    past: PastRuns | None = None,
) -> str:
    """Writes ``runs/<run_id>/report.html`` from a complete run's record and tables; returns its uri.

    ``thumbnails`` fetches the flagged pictures it shows once more; what cannot be shown says why. ``labels``: what the
    run's images are, to say what other thresholds would have done. ``past``: where its runs have been read before.
    """
    scores, best = Scores(plan.stages), schema.FLAGGED.empty_table().select(TOP_COLUMNS)
    thresholds, actions = OtherThresholds(plan, labels), Counter[tuple[str, str]]()
    for file in _files(record, "flagged"):
        table = _read(store, file, schema.FLAGGED, [*TOP_COLUMNS, "stages", "judged_run_id"])
        # Scores of another run are in that run's report.
        mine = table.filter(pc.is_null(table["judged_run_id"]))
        tests = pa.Table.from_struct_array(pc.list_flatten(mine["stages"]))
        scores.add("flagged", tests.select(["stage", "round", "score"]))
        thresholds.add_flagged(mine)
        actions.update(zip(table["category"].to_pylist(), table["recommended_action"].to_pylist(), strict=True))
        best = pa.concat_tables([best, table.select(TOP_COLUMNS)])
        best = best.take(pc.select_k_unstable(best, TOP_FLAGGED, TOP_ORDER))
    for file in _files(record, "ledger"):
        cleared = pc.field("outcome") == "cleared"
        rows = _read(store, file, schema.LEDGER, thresholds.columns, None if labels is not None else cleared)
        thresholds.add_ledger(rows)
        scores.add("cleared", (rows if labels is None else rows.filter(cleared)).select(SCORES))
    for file in _files(record, "audit"):
        thresholds.add_audit(_read(store, file, schema.AUDIT, AUDITED))
    top = best.to_pylist()
    history = read_history(past or PastRuns(store), record)
    funnel, funnel_scale = _bars(list(_funnel(record)), ("images_in", "images_out"))
    page = _environment().get_template("report.html.j2").render(
        record=record,
        plan=plan,
        counts=record["counts"],
        individual_gmac_total=record["stages"][0]["images_in"] * record["individual_gmac"],
        funnel=funnel,
        funnel_scale=funnel_scale,
        charts=list(scores.charts()),
        score_ticks=[(f"{score:g}", float(axis_position(score))) for score in SCORE_TICKS],
        plot=(PLOT_WIDTH, PLOT_HEIGHT),
        errors=sorted(record["errors"].items(), key=lambda item: (-item[1], item[0])),
        error_codes={name: code.meaning for name, code in CODES.items()},
        # Older records have none of these.
        canaries=record.get("canaries", {}),
        suspect=record.get("suspect", []),
        gates=record.get("gates"),
        increment=record.get("increment"),
        flagged_before=takeover.flagged_before(record),
        standing=takeover.standing(record),
        taken_over=takeover.taken_over(record),
        known=record.get("skips", {}).get(KNOWN_CONTENT, 0),
        taken=record.get("taken", {}),
        ignored=record.get("ignored_entries", {}),
        audited=sum(file["rows"] for file in _files(record, "audit")),
        times=list(_times(record)),
        tables=list(schema.TABLES),
        missed_shown=MISSED_SHOWN,
        policy=record.get("policy"),
        actions=sorted(actions.items()),
        cost=record.get("cost"),
        there=record.get("resources"),
        cost_parts=prices.PARTS,
        thresholds=thresholds.of_categories(),
        history=history,
        trends=trends.charts(history),
        trend_plot=(trends.WIDTH, trends.HEIGHT),
        top=top,
        thumbnails=_thumbnails(top, plan, endpoint_url) if thumbnails else None,
    )  # fmt: skip
    return store.write(commit.report_key(record["run_id"]), page.encode())


def _files(record: dict[str, Any], table: str) -> list[dict[str, Any]]:
    return [file for file in commit.files_of(table, record["files"]) if file["rows"]]


def _read(
    store: Store, file: dict[str, Any], table: pa.Schema, columns: list[str], rows: pc.Expression | None = None
) -> pa.Table:
    """Columns that an older file lacks are null."""
    body = io.BytesIO(store.read(file["path"], file["sha256"]))
    return pq.read_table(body, columns=columns, filters=rows, schema=table)


def _funnel(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every step that can decide an image, in the order of the pipeline."""
    operators = {row["operator"]: row for row in record["operators"]}
    if "fetch" in operators:
        yield {"name": "fetch"} | operators["fetch"]
    for number, stage in enumerate(record["stages"]):
        decode = f"decode:{stage['name']}"
        if decode in operators:
            yield {"name": f"decode for {stage['name']}"} | operators[decode]
        if number == 0 and MATCH in operators:
            yield {"name": "hash match"} | operators[MATCH]
        for round_number, work in enumerate(stage["rounds"]):
            yield {"name": f"{stage['name']}, round {round_number + 1}"} | work


def _times(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row an operator, a stage's rounds together."""
    rows = spent_by(record["operators"])
    whole = sum(row.seconds for row in rows)
    for row in rows:
        yield asdict(row) | {"share": row.seconds / whole, "busy": row.busy}


def _bars(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], str]:
    """The rows with ``<key>_bar``, a length in percent, and the scale: linear where its bars can be read."""
    values = [row[key] for row in rows for key in keys if row[key]]
    most = max(values, default=1)
    linear = min(values, default=1) / most >= LINEAR_SHARE
    for row in rows:
        for key in keys:
            share = row[key] / most if linear else math.log1p(row[key]) / math.log1p(most)
            row[f"{key}_bar"] = round(100 * share, 2)
    return rows, "linear" if linear else "log"


def _thumbnails(top: list[dict[str, Any]], plan: Plan, endpoint_url: str | None) -> list[dict[str, str | None]]:
    """For each row a data URI, or the reason why there is none."""
    # The file may be another one by now, so it is decoded where it can do no harm: not in this process.
    decoder = Decoder("report", THUMBNAIL_SIDE, plan.preparation)
    return [_thumbnail(row, decoder, endpoint_url) for row in top]


def _thumbnail(row: dict[str, Any], decoder: Decoder, endpoint_url: str | None) -> dict[str, str | None]:
    try:
        payload = read_object(parse_uri(row["source_uri"]), endpoint_url)
    except FileNotFoundError:
        return {"data": None, "problem": "gone since the scan"}
    except (BaseError, BotoCoreError, ClientError, OSError, ValueError) as error:
        # The scan is done and stands: no picture is worth losing its report.
        return {"data": None, "problem": f"not fetched: {reason(error)}"}
    if row["size_bytes"] not in (None, len(payload)):
        return {"data": None, "problem": "changed since the scan"}
    image = Image(image_id=row["image_id"], uri=row["source_uri"], payload=payload)
    (window,) = decoder([Window(shard=0, window=0, first_ordinal=0, images=[image])])
    if window.pixels is None:
        return {"data": None, "problem": f"not decoded: {image.error_code}"}
    buffer = io.BytesIO()
    PillowImage.fromarray(window.pixels[0]).save(buffer, "JPEG", quality=85)
    return {"data": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), "problem": None}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "duration": _duration,
        "when": _when,
        "score": _score,
        "money": prices.money,
        "span": _span,
    }
    return environment


def _visible(value: Any) -> Any:
    """A name must not look like another."""
    return visible(value) if type(value) is str else value


def _number(value: float) -> str:
    """Whole numbers and thousands in full, else three digits."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def _score(value: float | None) -> str:
    """Of a hash match there is none."""
    return "–" if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %" if 0 < share < 0.001 else f"{100 * share:.2f} %"


def _span(shares: tuple[float, float]) -> str:
    """Three digits of each, or of the one that both are."""
    low, high = (f"{100 * share:.3g}" for share in shares)
    return f"{low} %" if low == high else f"{low} to {high} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _when(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M:%S} UTC"
