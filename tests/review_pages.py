"""Outputs to review, written by hand over real pictures, and the page served from here."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import schema
from pipeline.listing.source import file_etag, image_id
from pipeline.output import commit
from pipeline.output.sink import table_bytes
from pipeline.plan import Preparation
from pipeline.review.desk import Desk
from pipeline.review.picture import Pictures
from pipeline.review.queue import read_queue
from pipeline.review.server import ReviewServer
from pipeline.storage import parse_uri
from pipeline.store import Store, digest
from pipeline.window import OUTCOMES
from tests.outputs import blank

DAY = "2026-01-02"
PICTURES = Pictures(Preparation(), None)
"""For all desks: each would start a decoder of its own."""
MOMENT = datetime(2026, 1, 2, 3, tzinfo=UTC)


def draw(path: Path, number: int = 0, size: tuple[int, int] = (160, 120)) -> Path:
    """A small JPEG that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 255, (3, 4, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=80)
    return path


def of_file(path: Path) -> dict[str, Any]:
    """What a listing says of a picture in a folder."""
    uri = parse_uri(str(path)).uri
    about = os.stat(path)
    etag = file_etag(about)
    return {"image_id": image_id(uri, etag), "source_uri": uri, "etag": etag, "size_bytes": about.st_size}


def flagged_row(
    about: dict[str, Any], run_id: str, category: str, score: float | None, **values: Any
) -> dict[str, Any]:
    test = {"stage": "single", "round": 0, "group_id": "0", "group_size": 1, "score": score, "threshold": 0.5}
    found = {"score": score, "threshold": 0.5, "decided_stage": "single", "stages": [test | {"model_version": "m@1"}]}
    if score is None:
        found = {"stages": [], "decided_stage": "match", "match_bank": "known", "match_distance": 3}
    named = {"run_id": run_id, "category": category, "scanned_at": MOMENT, "recommended_action": "review"}
    return blank("flagged", **(about | named | found | values))


def drawn_row(about: dict[str, Any], run_id: str, scores: list[float], **values: Any) -> dict[str, Any]:
    named = {name: about[name] for name in ("image_id", "source_uri", "etag")}
    test = {"decided_stage": "single", "decided_round": 0, "group_id": "0", "group_size": 1, "scores": scores}
    return blank("audit", run_id=run_id, probability=0.5, scanned_at=MOMENT, **named, **(test | values))


def write_run(
    store: Store,
    run_id: str,
    flagged: list[dict[str, Any]],
    drawn: list[dict[str, Any]] = (),  # type: ignore[assignment]
    categories: tuple[str, ...] = ("gore",),
    started_at: datetime = MOMENT,
    cleared: int | None = None,
) -> dict[str, Any]:
    """A complete run of these rows, as the tables and the record have them."""
    ids = dict.fromkeys(row["image_id"] for row in flagged)
    rows = {"ledger": [], "flagged": flagged, "errors": [], "audit": list(drawn)}
    for ordinal, row in enumerate([*flagged, *drawn]):
        outcome = "flagged" if row["image_id"] in ids else "cleared"
        named = {name: row[name] for name in ("run_id", "image_id", "source_uri")}
        if not any(row["image_id"] == other["image_id"] for other in rows["ledger"][-len(categories) :]):
            rows["ledger"].append(blank("ledger", **named, outcome=outcome, shard=0, ordinal=ordinal))
    files = []
    for name, content in rows.items():
        body = table_bytes(pa.Table.from_pylist(content, schema.TABLES[name]))
        path = f"{name}/scan_date={DAY}/{run_id}-shard-00000.parquet"
        store.write(path, body)
        files.append({"path": path, "rows": len(content), "bytes": len(body), "sha256": digest(body)})
    counts = dict.fromkeys(OUTCOMES, 0) | {"flagged": len(ids), "cleared": cleared or len(drawn)}
    stage = {
        "name": "single", "model": "m", "rounds": [1], "input_size": 32,
        "thresholds": {name: [0.5] for name in categories},
    }  # fmt: skip
    record = {
        "run_id": run_id, "parent_run_id": None, "source": "s3://b/", "scan_date": DAY, "plan_version": "p1",
        "started_at": started_at.isoformat(), "updated_at": started_at.isoformat(), "status": "complete",
        "plan": {
            "name": "plan", "categories": list(categories), "stages": [stage], "audit": {"rate": 0.5, "near_rate": 0.5},
        },
        "relative_cost": 0.2, "seconds": 60.0, "counts": {"listed": sum(counts.values()), **counts},
        "files": files, "schema_version": 2, "quality": None,
    }  # fmt: skip
    commit.write_json(store, commit.record_key(run_id), record)
    return record


def night(
    folder: Path, flagged: int = 3, drawn: int = 2, categories: tuple[str, ...] = ("gore",), run_id: str = "mon"
) -> Store:
    """An output with a run over small pictures: scores fall from 0.9, drawn ones lie under the threshold."""
    source = folder / "source"
    source.mkdir(exist_ok=True)
    about = [of_file(draw(source / f"{run_id}-{number}.jpg", number)) for number in range(flagged + drawn)]
    found = [
        flagged_row(row, run_id, categories[place % len(categories)], 0.9 - 0.3 * place / max(1, flagged))
        for place, row in enumerate(about[:flagged])
    ]
    cleared = [
        drawn_row(row, run_id, [0.1 + 0.01 * place for place in range(len(categories))]) for row in about[flagged:]
    ]
    store = Store(str(folder / "out"))
    write_run(store, run_id, found, cleared, categories)
    return store


def desk_of(store: Store, *run_ids: str, reviewer: str = "ann", kind: str = "first", **options: Any) -> Desk:
    return Desk(store, read_queue(store, run_ids or ("mon",)), PICTURES, kind=kind, reviewer=reviewer, **options)


def appeal_by(store: Store, reviewer: str, *names: str) -> Desk:
    """A session about images by the names of their files; without names about what appeals left unsure."""
    queue = read_queue(store, ("mon",))
    items = [item for name in names for item in queue.items if item.uri.endswith(f"/{name}")]
    return Desk(store, queue, PICTURES, kind="appeal", reviewer=reviewer, appealed=items or None)


@contextmanager
def served(desk: Desk) -> Iterator[ReviewServer]:
    """The page on a free port, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = ReviewServer(desk)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
