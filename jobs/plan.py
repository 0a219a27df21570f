"""Finds the cheapest plan that keeps the recall: ``python -m jobs.plan --scores scores.parquet --prevalence 0.001``."""

from __future__ import annotations

from rich.console import Console

from jobs.cli import run_job
from pipeline.planning.job import PlanConfig, plan_from_scores
from pipeline.storage import storage_errors_as_usage


def run(config: PlanConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    with storage_errors_as_usage():
        planned = plan_from_scores(config)
    proposal = planned.proposal
    console.print(f"{proposal.chosen.route.name}", markup=False)
    for category, bound, count in zip(planned.plan.categories, proposal.bound_K, proposal.positives_K, strict=True):
        console.print(
            f"{category}: recall of at least {bound:.4f} certified with confidence {config.confidence:g}, by {count:,} "
            "unique positives"
        )
    console.print(
        f"cost {proposal.relative_cost:.4f} of {proposal.individual.route.name} on every image, false-positive rate "
        f"{proposal.chosen.spent.false_positive_rate:.5f} of {proposal.negatives:,} negatives"
    )
    console.print(f"plan {config.output}, reasons and pictures {planned.page}")


if __name__ == "__main__":
    run_job("jobs.plan", PlanConfig, run)
