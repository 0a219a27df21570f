"""How good a net is at each group size, with intervals that own up to the number of positives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv, fdtri, gammaincinv

from models.group_net import GroupNet
from models.training import Examples, host, host_positives, score_groups, whole_groups


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


def recall_at(
    net: GroupNet, examples: Examples, *, false_positive_rate: float, seed: int, images: int = 2000
) -> dict[int, float]:
    """By group size, the mean recall over categories at a false positive rate: a glance during training.

    On at most ``images`` pictures a group size. Groups without any category are what may be falsely
    positive; where every picture shows one, pictures without the category in question are.
    """
    recalls = {}
    for size in net.group_sizes:
        rng = np.random.default_rng(seed)
        shown = []
        for column, labels_N in enumerate(examples.labels_NK.T):
            positives = rng.permutation(np.flatnonzero(labels_N))[: images // 2 // size]
            clean = ~examples.labels_NK.any(axis=1)
            negatives = rng.permutation(np.flatnonzero(clean if clean.any() else ~labels_N))[: images // 2]
            hosted = host(positives, negatives, size, rng)
            clean_G, hosted_G = (
                score_groups(net, examples.pixels_NSS3, members_GM)[:, column]
                for members_GM in (whole_groups(negatives, size), hosted)
            )
            shown.append(float((hosted_G > np.quantile(clean_G, 1 - false_positive_rate)).mean()))
        recalls[size] = float(np.mean(shown))
    return recalls


def measure(
    net: GroupNet, examples: Examples, *, target_recall: float, redraws: int, seed: int
) -> list[dict[str, Any]]:
    """For each group size a threshold fitted on one half of the pictures, judged on the other half.

    The threshold is the highest that keeps ``target_recall`` of the first half's positives, each
    hosted by ``redraws`` draws of pictures without the category. A row per group size and category.
    """
    rng = np.random.default_rng(seed)
    halves = np.array_split(rng.permutation(len(examples.pixels_NSS3)), 2)
    rows = []
    for size in net.group_sizes:
        for column, category in enumerate(examples.categories):
            scores = [_hosted_scores(net, examples, column, half, size, redraws, rng) for half in halves]
            threshold = float(np.quantile(scores[0][0], 1 - target_recall, method="lower"))
            hosted_PR, without_G = scores[1]
            recall = float((hosted_PR >= threshold).mean(axis=1).sum())
            false_positives = int((without_G >= threshold).sum())
            rows.append(
                {
                    "group_size": size,
                    "category": category,
                    "threshold": threshold,
                    "positives": len(hosted_PR),
                    "redraws": redraws if size > 1 else 1,
                    "recall": recall / len(hosted_PR),
                    "recall_interval": interval(recall, len(hosted_PR)),
                    "negative_groups": len(without_G),
                    "false_positive_rate": false_positives / len(without_G),
                    "false_positive_rate_interval": interval(false_positives, len(without_G)),
                }
            )
    return rows


def _hosted_scores(
    net: GroupNet, examples: Examples, column: int, half: np.ndarray, size: int, redraws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (positives, redraws) of hosted positives and (groups,) of groups without one."""
    labels = examples.labels_NK[half, column]
    hosted, without = host_positives(labels, size, redraws if size > 1 else 1, rng)
    hosted_scores = score_groups(net, examples.pixels_NSS3, half[hosted])[:, column]
    # host_positives lists all positives once per redraw.
    hosted_PR = hosted_scores.reshape(-1, int(labels.sum())).T
    return hosted_PR, score_groups(net, examples.pixels_NSS3, half[without])[:, column]
