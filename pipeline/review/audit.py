"""Whether a plan still finds what it was certified to find: estimates from reviews, and the alarm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from models.intervals import interval
from pipeline.errors import UsageError
from pipeline.listing.canaries import count_canaries
from pipeline.review.estimate import (
    POWER,
    Estimate,
    Figure,
    Reviewed,
    estimate,
    fallen_recall,
    lacking_canaries,
    lacking_reviews,
    recall_at_most,
)
from pipeline.review.evidence import Evidence
from pipeline.review.thresholds import at_thresholds
from pipeline.schema import ALL

CANARIES = "canaries"


@dataclass(frozen=True, kw_only=True)
class Check:
    """``at_most``: what recall, or the share of canaries found, is at most with the confidence of this check."""

    name: str
    bound: float
    at_most: float
    labels: int
    """Cleared images that were reviewed, or canaries tested."""
    lacking: int | None
    """How many more of them a fall to twice the misses that the bound allows takes to be seen: 0 when it would have
    been; None when no number would do."""

    @property
    def broken(self) -> bool:
        return self.at_most < self.bound

    @property
    def verdict(self) -> str:
        """No alarm is said where one would have been raised by a fall, and nowhere else."""
        return "alarm" if self.broken else "no alarm" if self.lacking == 0 else "cannot be told"


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """``checks``: none where no bound is known. ``notes``: what a reader must know of the figures, a sentence each."""

    run_ids: tuple[str, ...]
    confidence: float
    estimates: dict[str, Estimate]
    canaries: dict[str, int]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    thresholds: dict[str, list[dict[str, Any]]]
    """By category what others in the last round would have found (``review/thresholds.py``)."""

    @property
    def alarm(self) -> str | None:
        """What is broken, in words."""
        broken = [
            f"{'the share of canaries found' if check.name == CANARIES else f'recall of {check.name}'} is at most "
            f"{check.at_most:.4f}, under its bound of {check.bound:g}"
            for check in self.checks
            if check.broken
        ]
        return "; ".join(broken) or None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"alarm": self.alarm}


def audit(evidence: Evidence, recall_bound: float | None, confidence: float) -> AuditResult:
    """Estimates per category and for all of them, checked against ``recall_bound`` or the plan's certificate.

    All checks together raise a false alarm in at most a share ``1 - confidence`` of the cases: each has its part of
    that (Bonferroni). Raises UsageError where reviews leave something out that the estimates stand on.
    """
    samples = {category: evidence.of_category(category) for category in evidence.categories}
    if len(evidence.categories) > 1:
        samples[ALL] = evidence.of_all()
    bounds = _bounds(evidence, recall_bound)
    canaries = count_canaries({})
    for record in evidence.records:
        for how, images in record.get("canaries", {}).items():
            canaries[how] += images
    estimates = {name: estimate(sample, confidence) for name, sample in samples.items()}
    checks = _checks({name: samples[name] for name in bounds}, bounds, canaries, confidence)
    return AuditResult(
        run_ids=tuple(record["run_id"] for record in evidence.records),
        confidence=confidence,
        estimates=estimates,
        canaries=canaries,
        checks=tuple(checks),
        notes=(*_unsure_notes(evidence), *_notes(estimates, checks)),
        thresholds=at_thresholds(evidence, confidence),
    )


def _bounds(evidence: Evidence, recall_bound: float | None) -> dict[str, float]:
    """By category, and for all of them when each has one: together they are found as well as the worst of them."""
    if recall_bound is not None:
        bounds = dict.fromkeys(evidence.categories, recall_bound)
    else:
        certificates = [record["plan"].get("certificate") or {"recall": {}} for record in evidence.records]
        bounds = certificates[0]["recall"]
        if any(certificate["recall"] != bounds for certificate in certificates):
            raise UsageError("the plans of these runs are certified for different recalls: give one as --recall-bound")
    if set(bounds) == set(evidence.categories) and len(bounds) > 1:
        bounds = bounds | {ALL: min(bounds.values())}
    return bounds


def _checks(
    samples: dict[str, Reviewed], bounds: dict[str, float], canaries: dict[str, int], confidence: float
) -> list[Check]:
    tested = canaries["found"] + canaries["missed"]
    count = len(samples) + bool(bounds and tested)
    each = 1 - (1 - confidence) / max(1, count)
    checks = [
        Check(
            name=name, bound=bounds[name], at_most=recall_at_most(sample, each), labels=sample.audited_reviewed,
            lacking=lacking_reviews(sample, bounds[name], each),
        )
        for name, sample in samples.items()
    ]  # fmt: skip
    if bounds and tested:
        at_most = interval(canaries["found"], tested, 2 * each - 1)[1]
        bound = min(bounds.values())
        lacking = lacking_canaries(tested, bound, each)
        checks.append(Check(name=CANARIES, bound=bound, at_most=at_most, labels=tested, lacking=lacking))
    return checks


def _notes(estimates: dict[str, Estimate], checks: list[Check]) -> list[str]:
    notes = []
    for name, found in estimates.items():
        if found.flagged_reviewed < found.flagged:
            notes.append(
                f"{name}: {found.flagged_reviewed:,} of {found.flagged:,} flagged were reviewed; what was found is "
                "scaled up from them, as if they had been chosen at random"
            )
    if not checks:
        notes.append(
            "no recall was certified, so there is nothing to raise an alarm about: give --recall-bound, or a "
            "plan with a certificate"
        )
    return notes + [_power_note(check) for check in checks if check.verdict == "cannot be told"]


def _unsure_notes(evidence: Evidence) -> Iterator[str]:
    """What overrules an opinion is one of its kind or of a higher one: after an appeal no second opinion does."""
    whole = sum(evidence.unsure.values())
    appealed = evidence.unsure.get("appeal", 0)
    page = f"jobs.review --run-id {' '.join(record['run_id'] for record in evidence.records)} --kind"
    ways = [
        f"{way} settles {images:,} of them ({page} {kind})"
        for way, kind, images in (
            ("a second opinion", "second", whole - appealed),
            ("another appeal review", "appeal", appealed),
        )
        if images
    ]
    if whole:
        yield (
            f"{whole:,} images were reviewed and left unsure: they count as not reviewed, although they are no random "
            f"part; {', '.join(ways)}, by somebody who has not judged them"
        )


def _power_note(check: Check) -> str:
    """What it takes to tell, where this does not."""
    canaries = check.name == CANARIES
    what, labels = ("the share found", "canaries") if canaries else ("recall", "reviewed cleared images")
    told = f"{check.name}: whether {what} is below {check.bound:g} cannot be told from {check.labels:,} {labels}"
    fall = f"a fall to {fallen_recall(check.bound):.4g}"
    together = "audit several runs together (--run-id A B)"
    if check.lacking is None:
        why = "the bound leaves no room for a fall" if canaries else f"too few images are violating for {fall}"
        return f"{told}, nor from more: {why} to be seen with a power of {POWER:g}; {together}"
    more = f"{check.lacking:,} more" + ("" if canaries else ", drawn evenly")
    remedy = "add canaries" if canaries else "raise the plan's audit rate"
    return f"{told}: {fall} would be seen with a power of {POWER:g} with {more}; {remedy}, or {together}"


def audit_table(result: AuditResult) -> Table:
    """For people."""
    title = f"audit of {', '.join(result.run_ids)}, intervals at {100 * result.confidence:g} %"
    table = Table(title=title, title_justify="left")
    for column in ("", "estimated", "interval", "reviewed"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in result.estimates.items():
        flagged = f"{found.flagged_reviewed:,} of {found.flagged:,} flagged"
        drawn = f"{found.audited_reviewed:,} of {found.audited:,} drawn"
        table.add_row(name, "", "", "")
        table.add_row("  recall", *_shares(found.recall), f"{found.violating_reviewed:,} violating")
        table.add_row("  false omission rate", *_shares(found.false_omission_rate), drawn)
        table.add_row("  prevalence", *_shares(found.prevalence), "")
        table.add_row(
            "  violating, flagged", *_counts(found.found), f"{flagged}, {found.flagged_violating:,} violating"
        )
        table.add_row("  violating, missed", *_counts(found.missed), f"{drawn}, {found.misses_seen:,} violating")
        for stage, missed in found.missed_by_stage.items():
            table.add_row(f"    cleared by {stage}", *_counts(missed), "")
        table.add_section()
    if any(result.canaries.values()):
        tested = result.canaries["found"] + result.canaries["missed"]
        found_of = interval(result.canaries["found"], tested, result.confidence)
        counts = f"{result.canaries['found']:,} of {tested:,} tested"
        failed = f"{result.canaries['failed']:,} failed"
        table.add_row("canaries found", counts, f"{found_of[0]:.4f} to {found_of[1]:.4f}", failed)
    for check in result.checks:
        more = f", {check.lacking:,} more wanted" if check.lacking else ""
        labels = f"{check.labels:,} labels{more}"
        table.add_row(f"bound of {check.name}: {check.bound:g}", check.verdict, f"at most {check.at_most:.4f}", labels)
    return table


def thresholds_table(result: AuditResult) -> Table:
    """For people: the present thresholds and others, by category."""
    table = Table(title="what other thresholds in the last round would change", title_justify="left")
    columns = "threshold", "flagged", "recall, estimated", "interval", "false positives, estimated", "interval"
    for column in columns:
        table.add_column(column, justify="left" if column == "threshold" else "right")
    for category, rows in result.thresholds.items():
        table.add_row(category, *[""] * 5)
        for row in rows:
            recall, false = Figure(**row["recall"]), Figure(**row["false_positives"])
            name = f"  {row['threshold']:.10g} ({row['change']})"
            table.add_row(name, _flagged(row), *_shares(recall), *_counts(false))
        table.add_section()
    return table


def _flagged(row: dict[str, Any]) -> str:
    if row["flagged"] is None:
        return "unknown"
    return f"{row['flagged']:,.0f} {'counted' if row['counted'] else 'estimated'}"


def _shares(figure: Figure) -> tuple[str, str]:
    low, high = figure.interval
    return "unknown" if figure.value is None else f"{figure.value:.6f}", f"{low:.6f} to {high:.6f}"


def _counts(figure: Figure) -> tuple[str, str]:
    """What was counted has no interval."""
    low, high = figure.interval
    if figure.value is not None and low == high:
        return f"{figure.value:,.0f} counted", ""
    return "unknown" if figure.value is None else f"{figure.value:,.1f}", f"{low:,.1f} to {high:,.1f}"
