"""Measures: ``python -m jobs.benchmark COMMAND``. ``--help`` of each says what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from jobs.cli import run_command
from pipeline.bench.capacity import CapacityConfig
from pipeline.bench.decode import DecodeBenchConfig, bench_decode, decode_report
from pipeline.bench.fetch import FetchBenchConfig, bench_fetch, fetch_report
from pipeline.bench.measure import Report, Say
from pipeline.bench.models import ModelsConfig, bench_models, models_report
from pipeline.bench.night import bench_capacity, capacity_report
from pipeline.bench.plans import PlansConfig, bench_plans, plans_report
from pipeline.bench.scale import ScaleConfig, bench_scale, scale_report
from pipeline.bench.scan import ScanBenchConfig, bench_scan, scan_report
from pipeline.bench.stage import StageBenchConfig, bench_stage, stage_report

# A table of results has a dozen columns: where there is no terminal to fit, it takes what it needs.
WIDTH = 190


def run_with(
    bench: Callable[[Any, Say], dict[str, Any]], report: Callable[[dict[str, Any]], Report]
) -> Callable[[Any], None]:
    def run(config: Any) -> None:
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
        for part in report(bench(config, lambda line: console.print(line, highlight=False, soft_wrap=True))):
            console.print(part, highlight=False, soft_wrap=isinstance(part, str))

    return run


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "capacity": (CapacityConfig, run_with(bench_capacity, capacity_report)),
    "decode": (DecodeBenchConfig, run_with(bench_decode, decode_report)),
    "fetch": (FetchBenchConfig, run_with(bench_fetch, fetch_report)),
    "models": (ModelsConfig, run_with(bench_models, models_report)),
    "plans": (PlansConfig, run_with(bench_plans, plans_report)),
    "scale": (ScaleConfig, run_with(bench_scale, scale_report)),
    "scan": (ScanBenchConfig, run_with(bench_scan, scan_report)),
    "stage": (StageBenchConfig, run_with(bench_stage, stage_report)),
}

if __name__ == "__main__":
    run_command("jobs.benchmark", COMMANDS)
