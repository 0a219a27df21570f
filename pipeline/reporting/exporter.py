"""From a driver to Prometheus, through Ray: each node's agent exports what its processes have counted.

Measured with Ray 2.60: the agent shows what a driver has counted within 10 s (``metrics_report_interval_ms``), and all
of it at once when the driver disconnects, however soon after the last count. It keeps counters of drivers that have
ended for as long as the node lives, and forgets gauges after 20 s. So no driver waits at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.output.tally import Tally
from pipeline.reporting.metrics import METRICS, Sample, counted, of_heartbeat, of_run

KINDS = {"counter": Counter, "gauge": Gauge}


class Exporter:
    """Of one driver. What it is told before Ray is there waits until ``join``."""

    def __init__(self, plan: str) -> None:
        self.plan = plan
        self.metrics: dict[str, Any] | None = None
        self.waiting: list[Sample] = []

    def join(self) -> None:
        """Ray is there now."""
        self.metrics = {name: _made(name) for name in METRICS}
        waiting, self.waiting = self.waiting, []
        self._tell(waiting)

    def committed(self, tally: Tally, seconds: float) -> None:
        """One shard, and how long its commit took."""
        self._tell([*counted(tally, self.plan), Sample("dorfman_commit_seconds", {"plan": self.plan}, seconds)])

    def stands(self, record: Mapping[str, Any]) -> None:
        """How the run stands, by its record or status."""
        self._tell(of_run(record))

    def beat(self, beat: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self._tell(of_heartbeat(beat, record))

    def ended(self, status: str) -> None:
        self._tell([Sample("dorfman_runs_total", {"plan": self.plan, "status": status}, 1)])

    def _tell(self, samples: Iterable[Sample]) -> None:
        if self.metrics is None:
            # Gauges are told again and again; of counts each one matters.
            self.waiting += (sample for sample in samples if METRICS[sample.name].kind != "gauge")
            return
        for sample in samples:
            metric, labels = self.metrics[sample.name], dict(sample.labels)
            if METRICS[sample.name].kind == "counter":
                metric.inc(sample.value, labels)
            elif METRICS[sample.name].kind == "gauge":
                metric.set(sample.value, labels)
            else:
                metric.observe(sample.value, labels)


def _made(name: str) -> Any:
    metric = METRICS[name]
    if metric.kind == "histogram":
        return Histogram(name, metric.meaning, list(metric.boundaries), metric.labels)
    return KINDS[metric.kind](name, metric.meaning, metric.labels)
