"""What Prometheus is told, declared once: names, kinds, labels, and how they follow from tallies and run records.

Counters count what one driver commits, shard by shard, so over all drivers of all runs they add up to the ledgers. They
have no run id: a series for each night would be kept for ever. Gauges tell a run's totals, whoever committed them,
and are gone when nobody tells them any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prometheus_client import Metric as Family
from prometheus_client import generate_latest
from prometheus_client.registry import Collector

from pipeline.output.tally import Tally
from pipeline.reporting.takeover import standing
from pipeline.steps.bank import IGNORED


@dataclass(frozen=True)
class Metric:
    kind: str
    """counter, gauge or histogram."""
    labels: tuple[str, ...]
    meaning: str
    boundaries: tuple[float, ...] = ()


_STEP = ("plan", "stage", "round")
_RUN = ("run_id", "plan")

METRICS = {
    "dorfman_images_total": Metric("counter", ("plan", "outcome"), "Images committed, by outcome."),
    "dorfman_errors_total": Metric("counter", ("plan", "code"), "Images committed without a verdict, by error code."),
    "dorfman_flagged_total": Metric("counter", ("plan", "category"), "Images that nets flagged, by category."),
    "dorfman_stage_images_in_total": Metric("counter", _STEP, "Images of committed shards that came to a step."),
    "dorfman_stage_images_out_total": Metric("counter", _STEP, "Images of committed shards that a step let through."),
    "dorfman_stage_tests_total": Metric("counter", _STEP, "Group tests of committed shards."),
    "dorfman_stage_positive_tests_total": Metric("counter", _STEP, "Positive group tests of committed shards."),
    "dorfman_stage_gmac_total": Metric("counter", _STEP, "Work of committed shards in GMAC."),
    "dorfman_stage_seconds_total": Metric("counter", _STEP, "Seconds at work for committed shards, over all actors."),
    "dorfman_shards_total": Metric("counter", ("plan",), "Shards committed."),
    "dorfman_runs_total": Metric("counter", ("plan", "status"), "Drivers that ended, by how their run stood."),
    "dorfman_commit_seconds": Metric(
        "histogram", ("plan",), "Seconds that a shard's commit took.", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    ),
    "dorfman_run_listed": Metric("gauge", _RUN, "Images that the run lists, or has listed so far."),
    "dorfman_run_images": Metric("gauge", (*_RUN, "outcome"), "Images of the run that are committed, by outcome."),
    "dorfman_run_flagged_standing": Metric(
        "gauge", _RUN, "Flagged images of the run's source: its own and unchanged ones that earlier runs flagged."
    ),
    "dorfman_run_errors": Metric("gauge", (*_RUN, "code"), "Images of the run without a verdict, by error code."),
    "dorfman_run_group_positive_rate": Metric(
        "gauge", (*_RUN, "stage", "round"), "Share of a round's tests that were positive."
    ),
    "dorfman_run_relative_cost": Metric("gauge", _RUN, "GMAC over those of testing every tested image alone."),
    "dorfman_run_seconds": Metric("gauge", _RUN, "Seconds of the run's last driver."),
    "dorfman_run_images_per_second": Metric("gauge", _RUN, "Images a second that the run's last driver looked at."),
    "dorfman_run_suspect_gates": Metric("gauge", _RUN, "Drift gates that the run did not pass and nobody accepted."),
    "dorfman_run_started_timestamp_seconds": Metric("gauge", _RUN, "When the run was started."),
    "dorfman_run_completed_timestamp_seconds": Metric("gauge", _RUN, "When the run was complete."),
    "dorfman_run_heartbeat_timestamp_seconds": Metric("gauge", _RUN, "When the driver last said that it is alive."),
    "dorfman_run_moved_timestamp_seconds": Metric("gauge", _RUN, "When an image was last decided."),
    "dorfman_run_decided": Metric("gauge", _RUN, "Images decided, committed or not."),
}  # fmt: skip

STEP_COUNTERS = {
    "dorfman_stage_images_in_total": "images_in",
    "dorfman_stage_images_out_total": "images_out",
    "dorfman_stage_tests_total": "tests",
    "dorfman_stage_positive_tests_total": "positive_tests",
    "dorfman_stage_gmac_total": "gmac",
    "dorfman_stage_seconds_total": "seconds",
}
"""Counters by the field of a step's work that they count."""


