"""How much of a plan's device batches is air, by expectation: padding, and the holes of groups behind a screen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.stats import poisson

from pipeline.steps.layout import BATCH_IMAGES, padded, windows_per_call


def padding(reached: float, size: int, window_images: int, at_head: float) -> float:
    """By how much more groups of ``size`` take than their images alone would, because of padded batches: 1 or more.

    ``at_head``: the share of images that reach the first round of the stage, which decides how many windows it takes.
    """
    if reached >= 1:
        return 1.0  # whole windows fill whole batches
    images = reached * window_images * windows_per_call(at_head, window_images)
    means, ratios = _padding_table(max(1, BATCH_IMAGES // size))
    return float(np.interp(images / size, means, ratios))


def holes(entered: float, size: int, window_images: int) -> float:
    """The same because of holes, when a window's survivors (this share of it) are put into groups of ``size``."""
    means, ratios = _holes_table(size)
    return float(np.interp(entered * window_images, means, ratios))


# Counts are taken as Poisson: a window is a random sample.
_MEANS = np.geomspace(0.01, 5000, 400)


@lru_cache
def _padding_table(width: int) -> tuple[np.ndarray, np.ndarray]:
    return _MEANS, _ratios(lambda groups: padded(groups, width))


@lru_cache
def _holes_table(size: int) -> tuple[np.ndarray, np.ndarray]:
    return _MEANS, _ratios(lambda images: -(-images // size) * size)


def _ratios(taken: Callable[[int], int]) -> np.ndarray:
    """At each mean what is taken over what is there, both expected."""
    most = int(_MEANS[-1] + 10 * math.sqrt(_MEANS[-1]))
    counts = np.arange(most + 1)
    taken_C = np.array([taken(int(count)) for count in counts])
    return np.array([poisson.pmf(counts, mean) @ taken_C / mean for mean in _MEANS])
