"""Simulated nights of scanning, drawing and reviewing, for the audit's estimator: no picture, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from pipeline.review.estimate import NOT_REVIEWED, Reviewed

STAGES = np.array(["screen", "single"], object)


@dataclass(frozen=True, kw_only=True)
class World:
    """What a night brings. ``near_misses``: share of the misses whose score came near a threshold."""

    recall: float
    images: int = 1_000_000
    prevalence: float = 0.0005
    near_misses: float = 0.7
    near_images: float = 0.03
    false_positives: int = 400
    rates: tuple[float, float] = (0.001, 0.01)
    reviewed: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Night:
    reviews: Reviewed
    found: int
    missed: int


def night(world: World, rng: np.random.Generator) -> Night:
    violating = rng.poisson(world.images * world.prevalence)
    found = rng.binomial(violating, world.recall)
    missed = violating - found
    cleared = world.images - found - world.false_positives
    near_missed = rng.binomial(missed, world.near_misses)
    labels, probabilities = [], []
    near_others = int(cleared * world.near_images)
    for rate, misses, others in zip(
        world.rates,
        (missed - near_missed, near_missed),
        (cleared - near_others - missed + near_missed, near_others - near_missed),
        strict=True,
    ):
        drawn = [rng.binomial(misses, rate), rng.binomial(others, rate)]
        labels.append(np.repeat([1, 0], drawn))
        probabilities.append(np.full(sum(drawn), rate))
    audited = np.concatenate(labels)
    reviews = Reviewed(
        name="a",
        flagged_F=_review(np.repeat([1, 0], [found, world.false_positives]), world.reviewed, rng),
        audited_A=_review(audited, world.reviewed, rng),
        probability_A=np.concatenate(probabilities),
        stage_A=STAGES[rng.integers(0, 2, len(audited))],
        cleared=cleared,
        rates=world.rates,
    )
    return Night(reviews=reviews, found=found, missed=missed)


def _review(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(len(labels)) < share, labels, NOT_REVIEWED)


def pooled(nights: list[Night]) -> Night:
    """Several nights audited together."""
    return reduce(_join, nights)


def _join(first: Night, second: Night) -> Night:
    one, two = first.reviews, second.reviews
    reviews = Reviewed(
        name=one.name,
        flagged_F=np.concatenate([one.flagged_F, two.flagged_F]),
        audited_A=np.concatenate([one.audited_A, two.audited_A]),
        probability_A=np.concatenate([one.probability_A, two.probability_A]),
        stage_A=np.concatenate([one.stage_A, two.stage_A]),
        cleared=one.cleared + two.cleared,
        rates=one.rates,
    )
    return Night(reviews=reviews, found=first.found + second.found, missed=first.missed + second.missed)
