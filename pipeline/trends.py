"""How runs over one source went, night after night: figures from their records and audits, as charts for the report.

Records lie in a bucket beside everything else, and older versions wrote them too. So each is read as if a stranger had
written it: what is not as it should be is left out by name, and never ends a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import commit
from pipeline.inventory import scope
from pipeline.schema import ALL
from pipeline.store import Store

RUNS = 30
READ_AT_MOST = 400
"""Records that are looked at, the last written first: an output may hold the nights of years, and of other sources."""
# The size of a chart's plot, in the units that the template draws in.
WIDTH, HEIGHT = 400.0, 90.0
LEAST_STEP = 16
"""Places between the ends of a chart: a few runs are not drawn as if they were a long time."""


class _Lenient(BaseModel):
    """What is not read may be anything; what is read is as it should be."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


Amount = Field(ge=0, le=1e15)
Share = Field(ge=0, le=1)


class _Counts(_Lenient):
    flagged: int = Amount
    cleared: int = Amount
    listed: int = Amount


class _Quality(_Lenient):
    recall: float | None = Share
    recall_interval: list[float] = Field(min_length=2, max_length=2)
    positives: int = Amount
    negatives: int = Amount


class _Certificate(_Lenient):
    recall: dict[str, float] = {}


class _Plan(_Lenient):
    certificate: _Certificate | None = None


class _Cost(_Lenient):
    currency: str = Field(pattern=r"^[A-Z]{3}$")
    total: float = Amount


class _Record(_Lenient):
    run_id: str
    parent_run_id: str | None = None
    source: str
    scan_date: str = Field(pattern=r"^\d{4}-\d\d-\d\d$")
    started_at: str
    plan_version: str = Field(max_length=100)
    counts: _Counts
    relative_cost: float | None = Amount
    images_per_s: float = Amount
    quality: _Quality | None = None
    plan: _Plan = _Plan()
    cost: _Cost | None = None


class _Figure(_Lenient):
    value: float | None = Amount
    interval: list[float] = Field(min_length=2, max_length=2)


class _Estimate(_Lenient):
    recall: _Figure
    prevalence: _Figure


class _Audit(_Lenient):
    estimates: dict[str, _Estimate]
    run_ids: list[str]
    confidence: float = Share


@dataclass(frozen=True, kw_only=True)
class Value:
    """``low`` and ``high``: its interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Night:
    """What one run says of itself; None where it says nothing."""

    run_id: str
    scan_date: str
    started_at: datetime
    plan_version: str
    flagged: Value | None
    prevalence: Value | None
    certified: Value | None
    audited: Value | None
    labelled: Value | None
    relative_cost: Value | None
    cost: Value | None
    currency: str | None
    images_per_s: Value | None
    audited_runs: int
    """That its audit took together; 0 without one."""


@dataclass(frozen=True, kw_only=True)
class History:
    """``nights``: by start, the run of the report last. ``skipped``: record or audit to why it was left out."""

    nights: list[Night]
    skipped: dict[str, str]


def read_history(store: Store, record: Mapping[str, Any]) -> History:
    """The last ``RUNS`` complete runs over the same source that were started no later than this one; none is a retry of
    another's errors."""
    wanted, until = scope(record["source"]), _moment(record["started_at"])
    nights: dict[str, Night] = {}
    skipped: dict[str, str] = {}
    newest = commit.newest_runs(store.objects("runs"))[:READ_AT_MOST]
    for run_id in dict.fromkeys([record["run_id"], *newest]):
        try:
            content = record if run_id == record["run_id"] else commit.read_json(store, commit.record_key(run_id))
            found = _Record.model_validate(_plain(content) if content is record else content)
            started = _moment(found.started_at)
            if found.run_id != run_id:
                raise ValueError("it names another run")
            if found.parent_run_id is None and scope(found.source) == wanted and started <= until:
                nights[run_id] = _night(found, started, _read_audit(store, run_id, skipped))
        except (ValueError, TypeError, RecursionError, OSError) as error:
            skipped[f"run {run_id}"] = _why(error)
    last = sorted(nights.values(), key=lambda night: (night.started_at, night.run_id))[-RUNS:]
    return History(nights=last, skipped=skipped)


def _read_audit(store: Store, run_id: str, skipped: dict[str, str]) -> _Audit | None:
    try:
        content = commit.read_json(store, commit.audit_key(run_id))
        return None if content is None else _Audit.model_validate(content)
    except (ValueError, TypeError, RecursionError, OSError) as error:
        skipped[f"audit of {run_id}"] = _why(error)
        return None


