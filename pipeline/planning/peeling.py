"""Against which thresholds: those of a route that cost the least and keep a share of the positives.

They are found by peeling: they begin as high as they can be without losing a positive, and then, a few positives at a
time, the step gives some up whose threshold saves the most by it. Shapes are those of ``field.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.planning.field import Draws, Field, priced

QUANTA = 12
"""In how many portions peeling gives up the positives it may."""
SLACKS = (4.0, 3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.25)
"""By how many standard deviations a threshold is tried lower where that is nearly free."""
SLACK_COST = 0.01
"""Share of the cost that all such slack together may take."""
SLACK_FPR = 0.1
"""Share of the allowed false-positive rate that it may use up."""
FOLDS = 5
"""Of the cross-fitting that foretells what a route will cost."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """Thresholds found on the search half, and how far a step of the path moves each of them (logits)."""

    thresholds_SK: np.ndarray
    scale_SK: np.ndarray

    def at(self, offset: float) -> np.ndarray:
        """All thresholds lowered together: the larger ``offset``, the more passes. Those of a screen stay."""
        return self.thresholds_SK - offset * self.scale_SK

    def offsets(self, draws: Draws, category: int) -> np.ndarray:
        """(D,): from which offset on each draw passes the whole cascade; infinity where the screen has cleared it."""
        free_S = self.scale_SK[:, category] > 0
        short_DS = self.thresholds_SK[free_S, category] - draws.logits_DS[:, free_S]
        offset_D = (short_DS / self.scale_SK[free_S, category]).max(axis=1)
        lost_D = (draws.logits_DS[:, ~free_S] < self.thresholds_SK[~free_S, category]).any(axis=1)
        return np.where(lost_D, np.inf, offset_D)


def spread_evenly(field: Field, recall_K: Sequence[float]) -> np.ndarray:
    """Thresholds (S, K) that lose as many positives in every step: no good ones, but found at once."""
    columns = []
    for draws, recall in zip(field.draws, recall_K, strict=True):
        share = (1 - recall) / field.free_S.sum()
        logits_DS = np.where(np.isneginf(draws.logits_DS), np.nan, draws.logits_DS)
        columns.append(np.nanquantile(logits_DS, share, axis=0, method="lower"))
    thresholds_SK = np.stack(columns, axis=1)
    if field.route.screen_logits_K is not None:
        thresholds_SK[0] = field.route.screen_logits_K
    return thresholds_SK


def peel(field: Field, recall_K: Sequence[float], max_fpr: float) -> Shape | None:
    """Thresholds that keep ``recall_K`` of the search half's positives; None when the screen has lost too many."""
    return _Peeling(field, field.draws, recall_K, max_fpr).run()


def cross_fitted(field: Field, recall_K: Sequence[float], max_fpr: float) -> list[np.ndarray] | None:
    """Per category the offset (D,) that each draw needs when the shape was found without its picture.

    They say what a path will have to give up on positives it has not seen, which the shape's own positives cannot.
    """
    offsets = [np.empty(len(draws.cluster_D)) for draws in field.draws]
    folds = [np.unique(draws.cluster_D, return_inverse=True)[1] % FOLDS for draws in field.draws]
    for fold in range(FOLDS):
        rest = [draws.part(mine != fold) for draws, mine in zip(field.draws, folds, strict=True)]
        shape = _Peeling(field, rest, recall_K, max_fpr).run()
        if shape is None:
            return None
        for category, (draws, mine) in enumerate(zip(field.draws, folds, strict=True)):
            offsets[category][mine == fold] = shape.offsets(draws.part(mine == fold), category)
    return offsets


