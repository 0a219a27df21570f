"""The runs of an output as a person asks for them: how each stands, how far it is, and whether its driver is alive."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from rich.table import Table

from pipeline.errors import RunError, RunStopped, RunSuspect, UsageError
from pipeline.output import commit
from pipeline.past.baseline import describe, stands_suspect
from pipeline.past.records import BROKEN, READERS, Content, last_started
from pipeline.reporting.heartbeat import BEAT_SECONDS, STALE_SECONDS, newest_heartbeat, newest_listing
from pipeline.reporting.metrics import Sample, of_heartbeat, of_listing, of_run
from pipeline.reporting.takeover import standing
from pipeline.storage import STORAGE_ERRORS, reason
from pipeline.store import Store

T = TypeVar("T")

POLL_SECONDS = 5.0
FOLLOW_PATIENCE = 300.0
"""How long an output may not answer while a run is followed: as long as a scan waits for it."""
ALIVE = ("listing", "running")
GOING = (*ALIVE, "stale")
STATES = (*GOING, "complete", "suspect", "failed", "stopped")
"""stale: its driver has given no sign of life for minutes, while it listed or judged."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run stands at the moment it was asked for."""

    run_id: str
    state: str
    """One of STATES."""
    started_at: str
    listed: int
    decided: int
    """Images; of a run that goes on, committed or not."""
    flagged: int
    standing: int | None
    """Flagged images of the source: with those that earlier runs flagged and that are unchanged. None where nobody has
    counted them."""
    errors: int
    relative_cost: float | None
    seconds: float
    silent_seconds: float | None
    """Since the last sign of life, of a run that goes on."""
    images_per_s: float
    ends_at: str | None
    """When a run that goes on ends, at the speed of its last minutes."""
    why: str | None
    """What ended it, or what the gates found."""


def list_runs(store: Store, limit: int) -> list[Run]:
    """The ``limit`` runs of an output that were started last, newest first, and those that go on, however old.

    A spoilt record is named in a warning and left out.
    """
    runs = [*_each(store, limit, partial(_view, store)), *map(_of_listing, _listings(store))]
    runs.sort(key=lambda run: run.started_at, reverse=True)
    return [run for place, run in enumerate(runs) if place < limit or run.state in GOING]


def _each(store: Store, limit: int, see: Callable[[Content, Content], T]) -> Iterator[T]:
    """What ``see`` makes of each one's record or status, and of its heartbeat; without those that are spoilt."""
    for run_id, content in _newest(store, limit):
        try:
            yield _seen(store, run_id, content, see)
        except UsageError as error:
            logging.getLogger("dorfman").warning("%s", error)


def _seen(store: Store, run_id: str, content: Content, see: Callable[[Content, Content], T]) -> T:
    """Raises UsageError for what is spoilt, and what reading it did."""
    if isinstance(content, Exception):
        raise content
    try:
        return see(content, newest_heartbeat(store, run_id) if content["status"] == "running" else None)
    except UsageError:
        raise
    except BROKEN as error:
        complete = content.get("status") == "complete"
        key = commit.record_key(run_id) if complete else commit.status_key(run_id)
        raise commit.spoilt(store, key, f"{type(error).__name__}: {error}") from error


def _newest(store: Store, limit: int) -> list[tuple[str, Content]]:
    """Record or status of the runs that were started last, and of all those that go on."""
    found = store.objects("runs")
    written: dict[str, datetime] = {}
    for key, (_, moment) in found.items():
        run_id = key.split("/")[1].removesuffix(".json") if key.count("/") == 1 else key.split("/")[1]
        written[run_id] = min(moment, written.get(run_id, moment))  # it was started before any of this
    newest = last_started(written, partial(_contents, store), limit)
    complete, listed = set(commit.recorded(found)), {run_id for run_id, _ in newest}
    others = _contents(store, (run_id for run_id in written if run_id not in complete | listed))
    going = [(run_id, said) for run_id, said in others if isinstance(said, dict) and said.get("status") == "running"]
    return newest + going


def _contents(store: Store, run_ids: Iterable[str]) -> list[tuple[str, Content]]:
    """Of each its record, or its status where it has none, or None, or what reading that raised."""
    run_ids = list(run_ids)
    with ThreadPoolExecutor(READERS) as readers:
        return list(zip(run_ids, readers.map(partial(_content, store), run_ids), strict=True))


def _content(store: Store, run_id: str) -> Content:
    try:
        return commit.read_record(store, run_id) or commit.read_status(store, run_id)
    except (UsageError, OSError) as error:
        return error


def _listings(store: Store) -> list[dict[str, Any]]:
    """Of runs that have left nothing below ``runs/`` yet, because somebody lists their source, or did."""
    begun = {key.split("/")[1].removesuffix(".json") for key in store.sizes("runs")}
    beats = [newest_listing(store, run_id) for run_id in store.folders("_state") if run_id not in begun]
    return [beat for beat in beats if beat is not None]


def read_run(store: Store, run_id: str) -> Run:
    """Raises UsageError when there is none."""
    content = _content(store, run_id)
    if content is not None:
        return _seen(store, run_id, content, partial(_view, store))
    beat = newest_listing(store, run_id)
    if beat is None:
        raise UsageError(f"there is no run {run_id!r} in {store.name}")
    return _of_listing(beat)


def _of_listing(beat: Mapping[str, Any]) -> Run:
    seconds = (datetime.fromisoformat(beat["updated_at"]) - datetime.fromisoformat(beat["started_at"])).total_seconds()
    silent = _age(beat["updated_at"])
    return Run(
        run_id=beat["run_id"],
        state="listing" if silent < STALE_SECONDS else "stale",
        started_at=beat["started_at"],
        listed=beat["listed"],
        decided=0,
        flagged=0,
        standing=None,
        errors=0,
        relative_cost=None,
        seconds=seconds,
        silent_seconds=silent,
        images_per_s=0.0,
        ends_at=None,
        why=None,
    )