def _plain(content: Any) -> Any:
    """The record of this very run may not have been in a file yet: its tuples are lists to a strict model."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return [_plain(value) for value in content] if isinstance(content, (list, tuple)) else content


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _why(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'the record'}: {first['msg']}"[:200]
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _night(record: _Record, started: datetime, audit: _Audit | None) -> Night:
    date.fromisoformat(record.scan_date)
    judged = record.counts.flagged + record.counts.cleared
    quality, estimate = record.quality, _whole(audit)
    certified = record.plan.certificate.recall.values() if record.plan.certificate else ()
    labelled = quality.positives + quality.negatives if quality else 0
    prevalence = _of(estimate.prevalence) if estimate else None
    if prevalence is None and quality and labelled:
        prevalence = Value(value=quality.positives / labelled)
    return Night(
        run_id=record.run_id,
        scan_date=record.scan_date,
        started_at=started,
        plan_version=record.plan_version,
        flagged=Value(value=record.counts.flagged / judged) if judged else None,
        prevalence=prevalence,
        certified=Value(value=_share(min(certified))) if certified else None,
        audited=_of(estimate.recall) if estimate else None,
        labelled=_interval(quality.recall, quality.recall_interval) if quality and quality.recall is not None else None,
        relative_cost=None if record.relative_cost is None else Value(value=record.relative_cost),
        cost=Value(value=record.cost.total) if record.cost else None,
        currency=record.cost.currency if record.cost else None,
        images_per_s=Value(value=record.images_per_s),
        audited_runs=len(audit.run_ids) if audit and estimate else 0,
    )


def _whole(audit: _Audit | None) -> _Estimate | None:
    """Of all categories together; an audit of a single one has that of the category."""
    if audit is None:
        return None
    return audit.estimates.get(ALL) or next(iter(audit.estimates.values()), None)


def _of(figure: _Figure) -> Value | None:
    return None if figure.value is None else _interval(figure.value, figure.interval)


def _interval(value: float, interval: Sequence[float]) -> Value:
    return Value(value=_share(value), low=_share(interval[0]), high=_share(interval[1]))


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def charts(history: History) -> list[dict[str, Any]]:
    """What the template draws, a chart for each figure that at least one run has; none of a single run."""
    nights = history.nights
    if len(nights) < 2:
        return []
    currency = next((night.currency for night in reversed(nights) if night.currency), None)
    cost = [night.cost if night.currency == currency else None for night in nights]
    shown = [
        _chart("Flagged, of what was judged", "percent", {"flagged": [night.flagged for night in nights]}),
        _chart("Item prevalence, from labels or an audit", "percent", {"flagged": [n.prevalence for n in nights]}),
        _chart(
            "Recall",
            "percent",
            {
                "certified": [night.certified for night in nights],
                "audited": [night.audited for night in nights],
                "labelled": [night.labelled for night in nights],
            },
            legend={
                "certified": "the plan's certified bound",
                "audited": "audited",
                "labelled": "against labels",
            },
        ),
        _chart("Relative cost", "number", {"cleared": [night.relative_cost for night in nights]}),
        _chart(f"Cost in {currency}", "number", {"cleared": cost}),
        _chart("Images per second", "number", {"cleared": [night.images_per_s for night in nights]}),
    ]
    return [chart | {"changes": _changes(nights), "ends": _ends(nights)} for chart in shown if chart is not None]


def _x(number: int, nights: int) -> float:
    """The last run stands at the right end."""
    step = WIDTH / max(LEAST_STEP, nights - 1)
    return WIDTH - step * (nights - 1 - number)


def _ends(nights: Sequence[Night]) -> list[tuple[str, float]]:
    return [(nights[0].scan_date, _x(0, len(nights))), (nights[-1].scan_date, WIDTH)]


def _changes(nights: Sequence[Night]) -> list[dict[str, Any]]:
    """Where a run has another plan version than the one before, half way between the two."""
    return [
        {
            "x": (_x(number, len(nights)) + _x(number + 1, len(nights))) / 2,
            "before": nights[number].plan_version,
            "after": nights[number + 1].plan_version,
            "run_id": nights[number + 1].run_id,
        }
        for number in range(len(nights) - 1)
        if nights[number].plan_version != nights[number + 1].plan_version
    ]


def _chart(
    title: str, unit: str, series: dict[str, list[Value | None]], *, legend: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """``unit``: the template's filter for a value. None where no run has one.

    Recall, which has the legend, is not drawn from zero: what is to be seen of it lies far above.
    """
    there = [value for values in series.values() for value in values if value is not None]
    if not there:
        return None
    most = max(value.value if value.high is None else value.high for value in there)
    lowest = min(value.value if value.low is None else value.low for value in there)
    least = max(0.0, min(lowest, most - 0.02)) if legend else 0.0  # or one that never moves would have no axis
    ticks = _ticks(least, most)
    low, span = ticks[0], ticks[-1] - ticks[0]

    def up(value: float) -> float:
        return HEIGHT * (1 - (value - low) / span)

    return {
        "title": title,
        "unit": unit,
        "legend": legend,
        "ticks": [(tick, up(tick)) for tick in ticks],
        "series": [
            {"kind": kind, "points": [_point(number, value, len(values), up) for number, value in _known(values)],
             "lines": [" ".join(f"{_x(number, len(values)):.1f},{up(value.value):.1f}" for number, value in part)
                       for part in _unbroken(values)]}
            for kind, values in series.items()
            if any(values)
        ],
    }  # fmt: skip


def _known(values: Sequence[Value | None]) -> Iterator[tuple[int, Value]]:
    return ((number, value) for number, value in enumerate(values) if value is not None)


def _unbroken(values: Sequence[Value | None]) -> list[list[tuple[int, Value]]]:
    """Runs that follow one another and all have the figure: a line over those without it would make one up."""
    parts: list[list[tuple[int, Value]]] = [[]]
    for number, value in enumerate(values):
        if value is None:
            parts.append([])
        else:
            parts[-1].append((number, value))
    return [part for part in parts if len(part) > 1]


def _point(number: int, value: Value, nights: int, up: Any) -> dict[str, Any]:
    interval = None if value.low is None or value.high is None else (up(value.low), up(value.high))
    return {"night": number, "x": _x(number, nights), "y": up(value.value), "value": value, "interval": interval}


def _ticks(least: float, most: float) -> list[float]:
    """Three to five round numbers around all values."""
    span = (most - least) or abs(most) or 1.0
    rough = span / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(step * number, 12) for number in range(first, max(last, first + 1) + 1)]
