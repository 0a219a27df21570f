"""What labelled positives prove about recall, and how uncertain prevalence spreads a cost.

A plan's recall on unseen images is the chance that a random violating one passes every test of the whole cascade.
Each unique positive of the certifying half is one draw from that: it passed or it did not. The thresholds move
together along one path, by a common offset: from those that let everything pass to ever stricter ones. Every point of
the path is the hypothesis that recall there is too low. Tested in this order, each at the full level, until one is not
rejected, the chance of a false certificate anywhere on the path stays below one minus the confidence: fixed-sequence
testing, as in Angelopoulos, Bates, Candes, Jordan and Lei, Learn then Test (2021), with exact binomial p-values.

Shapes: P unique positives, K categories, Q nodes of a distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, binom


def positives_needed(recall: float, confidence: float, misses: int = 0) -> int:
    """The fewest unique positives that certify ``recall`` when ``misses`` of them are missed."""
    if not 0 < recall < 1 or not 0 < confidence < 1:
        raise ValueError(f"recall {recall} and confidence {confidence} must both lie between 0 and 1")
    if misses == 0:
        return math.ceil(math.log(1 - confidence) / math.log(recall) - 1e-9)
    low, high = misses, 2
    while _p_value(high, misses, recall) > 1 - confidence:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _p_value(middle, misses, recall) <= 1 - confidence else (middle, high)
    return high


def misses_allowed(positives: int, recall: float, confidence: float) -> int:
    """How many of ``positives`` may be missed when ``recall`` is to be certified; -1 when even none is too many."""
    misses = int(binom.ppf(1 - confidence, positives, 1 - recall))
    while misses >= 0 and _p_value(positives, misses, recall) > 1 - confidence:
        misses -= 1
    return misses


def _p_value(positives: int, misses: int, recall: float) -> float:
    """Chance of so few misses if recall were no better than ``recall``."""
    return float(binom.cdf(misses, positives, 1 - recall))


def recall_bound(positives: int, misses: int, confidence: float) -> float:
    """The highest recall that ``misses`` of ``positives`` certify: Clopper and Pearson's one-sided bound."""
    if misses >= positives:
        return 0.0
    return float(beta.ppf(1 - confidence, positives - misses, misses + 1))


def certified_offset(offsets: Sequence[np.ndarray], recall_K: Sequence[float], confidence: float) -> float | None:
    """The smallest offset that is certified to keep the recall of every category; None when none is.

    ``offsets``: per category, of each unique positive from which offset on it passes (P,), infinity for never. Every
    offset is a hypothesis; walking down from infinity, the last one at which no category misses more than it may.
    That recall is too low in *some* category is rejected there without further correction, because each category's
    own test rejects. With one category this is Wilks' tolerance bound, an order statistic.
    """
    smallest = -math.inf
    for offset_P, recall in zip(offsets, recall_K, strict=True):
        misses = misses_allowed(len(offset_P), recall, confidence)
        if misses < 0:
            return None
        smallest = max(smallest, float(np.sort(offset_P)[::-1][misses]))
    return smallest if math.isfinite(smallest) else None


def highest_keeping(scores: np.ndarray, share: float) -> float:
    """The highest threshold that at least ``share`` of the scores reach."""
    ordered = np.sort(scores)
    # 0.05 * 20 must give 1, although 1 - 0.95 is a little more than 0.05 and other shares a little less.
    return float(ordered[min(len(ordered) - 1, int((1 - share) * len(ordered) + 1e-9))])


@dataclass(frozen=True, kw_only=True)
class Prevalence:
    """How common violating images are: a Beta distribution, as ``images`` reviewed ones would leave it.

    ``mean_K``: share of the images by category. The Beta is of their sum; how categories share it is taken as known.
    """

    mean_K: tuple[float, ...]
    images: float

    def __post_init__(self) -> None:
        if not all(mean > 0 for mean in self.mean_K) or self.total >= 1:
            raise ValueError(f"prevalences are {list(self.mean_K)}: each must be above 0, and their sum below 1")
        if self.images <= 0:
            raise ValueError(f"the prevalence rests on {self.images} images, but it must be more than 0")

    @property
    def total(self) -> float:
        return float(sum(self.mean_K))

    @property
    def shares_K(self) -> np.ndarray:
        return np.asarray(self.mean_K) / self.total

    def quantile(self, share: float) -> float:
        return float(beta.ppf(share, self.total * self.images, (1 - self.total) * self.images))

    def nodes(self, count: int = 64) -> np.ndarray:
        """Values (Q,) of equal weight: the middle quantiles of as many slices of the distribution."""
        slices = (np.arange(count) + 0.5) / count
        return beta.ppf(slices, self.total * self.images, (1 - self.total) * self.images)
