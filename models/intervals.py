"""Intervals that own up to the number of what was seen: for shares, for weighted counts, for ratios of these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, fdtri, gammaincinv


def interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval for a share.

    ``successes`` may be fractional: the mean over re-drawn companions of ``trials`` unique positives,
    which are the sample; their re-drawn hosts are not.
    """
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if successes <= 0 else float(betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes >= trials else float(betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Events that were seen, each with a weight: one over the probability with which it is seen.

    ``largest``: the weight that any event could have had. Events of one weight are a Poisson count.
    """

    weights: np.ndarray
    largest: float

    @property
    def total(self) -> float:
        return float(self.weights.sum())

    def low(self) -> tuple[float, float]:
        """Mean and degrees of freedom of the gamma law behind a lower limit."""
        return self.total, _freedom(self.total, float(np.square(self.weights).sum()))

    def high(self) -> tuple[float, float]:
        """The same behind an upper limit: with one event more, of the largest weight, so that it holds without any."""
        total = self.total + self.largest
        return total, _freedom(total, float(np.square(self.weights).sum()) + self.largest**2)


def _freedom(total: float, variance: float) -> float:
    return 2 * total**2 / variance if variance else 0.0


def weighted_count_interval(events: Weighted, confidence: float = 0.95) -> tuple[float, float]:
    """Fay and Feuer's gamma interval for what the sum of weights estimates (Statistics in Medicine 16, 1997, 791-801).

    With equal weights it is Garwood's exact interval.
    """
    tail = (1 - confidence) / 2
    (low, low_freedom), (high, high_freedom) = events.low(), events.high()
    return (
        low / low_freedom * _chi2_quantile(tail, low_freedom) if low else 0.0,
        high / high_freedom * _chi2_quantile(1 - tail, high_freedom) if high else 0.0,
    )


def _chi2_quantile(share: float, freedom: float) -> float:
    # Of scipy.special alone: scipy.stats takes a second to import, in every scan.
    return 2 * float(gammaincinv(freedom / 2, share))


def weighted_share_interval(part: Weighted, rest: Weighted, confidence: float = 0.95) -> tuple[float, float]:
    """For part / (part + rest), from Fay's interval for the ratio of two such sums (Communications in Statistics,
    Theory and Methods 28, 1999, 2141-2160): an F law, the ratio of the two gamma laws.

    With all weights 1 it is Clopper and Pearson's exact interval.
    """
    tail = (1 - confidence) / 2
    return _share_limit(part.low(), rest.high(), 1 - tail), _share_limit(part.high(), rest.low(), tail)


def _share_limit(part: tuple[float, float], rest: tuple[float, float], quantile: float) -> float:
    """Of the share when the rest is at this quantile in proportion to the part."""
    if not part[0] or not rest[0]:
        return 0.0 if rest[0] else 1.0
    ratio = rest[0] / part[0] * float(fdtri(rest[1], part[1], quantile))
    return 1 / (1 + ratio)