class _Peeling:
    def __init__(self, field: Field, draws: Sequence[Draws], recall_K: Sequence[float], max_fpr: float) -> None:
        self.field, self.draws, self.max_fpr = field, draws, max_fpr
        self.kept: list[np.ndarray] = [np.isfinite(mine.logits_DS).all(axis=1) for mine in draws]
        self.left_K = [
            1 - recall - mine.weight_D[~kept].sum()
            for recall, mine, kept in zip(recall_K, draws, self.kept, strict=True)
        ]
        self.quantum_K = [left / QUANTA for left in self.left_K]

    def run(self) -> Shape | None:
        if min(self.left_K) < -1e-9 or not all(kept.any() for kept in self.kept):
            return None
        lowest_SK = self._tight(self.kept)
        objective = self._objective(lowest_SK)
        while True:
            best = None
            for category, kept, lost in self._moves():
                trial_SK = lowest_SK.copy()
                trial_SK[:, category] = self._tight_of(category, kept)
                gain = (objective - self._objective(trial_SK)) / lost
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, category, kept, lost, trial_SK)
            if best is None:
                break
            _, category, self.kept[category], lost, lowest_SK = best
            self.left_K[category] -= lost
            objective = self._objective(lowest_SK)
        scale_SK = self._scale()
        return Shape(thresholds_SK=self._slackened(lowest_SK, scale_SK), scale_SK=scale_SK)

    def _slackened(self, thresholds_SK: np.ndarray, scale_SK: np.ndarray) -> np.ndarray:
        """Lower where that costs nearly nothing, the last steps first.

        All thresholds of a path come down together: a positive that one test hardly sees would take the others with
        it, although that test, near the end, decides over a few images only.
        """
        before = self.field.spend(thresholds_SK)
        for step in reversed(np.flatnonzero(self.field.free_S)):
            for slack in SLACKS:
                trial_SK = thresholds_SK.copy()
                trial_SK[step] -= slack * scale_SK[step]
                spent = self.field.spend(trial_SK)
                rate = max(before.false_positive_rate, SLACK_FPR * self.max_fpr)
                if spent.cost <= (1 + SLACK_COST) * before.cost and spent.false_positive_rate <= rate:
                    thresholds_SK = trial_SK
                    break
        return thresholds_SK

    def _moves(self) -> Iterator[tuple[int, np.ndarray, float]]:
        """Giving up the lowest draws of one step: (category, draws kept then, weight lost)."""
        for category, draws in enumerate(self.draws):
            rows = np.flatnonzero(self.kept[category])
            for step in np.flatnonzero(self.field.free_S):
                order = rows[np.argsort(draws.logits_DS[rows, step], kind="stable")]
                lost_D = np.cumsum(draws.weight_D[order])
                count = max(1, int(np.searchsorted(lost_D, self.quantum_K[category] + 1e-9)))
                if count >= len(order) or lost_D[count - 1] > self.left_K[category] + 1e-9:
                    continue
                kept = self.kept[category].copy()
                kept[order[:count]] = False
                yield category, kept, float(lost_D[count - 1])

    def _tight(self, kept: list[np.ndarray]) -> np.ndarray:
        return np.stack([self._tight_of(k, mask) for k, mask in enumerate(kept)], axis=1)

    def _tight_of(self, category: int, kept: np.ndarray) -> np.ndarray:
        """The highest thresholds that lose none of these; a screen's are given."""
        thresholds_S = self.draws[category].logits_DS[kept].min(axis=0)
        screen_K = self.field.route.screen_logits_K
        if screen_K is not None:
            thresholds_S[0] = screen_K[category]
        return thresholds_S

    def _scale(self) -> np.ndarray:
        """How widely the positives' logits are spread: what one step of the path means at each test."""
        scale_SK = np.stack(
            [np.std(draws.logits_DS[np.isfinite(draws.logits_DS).all(axis=1)], axis=0) for draws in self.draws],
            axis=1,
        )
        return np.where(self.field.free_S[:, None], np.maximum(scale_SK, 0.1), 0.0)

    def _objective(self, thresholds_SK: np.ndarray) -> float:
        spent = self.field.spend(thresholds_SK)
        return priced(spent.cost, spent.false_positive_rate, self.max_fpr)
