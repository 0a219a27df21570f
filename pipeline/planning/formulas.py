"""What group tests cost and find on paper: expected tests, sensitivity and specificity of whole algorithms.

The usual assumptions: images are violating independently of each other, a test errs independently of all
others given whether its group holds a violating image, and how many it holds does not matter. Real nets keep
none of the three, so no plan is certified by these numbers; they say where to look, and check what simulates.

Formulas: Dorfman, The detection of defective members of large populations (1943) for two stages; Kim, Hudgens,
Dreyfuss, Westreich and Pilcher, Comparison of group testing algorithms for case identification in the presence
of test error (Biometrics, 2007) for more stages; Black, Bilder and Tebbs, Optimal retesting
configurations for hierarchical group testing (JRSS C, 2015) for groups of different sizes and prevalences.
The R package binGroup2 computes the same; ``tests/test_planner.py`` compares with its published outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np


@dataclass(frozen=True)
class Accuracy:
    """Of a test: how often it is positive when its group holds a violating image, and negative when it holds none."""

    sensitivity: float = 1.0
    specificity: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("sensitivity", self.sensitivity), ("specificity", self.specificity)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, but it is a share between 0 and 1")

    @property
    def false_positive_rate(self) -> float:
        return 1 - self.specificity


PERFECT = Accuracy()


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of an algorithm on ``images`` images that share the first test."""

    images: int
    tests: float
    """For all of them together."""
    sensitivity: float
    """Share of the violating images that end positive."""
    specificity: float
    """Share of the others that end negative."""

    @property
    def tests_per_image(self) -> float:
        return self.tests / self.images


Levels = Sequence[Sequence[int]]
"""Sizes of the groups of each stage, in the order of the images: ``[[12], [8, 2, 1, 1], [5, 3, 1, 1]]`` splits a
group of 12, its group of 8 into 5 and 3, and its group of 2 into single images. An image tested alone is done;
images that the last stage still has in a larger group are tested alone after it."""


def split_evenly(images: int, sizes: Iterable[int]) -> list[list[int]]:
    """Levels of ``images`` that are tested in ever smaller groups; what is left over makes a smaller one.

    ``split_evenly(13, [13, 4])`` is ``[[13], [4, 4, 4, 1]]``.
    """
    levels: list[list[int]] = []
    groups = [images]
    for size in sizes:
        if levels:
            groups = [group for group in groups if group > 1]
        groups = [part for group in groups for part in _parts(group, size)]
        levels.append(groups)
    return levels


def _parts(group: int, size: int) -> Iterator[int]:
    if size < 1:
        raise ValueError(f"a group size is {size}, but a group has at least 1 image")
    for start in range(0, group, size):
        yield min(size, group - start)


def hierarchical(levels: Levels, prevalence: float | Sequence[float], accuracies: Sequence[Accuracy]) -> Expected:
    """Ever smaller groups: members of a positive group are tested in the groups of the next level.

    ``prevalence``: of every image, or one each in the order of ``levels``. ``accuracies``: one a stage, that of
    the last single tests included. With one level it is Dorfman's algorithm. Raises ValueError when groups do not
    nest or numbers do not fit.
    """
    images = sum(levels[0])
    p_N = np.broadcast_to(np.asarray(prevalence, dtype=float), (images,))
    if ((p_N < 0) | (p_N > 1)).any():
        raise ValueError(f"prevalence is {prevalence}, but it is a share between 0 and 1")
    paths = list(_paths(levels))
    deepest = max(len(path) for path in paths)
    if len(accuracies) != deepest:
        raise ValueError(f"{len(accuracies)} accuracies are given for {deepest} stages: give one a stage")
    # Chance that a group holds no violating image.
    none = {group: float(np.prod(1 - p_N[group[1] : group[2]])) for group in {*chain.from_iterable(paths)}}
    above = {group: path[:depth] for path in paths for depth, group in enumerate(path)}
    tests = sum(_all_positive([none[group] for group in groups], accuracies) for groups in above.values())
    positive = negative = 0.0
    for p, path in zip(p_N.tolist(), paths, strict=True):
        positive += p * prod(test.sensitivity for test in accuracies[: len(path)])
        if p < 1:
            negative += (1 - p) * (1 - _all_positive([none[group] / (1 - p) for group in path], accuracies))
    return Expected(
        images=images,
        tests=tests,
        sensitivity=float(positive / p_N.sum()),
        specificity=float(negative / (1 - p_N).sum()),
    )


Group = tuple[int, int, int]
"""Level, first image and the one behind the last."""


def _paths(levels: Levels) -> Iterator[tuple[Group, ...]]:
    """Per image the groups that it is tested in when all of them are positive, its single test last."""
    images = sum(levels[0])
    paths: list[list[Group]] = [[] for _ in range(images)]
    waiting = list(range(images))
    for depth, sizes in enumerate([*levels, [1] * images]):
        rest = iter(waiting)
        for size in sizes if depth < len(levels) else [1] * len(waiting):
            members = [image for _, image in zip(range(size), rest, strict=False)]
            shared = {paths[image][-1] for image in members if paths[image]}
            if len(members) < size or len(shared) > 1 or members[-1] - members[0] >= size:
                raise ValueError(f"level {depth} has groups of {list(sizes)}: they do not split those before")
            for image in members:
                paths[image].append((depth, members[0], members[-1] + 1))
        if next(rest, None) is not None:
            raise ValueError(f"level {depth} has groups of {list(sizes)}: they leave images out")
        waiting = [image for image in waiting if not _is_single(paths[image][-1])]
    yield from map(tuple, paths)


def _is_single(group: Group) -> bool:
    return group[2] - group[1] == 1


def _all_positive(none: Sequence[float], accuracies: Sequence[Accuracy]) -> float:
    """Chance that the tests of nested groups, the largest first, are all positive.

    ``none``: for each the chance that it holds no violating image. The outer groups hold one down to some depth,
    the inner ones none; the sum is over that depth (Kim et al., 2007).
    """
    bounds = [0.0, *none, 1.0]
    return sum(
        (bounds[depth + 1] - bounds[depth])
        * prod(test.sensitivity for test in accuracies[:depth])
        * prod(test.false_positive_rate for test in accuracies[depth : len(none)])
        for depth in range(len(none) + 1)
    )
