"""Measures: ``python -m jobs.benchmark COMMAND``. ``models`` compares group testing nets."""

from __future__ import annotations

from rich.console import Console

from jobs.cli import run_command
from pipeline.bench_models import ModelsConfig, bench_models, models_tables

# A table of results has a dozen columns: where there is no terminal to fit, it takes what it needs.
WIDTH = 190


def run_models(config: ModelsConfig) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
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


COMMANDS = {"models": (ModelsConfig, run_models)}

if __name__ == "__main__":
    run_command("jobs.benchmark", COMMANDS)
