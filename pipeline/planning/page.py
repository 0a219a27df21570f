"""What a plan is expected to do, for people: a page of Markdown and two pictures.

Every figure is of the certifying half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from models.intervals import interval
from pipeline.plan import Plan
from pipeline.planning.field import Field
from pipeline.planning.file import PREVALENCES
from pipeline.planning.formulas import PERFECT, hierarchical, split_evenly
from pipeline.planning.proposal import Judged, Proposal
from pipeline.planning.scores import Scores

OFFSETS = np.linspace(-2, 5, 57)
UNITS = {"gmac": "GMAC", "seconds": "seconds"}


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """From ``prevalence`` on, all categories together, ``route`` is cheaper than the plan."""

    prevalence: float
    route: str


class PlanReport:
    """Of one proposal, as the plan that it became."""

    def __init__(self, scores: Scores, proposal: Proposal, plan: Plan) -> None:
        self.scores, self.proposal, self.plan = scores, proposal, plan
        self.unit = UNITS[proposal.request.cost]
        allowed = proposal.request.max_fpr
        rivals = [proposal.chosen, *proposal.runners_up]
        rivals = [judged for judged in rivals if judged.spent.false_positive_rate <= allowed]
        groups = [judged for judged in rivals if judged.kind == "groups"]
        others = [judged for judged in rivals if judged.kind != "groups"]
        self.best_groups = min(groups, key=_cost) if groups else None
        self.best_without = min(others, key=_cost) if others else None

    def markdown(self, pictures: Sequence[Path]) -> str:
        return "\n\n".join(self._paragraphs(pictures)) + "\n"

    def _paragraphs(self, pictures: Sequence[Path]) -> Iterator[str]:
        proposal, request = self.proposal, self.proposal.request
        yield f"# Plan {self.plan.name}"
        yield f"`{proposal.chosen.route.name}`, version {self.plan.version}."
        yield self._verdict()
        yield "## What is promised"
        yield self._promise()
        yield "## What is expected"
        yield self._expected()
        yield self._steps()
        yield "## What else there was"
        yield self._runners_up()
        yield "\n".join(f"![{picture.stem}]({picture.name})" for picture in pictures)
        yield self._break_even()
        yield "## What this rests on"
        search = ", ".join(
            f"{count} of {c}"
            for c, count in zip(self.scores.categories, self.scores.unique_positives("search"), strict=True)
        )
        yield (
            f"Structure and thresholds were searched on one part of the labelled pictures ({search}); "
            f"recall, cost and false positives above are of the other part, which has set one number only: by how much "
            f"all thresholds are lowered together ({proposal.chosen.offset:+.2f} standard deviations of each test's "
            f"positives). The {proposal.finalists} cheapest of the search were certified, each at confidence "
            f"{1 - (1 - request.confidence) / proposal.finalists:.4g}. A positive counts once, with the companions it "
            f"was given first. The promise is about images like the labelled ones: when the night's are of another "
            f"kind, only the audit (`jobs.audit`) can tell."
        )

    def _verdict(self) -> str:
        """Whether groups pay, in a sentence."""
        groups, without, chosen = self.best_groups, self.best_without, self.proposal.chosen
        if groups is None:
            return "No plan with groups keeps the recall and the false-positive rate: this one has none."
        if without is None:
            return "**Groups pay**: no plan without them keeps the recall and the false-positive rate."
        rival, mine = (without, groups) if chosen.kind == "groups" else (groups, without)
        if _cost(rival) < _cost(mine):
            return (
                f"`{rival.route.name}`, {'without' if rival is without else 'with'} groups, costs "
                f"{_cost(rival) / _cost(mine):.2f} times as much as this plan: whether groups pay is open. It was not "
                "certified, for the search had put others first; more labelled pictures would tell them apart."
            )
        ratio = _cost(without) / _cost(groups)
        if chosen.kind == "groups":
            return (
                f"**Groups pay**: the cheapest plan found without them, `{without.route.name}`, costs "
                f"{ratio:.2f} times as much."
            )
        return (
            f"**Grouping does not pay here**, so this plan has no groups: the cheapest found with them, "
            f"`{groups.route.name}`, costs {1 / ratio:.2f} times as much."
        )

    def _promise(self) -> str:
        request = self.proposal.request
        rows = [
            f"| {category} | {recall:g} | {bound:.4f} | {count} | {100 * mean:.3g} % |"
            for category, recall, bound, count, mean in zip(
                self.scores.categories, request.recall_K, self.proposal.bound_K, self.proposal.positives_K,
                request.prevalence.mean_K, strict=True,
            )
        ]  # fmt: skip
        head = (
            "| category | recall asked for | recall certified | unique positives | prevalence |\n" + "| --- " * 5 + "|"
        )
        return (
            f"With confidence {request.confidence:g}, for all categories at once:\n\n{head}\n"
            + "\n".join(rows)
            + "\n\n"
            "Recall is that of the whole cascade, companions included: the share of unique violating pictures that end "
            "flagged as what they are."
        )

    def _expected(self) -> str:
        chosen, request = self.proposal.chosen, self.proposal.request
        prevalence = request.prevalence
        flagged = round(chosen.spent.false_positive_rate * self.proposal.negatives)
        low, high = interval(flagged, self.proposal.negatives)
        recalls = ", ".join(f"{c} {r:.4f}" for c, r in zip(self.scores.categories, chosen.recall_K, strict=True))
        low_prevalence, high_prevalence = (prevalence.quantile(share) for share in (0.05, 0.95))
        costs = [
            spent.cost
            for spent in self._field(chosen).spend_at(chosen.thresholds_SK, (low_prevalence, high_prevalence))
        ]
        return "\n".join(
            [
                "| | |",
                "| --- | --- |",
                f"| cost per image, {self.unit} | {chosen.spent.cost:.4g} ({costs[0]:.4g} to {costs[1]:.4g} between "
                f"the 5 % and 95 % quantiles of the prevalence) |",
                f"| relative to `{self.proposal.individual.route.name}` on every image | "
                f"{self.proposal.relative_cost:.4f} |",
                f"| false-positive rate | {chosen.spent.false_positive_rate:.5f} [{low:.5f}, {high:.5f}] of "
                f"{self.proposal.negatives:,} negatives |",
                f"| recall, the estimate | {recalls} |",
                f"| tests per image | {self._tests()} |",
            ]
        )

    def _tests(self) -> str:
        """How many, and how many of them the errors of the tests and the company of others cost."""
        route = self.proposal.chosen.route
        tests = sum(
            reached / step.size for step, reached in zip(route.steps, self.proposal.chosen.spent.reached_S, strict=True)
        )
        groups = [step.size for step in route.steps if step.size > 1]
        if route.screened or not groups:
            return f"{tests:.4f}"
        levels = split_evenly(groups[0], groups)
        prevalence = self.proposal.request.prevalence.total
        perfect = hierarchical(levels, prevalence, [PERFECT] * (len(levels) + 1)).tests_per_image
        # Images alone are tested by one net after the other; the arithmetic knows one such test.
        perfect += prevalence * (len(route.steps) - len(groups) - 1)
        return f"{tests:.4f} ({perfect:.4f} if no test ever erred)"

    def _steps(self) -> str:
        """What each step sees, removes and costs."""
        chosen = self.proposal.chosen
        lines = [
            "| test | images that reach it | share it removes | cost per image of all | thresholds |",
            "| --- " * 5 + "|",
        ]
        places = [(stage, index) for stage in self.plan.stages for index in range(len(stage.rounds))]
        left_S = [*chosen.spent.reached_S[1:], None]
        for number, (step, (stage, index)) in enumerate(zip(chosen.route.steps, places, strict=True)):
            reached, left = float(chosen.spent.reached_S[number]), left_S[number]
            removed = "" if left is None or reached == 0 else f"{100 * (1 - left / reached):.1f} %"
            kept = ", from kept features" if chosen.route.begins_kept(number) else ""
            thresholds = ", ".join(f"{category} {values[index]:.4g}" for category, values in stage.thresholds.items())
            cost = float(chosen.spent.costs_S[number])
            lines.append(f"| {step.name}{kept} | {100 * reached:.2f} % | {removed} | {cost:.4g} | {thresholds} |")
        return "\n".join(lines)

    def _runners_up(self) -> str:
        chosen = self.proposal.chosen
        finalists = self.proposal.finalists
        lines = ["| plan | kind | cost | against the plan | false-positive rate |", "| --- " * 5 + "|"]
        shown = sorted([chosen, self.proposal.individual, *self._worth_showing()], key=_cost)
        for judged in shown:
            mark = "**" if judged is chosen else ""
            lines.append(
                f"| {mark}`{judged.route.name}`{mark} | {judged.kind} | {_cost(judged):.4g} | "
                f"x {_cost(judged) / _cost(chosen):.2f} | {judged.spent.false_positive_rate:.5f} |"
            )
        return (
            "\n".join(lines) + "\n\nEach at the thresholds that this half's positives allow it; only the "
            f"{finalists} that the search had put first count as certified. A rate above "
            f"{self.proposal.request.max_fpr:g} is more than was allowed."
        )

    def _worth_showing(self) -> list[Judged]:
        rest = sorted(self.proposal.runners_up, key=_cost)
        found = rest[:6]
        for best in (self.best_groups, self.best_without):
            if best is not None and best is not self.proposal.chosen and best not in found:
                found.append(best)
        return found

    @cached_property
    def break_evens(self) -> list[BreakEven]:
        """Where another kind of plan becomes cheaper than this one, at its thresholds."""
        (_, mine), *others = self._curves
        found = []
        for rival, theirs in others:
            cheaper = np.flatnonzero((theirs < mine) & (self.proposal.request.prevalence.total < PREVALENCES))
            if cheaper.size:
                found.append(BreakEven(prevalence=float(PREVALENCES[cheaper[0]]), route=rival.route.name))
        return found

    def _break_even(self) -> str:
        if not self.break_evens:
            return "None of the other kinds of plans becomes cheaper at any prevalence up to a half."
        lines = [
            f"From a prevalence of {100 * point.prevalence:.3g} % on, `{point.route}` is cheaper."
            for point in self.break_evens
        ]
        burst = self.plan.stages[0].burst
        if burst is not None:
            lines.append(
                f"A window of which {burst.positive} of the first {burst.first_groups} groups are positive falls back "
                f"to groups of {burst.group_size}."
            )
        return " ".join(lines)

    @property
    def _compared(self) -> list[Judged]:
        """The plan, then the best of the other kinds."""
        rivals = (self.best_groups, self.best_without, self.proposal.individual)
        chosen = self.proposal.chosen
        return [chosen, *(rival for rival in rivals if rival is not None and rival is not chosen)]

    @cached_property
    def _curves(self) -> list[tuple[Judged, np.ndarray]]:
        """What these cost at each of ``PREVALENCES``."""
        return [
            (
                judged,
                np.array([spent.cost for spent in self._field(judged).spend_at(judged.thresholds_SK, PREVALENCES)]),
            )
            for judged in self._compared
        ]

    def draw_cost_against_recall(self, path: Path) -> None:
        """Each kind's path of thresholds: what recall costs, of pictures that shaped none of them."""
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        individual = _cost(self.proposal.individual)
        for judged in self._compared:
            field = self._field(judged)
            points = [
                (min(field.recalls(judged.shape.at(offset))), field.spend(judged.shape.at(offset)).cost / individual)
                for offset in OFFSETS
            ]
            recalls, costs = zip(*points, strict=True)
            (line,) = axes.plot(
                recalls, costs, label=judged.route.name, linewidth=2 if judged is self.proposal.chosen else 1
            )
            axes.plot(min(judged.recall_K), _cost(judged) / individual, "o", color=line.get_color())
        for bound in sorted(set(self.proposal.bound_K)):
            axes.axvline(bound, color="grey", linestyle="--", linewidth=1)
        axes.set(
            xlabel="recall of the worst category, certifying half (dashed: certified)",
            ylabel="relative cost",
            yscale="log",
            xlim=(max(0.5, min(self.proposal.request.recall_K) - 0.15), 1.005),
        )
        _finish(figure, path)

    def draw_cost_against_prevalence(self, path: Path) -> None:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        prevalence = self.proposal.request.prevalence
        for judged, costs in self._curves:
            relative = costs / _cost(self.proposal.individual)
            width = 2 if judged is self.proposal.chosen else 1
            axes.plot(PREVALENCES, relative, label=judged.route.name, linewidth=width)
        axes.axvspan(prevalence.quantile(0.05), prevalence.quantile(0.95), color="tab:grey", alpha=0.25)
        for point in self.break_evens:
            axes.axvline(point.prevalence, color="grey", linestyle="--", linewidth=1)
        axes.set(
            xlabel="prevalence, all categories (grey: planned for; dashed: break-even)", ylabel="relative cost",
            xscale="log", yscale="log",
        )  # fmt: skip
        _finish(figure, path)

    def _field(self, judged: Judged) -> Field:
        request = self.proposal.request
        return Field(self.scores, judged.route, "certify", request.prevalence, request.cost)


def _cost(judged: Judged) -> float:
    return judged.spent.cost


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(fontsize="small")
    # Without a date the same plan gives the same file.
    figure.savefig(path, metadata={"Date": None})
