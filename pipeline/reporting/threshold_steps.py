"""Which thresholds are tried beside the present one: steps in log-odds, in as few digits as tell them apart."""

from __future__ import annotations

import math

STEPS = (-2.0, -1.0, 1.0, 2.0)
"""In log-odds from the present threshold: 1 is a factor of 2.7 in the odds."""
EDGE = 1e-6
"""Thresholds nearer to 0 or 1 have no steps beyond them."""


def steps(threshold: float) -> list[tuple[float, float]]:
    """Step and threshold, the laxest first. At an end there are none beyond it."""
    inside = min(1 - EDGE, max(EDGE, threshold))
    odds = math.log(inside / (1 - inside))
    moved = [(step, 1 / (1 + math.exp(-odds - step))) for step in STEPS]
    return [(step, limit) for step, limit in moved if (limit > threshold) == (step > 0)]


def short(threshold: float, present: float) -> float:
    """As few digits as tell it from the present one: what a page shows is what was counted, and a plan can say it."""
    for digits in range(3, 12):
        rounded = round(threshold, digits - math.floor(math.log10(min(threshold, 1 - threshold) or EDGE)) - 1)
        if abs(rounded - threshold) <= abs(threshold - present) / 20 and 0 < rounded < 1:
            return rounded
    return threshold
