"""From reviews of flagged images, and of cleared ones drawn at random, to recall with an interval.

Shapes: F flagged images (or rows of one category), A rows of the audit table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, chi2

from models.intervals import Weighted, interval, weighted_count_interval, weighted_share_interval
from pipeline.errors import UsageError

NOT_REVIEWED = -1
POWER = 0.8
"""Share of the cases in which a fall of recall is to be seen."""
MOST_CANARIES = 10_000


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An estimate, None where there is nothing to make it of, with its interval."""

    value: float | None
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Reviewed:
    """What is known of one category, or of all of them. Labels are 1 violating, 0 not, or NOT_REVIEWED.

    Of flagged rows, and of drawn ones of the same probability, those reviewed are taken to be a random part.
    """

    name: str
    """The category, for messages."""
    flagged_F: np.ndarray
    audited_A: np.ndarray
    probability_A: np.ndarray
    """With which each row was drawn."""
    stage_A: np.ndarray
    """Which stage cleared it."""
    cleared: int
    """Images, drawn or not."""
    rates: tuple[float, ...]
    """Probabilities that a cleared image could have had: rare ones may be in no row."""

    @property
    def flagged_reviewed(self) -> int:
        return int((self.flagged_F != NOT_REVIEWED).sum())

    @property
    def flagged_violating(self) -> int:
        return int((self.flagged_F == 1).sum())

    @property
    def audited_reviewed(self) -> int:
        return int((self.audited_A != NOT_REVIEWED).sum())

    @property
    def misses_known(self) -> bool:
        """Whether somebody has looked at anything that was cleared, or nothing was."""
        return not self.cleared or self.audited_reviewed > 0

    @property
    def missed_A(self) -> np.ndarray:
        """Which rows are misses."""
        return self.audited_A == 1

    def weights(self) -> dict[float, float]:
        """For how many cleared images a reviewed row stands, by the probability with which it was drawn."""
        weights = {}
        for rate in sorted({*self.rates, *self.probability_A.tolist()}):
            labels = self.audited_A[self.probability_A == rate]
            reviewed = int((labels != NOT_REVIEWED).sum())
            if len(labels) and not reviewed:
                raise UsageError(
                    f"{self.name}: of {len(labels):,} cleared images drawn with probability {rate:g} none was "
                    "reviewed, so nothing can be said of what they stand for: review some of them, chosen at random"
                )
            weights[rate] = len(labels) / reviewed / rate if len(labels) else 1 / rate
        return weights


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Recall is found / (found + missed). Intervals hold for what the plan does on images like these.

    A miss that was seen counts one over the probability of seeing it (Horvitz and Thompson, Journal of the American
    Statistical Association 47, 1952).
    """

    flagged: int
    flagged_reviewed: int
    flagged_violating: int
    """Of those."""
    cleared: int
    audited: int
    audited_reviewed: int
    misses_seen: int
    """Violating ones among those."""
    found: Figure
    """Violating images among the flagged: exact when all were reviewed."""
    missed: Figure
    """Violating images among the cleared. No value where none of them was reviewed: then nobody knows."""
    recall: Figure
    false_omission_rate: Figure
    """Missed among the cleared."""
    prevalence: Figure
    """Violating images among those flagged or cleared."""
    missed_by_stage: dict[str, Figure]

    @property
    def violating_reviewed(self) -> int:
        """What recall rests on."""
        return self.flagged_violating + self.misses_seen


def estimate(reviewed: Reviewed, confidence: float) -> Estimate:
    """Two-sided intervals. Raises UsageError when no review covers the flagged, or what some of the drawn stand for."""
    found, missed = _found_weights(reviewed), _missed_weights(reviewed)
    judged = reviewed.cleared + len(reviewed.flagged_F)
    violating = Weighted(
        weights=np.concatenate([found.weights, missed.weights]), largest=max(found.largest, missed.largest)
    )
    missed_stage_M = reviewed.stage_A[reviewed.missed_A]
    stages = sorted(set(reviewed.stage_A.tolist()))
    return Estimate(
        flagged=len(reviewed.flagged_F),
        flagged_reviewed=reviewed.flagged_reviewed,
        flagged_violating=reviewed.flagged_violating,
        cleared=reviewed.cleared,
        audited=len(reviewed.audited_A),
        audited_reviewed=reviewed.audited_reviewed,
        misses_seen=int(reviewed.missed_A.sum()),
        found=_found(reviewed, confidence),
        missed=_known(reviewed, _count(missed, reviewed.cleared, confidence)),
        recall=_known(reviewed, _recall(found, missed, confidence)),
        false_omission_rate=_known(reviewed, _share(_count(missed, reviewed.cleared, confidence), reviewed.cleared)),
        prevalence=_known(reviewed, _share(_count(violating, judged, confidence), judged)),
        missed_by_stage={
            stage: _count(_of_stage(missed, missed_stage_M == stage), reviewed.cleared, confidence) for stage in stages
        },
    )


def recall_at_most(reviewed: Reviewed, confidence: float) -> float:
    """The upper limit of a one-sided interval for recall."""
    return _recall(_found_weights(reviewed), _missed_weights(reviewed), 2 * confidence - 1).interval[1]


def _missed_weights(reviewed: Reviewed) -> Weighted:
    weights = reviewed.weights()
    weight_A = np.array([weights[rate] for rate in reviewed.probability_A.tolist()])
    return Weighted(weights=weight_A[reviewed.missed_A], largest=max(weights.values()))


def _found_weights(reviewed: Reviewed) -> Weighted:
    """A violating flagged image stands for those that were not reviewed, too."""
    flagged, seen = len(reviewed.flagged_F), reviewed.flagged_reviewed
    if flagged and not seen:
        raise UsageError(
            f"{reviewed.name}: of {flagged:,} flagged none was reviewed, so nothing can be said of what was found: "
            "review some of them, chosen at random"
        )
    weight = flagged / seen if flagged else 1.0
    return Weighted(weights=np.full(reviewed.flagged_violating, weight), largest=weight)


def _found(reviewed: Reviewed, confidence: float) -> Figure:
    """Scaled up from those that were reviewed."""
    flagged, seen, violating = len(reviewed.flagged_F), reviewed.flagged_reviewed, reviewed.flagged_violating
    if seen == flagged:
        return Figure(value=violating, interval=(violating, violating))
    low, high = interval(violating, seen, confidence)
    limits = max(violating, flagged * low), min(flagged - seen + violating, flagged * high)
    return Figure(value=flagged * violating / seen, interval=limits)


def _of_stage(missed: Weighted, which_M: np.ndarray) -> Weighted:
    return Weighted(weights=missed.weights[which_M], largest=missed.largest)


def _known(reviewed: Reviewed, figure: Figure) -> Figure:
    """A figure that rests on what was missed: without a value where nobody knows that."""
    return figure if reviewed.misses_known else Figure(value=None, interval=figure.interval)


def _count(events: Weighted, most: int, confidence: float) -> Figure:
    low, high = weighted_count_interval(events, confidence)
    return Figure(value=min(events.total, most), interval=(min(low, most), min(high, most)))


def _recall(found: Weighted, missed: Weighted, confidence: float) -> Figure:
    violating = found.total + missed.total
    return Figure(
        value=found.total / violating if violating else None,
        interval=weighted_share_interval(found, missed, confidence),
    )


def _share(part: Figure, whole: int) -> Figure:
    if part.value is None or not whole:
        return Figure(value=None, interval=(0.0, 1.0))
    low, high = part.interval
    return Figure(value=part.value / whole, interval=(low / whole, high / whole))


def fallen_recall(bound: float) -> float:
    """Where twice as many are missed as the bound allows."""
    return max(0.0, 2 * bound - 1)


def share_to_review(violating: float, bound: float, confidence: float) -> float | None:
    """Share of the cleared images to review, drawn evenly, to raise the alarm at a fallen recall with ``POWER``.

    The number m of misses seen is a Poisson count. It raises the alarm when its lower limit, which is
    chi2(1 - confidence; 2m) / 2 (Garwood, 1936), is above what the bound allows. At least m are seen with that power
    when chi2(POWER; 2m) / 2 are expected. None when not even a review of all of them would do.
    """
    fallen = fallen_recall(bound)
    missed = violating * (1 - fallen)
    allowed = violating * fallen * (1 - bound) / bound if bound else math.inf
    for seen in range(1, max(1, int(missed)) + 1):
        expected = chi2.ppf(POWER, 2 * seen) / 2
        if expected > missed:
            break
        if chi2.ppf(1 - confidence, 2 * seen) / 2 > allowed * expected / missed:
            return float(expected / missed)
    return None


def lacking_reviews(reviewed: Reviewed, bound: float, confidence: float) -> int | None:
    """How many more cleared images, drawn evenly, to review before a fallen recall would raise the alarm with
    ``POWER``: 0 when these would do; None when no number would, because too few images are violating."""
    found = estimate(reviewed, confidence)
    share = share_to_review(found.found.interval[1] + (found.missed.value or 0), bound, confidence)
    if share is None:
        return None
    evenly = 1 / max(reviewed.weights().values()) if reviewed.audited_reviewed else 0.0
    return max(0, math.ceil((share - evenly) * reviewed.cleared))


def lacking_canaries(tested: int, bound: float, confidence: float) -> int | None:
    """How many more canaries to test before a share found that has fallen as recall would raise the alarm with
    ``POWER``: 0 when these would do; None when MOST_CANARIES would not.

    As many as k found raise it when Clopper and Pearson's upper limit is below the bound, which is when so few would be
    found with a probability under ``1 - confidence`` if the share were at the bound.
    """
    canaries = np.arange(max(1, tested), MOST_CANARIES)
    most_found = binom.ppf(1 - confidence, canaries, bound) - 1
    seen = binom.cdf(most_found, canaries, fallen_recall(bound)) >= POWER
    return int(canaries[seen.argmax()]) - tested if seen.any() else None
