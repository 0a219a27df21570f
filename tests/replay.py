"""What a sequence of tests does on images whose groups have been scored: what the planner's estimates are held against.

It counts tests as a scan makes them, where ``planning/field.py`` weighs places by how often they occur. An image goes
on from a step when its group is positive there; what every step finds positive is flagged.

Shapes: A places where an image stands among companions (one image may stand at several, with others), G groups of
one test, K categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One test on every group of an arrangement: which group each place is in, and what the groups scored."""

    group_A: np.ndarray
    scores_GK: np.ndarray

    @staticmethod
    def consecutive(size: int, scores_GK: np.ndarray) -> Scored:
        """Groups of consecutive places."""
        return Scored(group_A=np.arange(len(scores_GK) * size) // size, scores_GK=scores_GK)

    def positive_A(self, thresholds: Sequence[float]) -> np.ndarray:
        """Whether the group at each place reaches the threshold of any category."""
        positive_G = np.any(self.scores_GK >= np.asarray(thresholds), axis=1)
        return positive_G[self.group_A]

    def groups_of(self, left_A: np.ndarray) -> np.ndarray:
        """Groups that are tested when these places are left. Raises ValueError when a group is left in part."""
        left_G = np.bincount(self.group_A[left_A], minlength=len(self.scores_GK))
        size_G = np.bincount(self.group_A, minlength=len(self.scores_GK))
        broken = np.flatnonzero((left_G > 0) & (left_G < size_G))
        if broken.size:
            raise ValueError(
                f"group {broken[0]} has lost {size_G[broken[0]] - left_G[broken[0]]} of its {size_G[broken[0]]} "
                "members before it is tested: its score is that of another group"
            )
        return np.flatnonzero(left_G)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One round. With several ``tests`` all of them are done at once, and what is positive in all of them goes on."""

    tests: tuple[str, ...]
    thresholds: tuple[float, ...]
    """One a category, the same in every test."""
    gmac: tuple[float, ...]
    """Of one group in each test; what an earlier step has kept for it is not in it."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    images_in: int
    tests: int
    gmac: float
    images_out: int


@dataclass(frozen=True, kw_only=True)
class Replayed:
    steps: tuple[StepDone, ...]
    flagged_A: np.ndarray

    @property
    def gmac(self) -> float:
        return sum(step.gmac for step in self.steps)


def replay(scored: Mapping[str, Scored], steps: Sequence[Step]) -> Replayed:
    """Runs the steps one after the other. Raises ValueError when the groups of one do not split those before it."""
    left_A = np.ones(len(next(iter(scored.values())).group_A), dtype=bool)
    done = []
    for step in steps:
        tests, gmac = 0, 0.0
        positive_A = left_A
        for name, cost in zip(step.tests, step.gmac, strict=True):
            groups = len(scored[name].groups_of(left_A))
            tests, gmac = tests + groups, gmac + groups * cost
            positive_A = positive_A & scored[name].positive_A(step.thresholds)
        done.append(StepDone(images_in=int(left_A.sum()), tests=tests, gmac=gmac, images_out=int(positive_A.sum())))
        left_A = positive_A
    return Replayed(steps=tuple(done), flagged_A=left_A)
