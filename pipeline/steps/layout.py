"""How a plan lays work out: windows, calls, device batches.

A device batch has one of a few shapes: it is full, or as wide as the smallest power of two that holds what is left. So
scores do not depend on how many images happened to be there, and one survivor costs one test and not sixty-four.
"""

from __future__ import annotations

import math

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
