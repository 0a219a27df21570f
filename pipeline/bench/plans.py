"""Plans against each other: the same labelled pictures scanned with each of them in turn, several times."""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.bench.measure import Report, Say
from pipeline.errors import UsageError
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.storage import check_endpoint
from pipeline.training.machine import describe_machine, describe_versions


@dataclass(frozen=True, kw_only=True)
class PlansConfig:
    """Scans labelled pictures with several plans in turn, and compares seconds beside recall.

    Exit codes: 0 done, 1 a scan failed, 2 wrong usage, plans or labels.
    """

    source: str
    """What to scan: an s3:// prefix, or a folder."""
    labels: str
    """Labels file (Parquet: uri, category, label) of it."""
    plans: tuple[str, ...]
    """Shipped plans by name, or paths of plan files; the first one is what the others are compared with."""
    repeats: int = 3
    """Scans with each plan; they take turns, so that a slow minute is nobody's alone."""
    json: Path | None = None
    """File to write the rows to."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if len(set(self.plans)) < 2:
            raise UsageError(f"plans are {list(self.plans)}: give at least two different ones to compare")
        if self.repeats < 1:
            raise UsageError(f"repeats is {self.repeats}, but each plan must be scanned with at least once")


def bench_plans(config: PlansConfig, say: Say) -> dict[str, Any]:
    """A row per plan. Raises UsageError and RunError as a scan does."""
    records: dict[str, list[dict[str, Any]]] = {plan: [] for plan in config.plans}
    for turn in range(config.repeats):
        for plan in config.plans:
            with tempfile.TemporaryDirectory(prefix="dorfman-bench-") as output:
                # One salt: every plan and every turn sees the same windows.
                record = run_scan(
                    ScanConfig(
                        source=config.source, output=output, plan=plan, labels=config.labels,
                        endpoint_url=config.endpoint_url, salt="benchmark",
                    )
                )  # fmt: skip
            records[plan].append(record)
            say(f"turn {turn + 1}, {plan}: {record['seconds']:.1f} s")
    result = {
        "machine": describe_machine(),
        "versions": describe_versions("dorfman", "torch", "onnxruntime", "ray"),
        "images": records[config.plans[0]][0]["listed"],
        "rows": [_row(plan, scans) for plan, scans in records.items()],
    }
    if config.json:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _row(plan: str, scans: list[dict[str, Any]]) -> dict[str, Any]:
    quality = scans[0]["quality"]
    after = [scan["seconds"] - scan["startup_seconds"] for scan in scans]
    return {
        "plan": plan,
        "seconds": [scan["seconds"] for scan in scans],
        "seconds_after_startup": after,
        "relative_cost": scans[0]["relative_cost"],
        "stage_images": {stage["name"]: stage["images_in"] for stage in scans[0]["stages"]},
        "operator_seconds": statistics.median(sum(work["seconds"] for work in scan["operators"]) for scan in scans),
        "recall": quality["recall"],
        "recall_interval": quality["recall_interval"],
        "positives": quality["positives"],
        "false_positive_rate": quality["false_positive_rate"],
        "false_positive_rate_interval": quality["false_positive_rate_interval"],
        "negatives": quality["negatives"],
    }


def plans_report(result: dict[str, Any]) -> Report:
    row = result["rows"][0]
    return [plans_table(result), f"{row['positives']:,} unique positives, {row['negatives']:,} others"]


def plans_table(result: dict[str, Any]) -> Table:
    """For a terminal: medians, and in brackets the least and the most."""
    table = Table(title=f"{result['images']:,} images, {len(result['rows'][0]['seconds'])} scans with each plan")
    for column in ("plan", "seconds", "after start-up", "actor seconds", "against the first", "relative cost",
                   "recall [95 %]", "FPR [95 %]"):  # fmt: skip
        table.add_column(column)
    first = statistics.median(result["rows"][0]["seconds"])
    for row in result["rows"]:
        table.add_row(
            row["plan"],
            _spread(row["seconds"]),
            _spread(row["seconds_after_startup"]),
            f"{row['operator_seconds']:.1f}",
            f"{statistics.median(row['seconds']) / first:.3f}",
            f"{row['relative_cost']:.4f}",
            "{:.4f} [{:.4f}, {:.4f}]".format(row["recall"], *row["recall_interval"]),
            "{:.4f} [{:.4f}, {:.4f}]".format(row["false_positive_rate"], *row["false_positive_rate_interval"]),
        )
    return table


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
