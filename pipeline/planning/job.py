"""The job that plans: from a file of scores to a plan, a page that explains it, and two pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.card import read_card
from pipeline.errors import UsageError
from pipeline.plan import Plan
from pipeline.planning.calibration import Prevalence
from pipeline.planning.file import plan_yaml, to_plan
from pipeline.planning.page import PlanReport
from pipeline.planning.proposal import Proposal, Request, propose
from pipeline.planning.scores import Scores, read_scores
from pipeline.storage import check_endpoint


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Finds the cheapest plan whose recall the labelled pictures certify, and writes it with its reasons.

    Exit codes: 0 done, 2 wrong usage, or the labels cannot certify what is asked.
    """

    scores: str
    """What jobs.calibrate has written."""
    prevalence: tuple[str, ...]
    """Share of the images that are violating: one number for every category, or CATEGORY=SHARE of each."""
    recall: tuple[str, ...] = ("0.95",)
    """Recall to certify: one number for every category, or CATEGORY=RECALL of each."""
    confidence: float = 0.95
    """Of the certificate, for all categories at once."""
    prevalence_images: float = 10_000
    """How many images the prevalence was estimated from: the fewer, the more uncertain the cost is taken to be."""
    max_fpr: float = 0.01
    """Highest share of the others that may be flagged."""
    cost: Literal["gmac", "seconds"] = "gmac"
    """What to save: counted work, or seconds as calibration has measured them, decoding included."""
    output: Path = Path("plan.yaml")
    """The plan. Beside it are written, named like it, a page (.md) and its pictures (.svg)."""
    name: str = ""
    """The plan's; default: as the file."""
    cpus: float = 0.0
    """CPUs that the plan's pools may take at least; default: those of this machine."""
    gpus: float = 0.0
    """GPUs that its stages share at least."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server for the scores; without it AWS is meant."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if self.output.suffix not in (".yaml", ".yml"):
            raise UsageError(f"output is {self.output}, but a plan's name ends in .yaml")
        if self.cpus and self.cpus < 1:
            raise UsageError(f"cpus is {self.cpus:g}, but a scan needs at least 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned:
    proposal: Proposal
    plan: Plan
    report: PlanReport
    page: Path


def plan_from_scores(config: PlanConfig) -> Planned:
    """Raises UsageError when the file, the request or the labels do not allow a plan."""
    scores = read_scores(config.scores, config.endpoint_url)
    if config.cost == "seconds" and any(candidate.seconds is None for candidate in scores.candidates.values()):
        raise UsageError(f"scores {config.scores}: its candidates were not timed; plan with --cost gmac")
    try:
        prevalence = Prevalence(
            mean_K=_per_category("prevalence", config.prevalence, scores), images=config.prevalence_images
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    request = Request(
        recall_K=_per_category("recall", config.recall, scores),
        confidence=config.confidence,
        prevalence=prevalence,
        max_fpr=config.max_fpr,
        cost=config.cost,
    )
    proposal = propose(scores, request)
    cpus = config.cpus or float(os.cpu_count() or 1)
    plan = to_plan(scores, proposal, config.name or config.output.stem, cpus, config.gpus)
    _check_nets(config, plan)
    report = PlanReport(scores, proposal, plan)
    return Planned(proposal=proposal, plan=plan, report=report, page=_write(config.output, plan, report))


def _check_nets(config: PlanConfig, plan: Plan) -> None:
    """Nets in int8 are for CPUs: a plan that gives them GPUs would be certified, and refused by every scan."""
    for stage in plan.stages if config.gpus else ():
        try:
            card = read_card(stage.model)
        except ValueError:
            continue  # the nets need not be where plans are made
        if card.int8:
            raise UsageError(
                f"--gpus {config.gpus:g}: the best plan has {stage.model!r}, a net in int8, for CPUs: leave out "
                "--gpus, or calibrate without such nets"
            )


def _write(path: Path, plan: Plan, report: PlanReport) -> Path:
    page = path.with_suffix(".md")
    pictures = [path.with_name(f"{path.stem}-cost-{axis}.svg") for axis in ("recall", "prevalence")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        report.draw_cost_against_recall(pictures[0])
        report.draw_cost_against_prevalence(pictures[1])
        page.write_text(report.markdown(pictures))
        path.write_text(plan_yaml(plan, [f"Written by jobs.plan; {page.name} explains it."]))
    except OSError as error:
        raise UsageError(f"output {path}: {error.strerror}; give another --output") from error
    return page


def _per_category(what: str, given: tuple[str, ...], scores: Scores) -> tuple[float, ...]:
    """One value a category, from one for all or CATEGORY=VALUE of each. Raises UsageError."""
    values = {}
    for entry in given:
        category, _, number = entry.rpartition("=")
        try:
            values[category] = float(number)
        except ValueError:
            raise UsageError(f"{what} {entry!r}: write a number, or CATEGORY=NUMBER, as in weapon=0.95") from None
    if set(values) == {""}:
        return (values[""],) * len(scores.categories)
    if set(values) != set(scores.categories) or len(values) < len(given):
        raise UsageError(
            f"{what} is given for {sorted(values)}, but the scores are of {sorted(scores.categories)}: give each once, "
            "or one number for all"
        )
    return tuple(values[category] for category in scores.categories)