def _view(store: Store, record: Mapping[str, Any], beat: Mapping[str, Any] | None) -> Run:
    state, silent = record["status"], None
    why = record.get("failure") or record.get("reason")
    if state == "running":
        silent = _age(max(record["updated_at"], beat["updated_at"] if beat else ""))
        state = "running" if silent < STALE_SECONDS else "stale"
    elif stands_suspect(store, record):
        state, why = "suspect", describe(record, store.name)
    counts, live = record["counts"], beat or {}
    return Run(
        run_id=record["run_id"],
        state=state,
        started_at=record["started_at"],
        listed=record["listed"],
        decided=max(counts["listed"], live.get("decided", 0)),
        flagged=counts["flagged"],
        standing=standing(record),
        errors=counts["error"],
        relative_cost=record["relative_cost"],
        seconds=record["seconds"],
        silent_seconds=silent,
        images_per_s=live.get("images_per_s", record["images_per_s"]),
        ends_at=live.get("ends_at"),
        why=why,
    )


def _age(moment: str) -> float:
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())


def follow(store: Store, run_id: str, say: Callable[[Run], None], pause: Callable[[float], None] = time.sleep) -> Run:
    """Looks until the run ends, and says how it stands whenever that has changed.

    An output that is away is waited for. Returns the run when it is complete; raises what a scan would, RunError,
    RunStopped, RunSuspect, and RunError when the output has been away for too long.
    """
    said, came_back = None, -math.inf
    while True:
        began = time.monotonic()
        run = _look(store, run_id)
        if time.monotonic() - began > BEAT_SECONDS:
            came_back = time.monotonic()
        seen = (run.state, run.listed, run.decided, run.flagged, run.errors)
        if seen != said:
            say(run)
            said = seen
        # While its output was away a driver could give no sign of life either.
        waited_for = run.state == "stale" and time.monotonic() - came_back < STALE_SECONDS
        if run.state not in ALIVE and not waited_for:
            return ended(run)
        pause(POLL_SECONDS)


def _look(store: Store, run_id: str) -> Run:
    try:
        return read_run(replace(store, patience=FOLLOW_PATIENCE), run_id)
    except UsageError:
        raise
    except STORAGE_ERRORS as error:
        raise RunError(
            f"storage: {reason(error)}; how run {run_id!r} stands cannot be seen from here: follow it again"
        ) from error


def ended(run: Run) -> Run:
    """The run if it is complete. Raises what the scan of any other ends with, and RunError for one without a driver."""
    if run.state == "stale":
        raise RunError(
            f"run {run.run_id!r} has given no sign of life for {run.silent_seconds:,.0f} s: its driver is gone or cut "
            f"off; start it again with --run-id {run.run_id}"
        )
    if run.state == "failed":
        raise RunError(f"run {run.run_id!r} failed: {run.why}")
    if run.state == "stopped":
        raise RunStopped(f"run {run.run_id!r} stopped: {run.why}")
    if run.state == "suspect":
        raise RunSuspect(run.why)
    return run


def samples(store: Store, limit: int) -> Iterator[Sample]:
    """Gauges of the runs that ``list_runs`` lists: what a Prometheus sees of them when their drivers are gone."""
    for gauges in _each(store, limit, partial(_gauges, store)):
        yield from gauges
    for listing in _listings(store):
        yield from of_listing(listing)


def _gauges(store: Store, record: Mapping[str, Any], beat: Mapping[str, Any] | None) -> list[Sample]:
    accepted = bool(record.get("suspect")) and not stands_suspect(store, record)
    return [*of_run(record, accepted=accepted), *(of_heartbeat(beat, record) if beat else ())]


def line(run: Run) -> str:
    """How a run stands, for people."""
    if run.state == "listing":
        ago = f"last sign of life {run.silent_seconds:,.0f} s ago"
        return f"run {run.run_id}: listing, {run.listed:,} images so far, {ago}"
    flagged = f"{run.flagged:,} flagged"
    if run.standing not in (None, run.flagged):
        flagged += f" ({run.standing:,} standing in the source)"
    parts = [f"{run.decided:,} of {run.listed:,} images", flagged, f"{run.errors:,} errors"]
    if run.state in GOING:
        parts += [f"{run.images_per_s:,.0f}/s", f"last sign of life {run.silent_seconds:,.0f} s ago"]
        parts += [f"until {run.ends_at[:16]} UTC"] if run.ends_at else []
    return f"run {run.run_id}: {run.state}, {', '.join(parts)}"


def table(runs: list[Run]) -> Table:
    shown = Table()
    names = "run", "state", "started", "listed", "decided", "flagged", "standing", "errors", "cost", "seconds", "silent"
    for name in names:
        shown.add_column(name, justify="left" if name in ("run", "state", "started") else "right")
    for run in runs:
        cost = "" if run.relative_cost is None else f"{run.relative_cost:.3f}"
        stand = "" if run.standing is None else f"{run.standing:,}"
        silent = "" if run.silent_seconds is None else f"{run.silent_seconds:,.0f} s"
        shown.add_row(
            run.run_id, run.state, run.started_at[:16], f"{run.listed:,}", f"{run.decided:,}", f"{run.flagged:,}",
            stand, f"{run.errors:,}", cost, f"{run.seconds:,.0f}", silent,
        )  # fmt: skip
    return shown


def details(run: Run) -> Iterator[str]:
    yield line(run)
    for name, value in asdict(run).items():
        if name not in ("run_id", "state") and value is not None:
            yield f"  {name}: {value}"
