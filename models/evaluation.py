"""How good a net is at each group size, with intervals that own up to the number of positives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.group_net import GroupNet
from models.intervals import interval
from models.training import Examples, host, host_positives, score_groups, whole_groups


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
    halves = _halves(examples, rng)
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


def check_measurable(examples: Examples, group_sizes: Sequence[int], seed: int) -> None:
    """Raises ValueError when a half of ``measure`` lacks a positive or, for the largest group, other pictures."""
    for half in _halves(examples, np.random.default_rng(seed)):
        for category, positives in zip(examples.categories, examples.labels_NK[half].sum(axis=0), strict=True):
            if not positives or len(half) - positives < max(group_sizes):
                raise ValueError(
                    f"a half of the {len(examples.pixels_NSS3):,} pictures that measure a net has {positives:,} with "
                    f"{category} and {len(half) - positives:,} others, but needs 1 and {max(group_sizes)}: give more"
                )


def _halves(examples: Examples, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(len(examples.pixels_NSS3)), 2)


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
