"""How a plan lays work out: windows, calls, device batches; and what of it is air, by expectation.

A device batch has one of a few shapes: it is full, or as wide as the smallest power of two that holds what is left. So
scores do not depend on how many images happened to be there, and one survivor costs one test and not sixty-four.
Behind a screen a window's last group has holes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.stats import poisson

WINDOW_IMAGES = 256
SCREENED_WINDOW_IMAGES = 1024
"""Where groups are formed of what a screen lets through: few are left of a window."""
BATCH_IMAGES = 64
MOST_WINDOWS = 16
"""Of one call: should all of their images survive, as in a burst, they must still fit."""


def padded(groups: int, width: int) -> int:
    """How many groups a device computes for ``groups`` in batches of at most ``width``."""
    full, rest = divmod(groups, width)
    return full * width + (min(width, 1 << (rest - 1).bit_length()) if rest else 0)


def windows_per_call(reached: float, window_images: int) -> int:
    """How many windows fill a device batch when this share of their images is left."""
    return min(MOST_WINDOWS, max(1, math.ceil(BATCH_IMAGES / max(reached * window_images, 1e-9))))


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
