"""Measures: ``python -m jobs.benchmark COMMAND``. ``--help`` of each says what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from jobs.cli import run_command
from pipeline.bench_capacity import bench_capacity, capacity_tables
from pipeline.bench_decode import DecodeBenchConfig, bench_decode, decode_tables
from pipeline.bench_fetch import FetchBenchConfig, bench_fetch, fetch_notes, fetch_table
from pipeline.bench_models import ModelsConfig, bench_models, models_tables
from pipeline.bench_plans import PlansConfig, bench_plans, plans_table
from pipeline.bench_scale import ScaleConfig, bench_scale, driver_inputs, growth, scale_table
from pipeline.bench_scan import ScanBenchConfig, bench_scan, scan_table
from pipeline.bench_stage import StageBenchConfig, bench_stage, stage_table
from pipeline.capacity import CapacityConfig

# A table of results has a dozen columns: where there is no terminal to fit, it takes what it needs.
WIDTH = 190


def wide_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def run_plans(config: PlansConfig) -> None:
    console = wide_console()
    result = bench_plans(config, lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(plans_table(result))
    row = result["rows"][0]
    console.print(f"{row['positives']:,} unique positives, {row['negatives']:,} others", highlight=False)


def run_decode(config: DecodeBenchConfig) -> None:
    console = wide_console()
    result = bench_decode(config, lambda line: console.print(line, highlight=False, soft_wrap=True))
    for table in decode_tables(result):
        console.print(table)


def run_scan(config: ScanBenchConfig) -> None:
    console = wide_console()
    console.print(scan_table(bench_scan(config, lambda line: console.print(line, highlight=False, soft_wrap=True))))


def run_stage(config: StageBenchConfig) -> None:
    console = wide_console()
    console.print(stage_table(bench_stage(config, lambda line: console.print(line, highlight=False, soft_wrap=True))))


def run_models(config: ModelsConfig) -> None:
    console = wide_console()
    result = bench_models(config, lambda line: console.print(line, highlight=False, soft_wrap=True))
    for table in models_tables(result):
        console.print(table)
    console.print(
        f"Recall is of {result['positives']:,} unique positives, each hosted by {config.redraws} groups of re-drawn "
        f"negatives, FPR of {result['negatives']:,} unique negatives; cost is GMAC over individual testing's.",
        highlight=False,
        soft_wrap=True,
    )
    if config.json:
        console.print(f"rows: {config.json}", soft_wrap=True)
    if config.plans:
        console.print(f"plans: {config.plans}", soft_wrap=True)


def run_scale(config: ScaleConfig) -> None:
    console = wide_console()
    result = bench_scale(config, lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(scale_table(result))
    least, most = (f"{end(config.keys):,}" for end in (min, max))
    console.print(f"an image of {most} costs {growth(result['rows']):.3f} of one of {least}", highlight=False)
    if config.idle:
        inputs = ", ".join(f"{name}: {value:.4g}" for name, value in driver_inputs(result["rows"]).items())
        console.print(f"for capacity: {inputs}", highlight=False, soft_wrap=True)


def run_capacity(config: CapacityConfig) -> None:
    console = wide_console()
    for table in capacity_tables(bench_capacity(config)):
        console.print(table)


def run_fetch(config: FetchBenchConfig) -> None:
    console = wide_console()
    result = bench_fetch(config, lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(fetch_table(result))
    for note in fetch_notes(result):
        console.print(note, highlight=False, soft_wrap=True)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "capacity": (CapacityConfig, run_capacity),
    "decode": (DecodeBenchConfig, run_decode),
    "fetch": (FetchBenchConfig, run_fetch),
    "models": (ModelsConfig, run_models),
    "plans": (PlansConfig, run_plans),
    "scan": (ScanBenchConfig, run_scan),
    "scale": (ScaleConfig, run_scale),
    "stage": (StageBenchConfig, run_stage),
}

if __name__ == "__main__":
    run_command("jobs.benchmark", COMMANDS)