@dataclass(frozen=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float

    def __post_init__(self) -> None:
        assert set(self.labels) == set(METRICS[self.name].labels), self


def counted(tally: Tally, plan: str) -> Iterator[Sample]:
    """What counters grow by when a shard of this tally is committed; nothing for what stays as it is."""
    named = (
        ("dorfman_images_total", "outcome", tally.outcomes),
        ("dorfman_errors_total", "code", tally.errors),
        ("dorfman_flagged_total", "category", tally.categories),
    )
    samples = [Sample("dorfman_shards_total", {"plan": plan}, 1)]
    samples += [Sample(name, {"plan": plan, label: key}, n) for name, label, by in named for key, n in by.items()]
    for row in tally.work_rows():
        if row["operator"].startswith(f"{IGNORED}:"):
            continue  # a series for each entry would be kept for as long as the node lives, and name known content
        step = {"plan": plan, "stage": row["operator"], "round": _round(row["round"])}
        samples += [Sample(name, step, row[field]) for name, field in STEP_COUNTERS.items()]
    return (sample for sample in samples if sample.value > 0)


def of_run(record: Mapping[str, Any], *, accepted: bool = False) -> Iterator[Sample]:
    """Gauges of a run from its record or its status. ``accepted``: somebody has looked at what the gates found."""
    run = _named(record)
    yield Sample("dorfman_run_listed", run, record["listed"])
    for outcome, images in record["counts"].items():
        if outcome != "listed":
            yield Sample("dorfman_run_images", run | {"outcome": outcome}, images)
    if (flagged := standing(record)) is not None:
        yield Sample("dorfman_run_flagged_standing", run, flagged)
    for code, images in record["errors"].items():
        yield Sample("dorfman_run_errors", run | {"code": code}, images)
    for stage in record["stages"]:
        for number, work in enumerate(stage["rounds"]):
            if work["tests"]:
                step = run | {"stage": stage["name"], "round": str(number)}
                yield Sample("dorfman_run_group_positive_rate", step, work["positive_tests"] / work["tests"])
    if record["relative_cost"] is not None:
        yield Sample("dorfman_run_relative_cost", run, record["relative_cost"])
    yield Sample("dorfman_run_seconds", run, record["seconds"])
    yield Sample("dorfman_run_images_per_second", run, record["images_per_s"])
    yield Sample("dorfman_run_started_timestamp_seconds", run, _moment(record["started_at"]))
    if record["status"] == "complete":
        yield Sample("dorfman_run_suspect_gates", run, 0 if accepted else len(record.get("suspect") or ()))
        yield Sample("dorfman_run_completed_timestamp_seconds", run, _moment(record["updated_at"]))


def of_heartbeat(beat: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[Sample]:
    """Gauges of a driver that is alive. ``record``: of its run, for the names."""
    run = _named(record)
    yield Sample("dorfman_run_heartbeat_timestamp_seconds", run, _moment(beat["updated_at"]))
    yield Sample("dorfman_run_moved_timestamp_seconds", run, _moment(beat["moved_at"]))
    yield Sample("dorfman_run_decided", run, beat["decided"])


def of_listing(beat: Mapping[str, Any]) -> Iterator[Sample]:
    """Gauges of a driver that lists its source."""
    run = _named(beat)
    yield Sample("dorfman_run_listed", run, beat["listed"])
    yield Sample("dorfman_run_started_timestamp_seconds", run, _moment(beat["started_at"]))
    yield Sample("dorfman_run_heartbeat_timestamp_seconds", run, _moment(beat["updated_at"]))


class _Told(Collector):
    """Samples as prometheus_client wants them: each metric's together."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.families = {
            name: Family(name.removesuffix("_total"), metric.meaning, metric.kind) for name, metric in METRICS.items()
        }
        for sample in samples:
            self.families[sample.name].add_sample(sample.name, dict(sample.labels), sample.value)

    def collect(self) -> Iterator[Family]:
        return (family for family in self.families.values() if family.samples)


def exposition(samples: Iterable[Sample]) -> str:
    """Counters and gauges in Prometheus' text format, version 0.0.4."""
    return generate_latest(_Told(samples)).decode()


def _named(record: Mapping[str, Any]) -> dict[str, str]:
    return {"run_id": record["run_id"], "plan": record["plan"]["name"]}


def _round(number: int | None) -> str:
    """Of what has no rounds, as fetching, it is empty."""
    return "" if number is None else str(number)


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
