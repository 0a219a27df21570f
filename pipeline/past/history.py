"""How runs over one source went, night after night: figures from their records and audits.

Records lie in a bucket beside everything else, and older versions wrote them too. So each is read as if a stranger had
written it: what is not as it should be is left out by name, and never ends a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.listing.inventory import scope
from pipeline.past.records import PastRuns, last_started, moment
from pipeline.schema import ALL

RUNS = 30
STRANGE = (ValueError, TypeError, RecursionError, OSError)
"""What a file raises that is not as it should be."""


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


class Audit(_Lenient):
    """What reviews said of runs."""

    estimates: dict[str, _Estimate]
    run_ids: list[str]
    confidence: float = Share

    @property
    def estimate(self) -> _Estimate | None:
        """Of all categories together; an audit of a single one has that of the category."""
        return self.estimates.get(ALL) or next(iter(self.estimates.values()), None)

    @property
    def recall(self) -> Value | None:
        return _of(self.estimate.recall) if self.estimate else None


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


def read_history(past: PastRuns, record: Mapping[str, Any]) -> History:
    """The last ``RUNS`` complete runs over the same source that were started no later than this one; none is a retry of
    another's errors."""
    mine, source, until = record["run_id"], scope(record["source"]), moment(record["started_at"])

    def wanted(run_id: str, content: Any) -> bool:
        found = _checked(run_id, content)
        return found.parent_run_id is None and scope(found.source) == source and moment(found.started_at) <= until

    own = last_started({mine: until}, lambda _: [(mine, _plain(record))], 1, wanted)
    others = [(run_id, content) for run_id, content in past.newest(RUNS, wanted) if run_id != mine]
    skipped = {f"run {run_id}": _why(found) for run_id, found in own + others if isinstance(found, Exception)}
    comparable = [_Record.model_validate(found) for _, found in own + others if not isinstance(found, Exception)]
    last = sorted(comparable, key=lambda found: (moment(found.started_at), found.run_id))[-RUNS:]
    audits = read_audits(past, [found.run_id for found in last], skipped)
    return History(nights=[_night(found, audits.get(found.run_id)) for found in last], skipped=skipped)


def _checked(run_id: str, content: Any) -> _Record:
    if isinstance(content, Exception):
        raise content
    found = _Record.model_validate(content)
    date.fromisoformat(found.scan_date)
    if found.run_id != run_id:
        raise ValueError("it names another run")
    return found


def read_audits(past: PastRuns, run_ids: Sequence[str], skipped: dict[str, str]) -> dict[str, Audit]:
    """By the first of its runs. ``skipped`` is told which cannot be read, and why."""
    audits = {}
    for run_id, content in past.audits(run_ids).items():
        try:
            if isinstance(content, Exception):
                raise content
            if content is not None:
                audits[run_id] = Audit.model_validate(content)
        except STRANGE as error:
            skipped[f"audit of {run_id}"] = _why(error)
    return audits


def _plain(content: Any) -> Any:
    """The record of this very run may not have been in a file yet: its tuples are lists to a strict model."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return [_plain(value) for value in content] if isinstance(content, (list, tuple)) else content


def _why(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'the record'}: {first['msg']}"[:200]
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _night(record: _Record, audit: Audit | None) -> Night:
    judged = record.counts.flagged + record.counts.cleared
    quality, estimate = record.quality, audit.estimate if audit else None
    certified = record.plan.certificate.recall.values() if record.plan.certificate else ()
    labelled = quality.positives + quality.negatives if quality else 0
    prevalence = _of(estimate.prevalence) if estimate else None
    if prevalence is None and quality and labelled:
        prevalence = Value(value=quality.positives / labelled)
    return Night(
        run_id=record.run_id,
        scan_date=record.scan_date,
        started_at=moment(record.started_at),
        plan_version=record.plan_version,
        flagged=Value(value=record.counts.flagged / judged) if judged else None,
        prevalence=prevalence,
        certified=Value(value=_share(min(certified))) if certified else None,
        audited=audit.recall if audit else None,
        labelled=_interval(quality.recall, quality.recall_interval) if quality and quality.recall is not None else None,
        relative_cost=None if record.relative_cost is None else Value(value=record.relative_cost),
        cost=Value(value=record.cost.total) if record.cost else None,
        currency=record.cost.currency if record.cost else None,
        images_per_s=Value(value=record.images_per_s),
        audited_runs=len(audit.run_ids) if audit and estimate else 0,
    )


def _of(figure: _Figure) -> Value | None:
    return None if figure.value is None else _interval(figure.value, figure.interval)


def _interval(value: float, interval: Sequence[float]) -> Value:
    return Value(value=_share(value), low=_share(interval[0]), high=_share(interval[1]))


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))
