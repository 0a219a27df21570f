"""What labels say of a threshold: recall and false positives of the labelled images, each content once.

Shapes: P labelled images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.intervals import interval


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images of one label. Copies of one content are one observation, of which a share may be flagged."""

    content_P: np.ndarray
    """Numbers from 0."""
    copies: np.ndarray
    """Of each content."""
    low_P: np.ndarray
    high_P: np.ndarray

    @staticmethod
    def of(content: np.ndarray, low_P: np.ndarray, high_P: np.ndarray) -> Labelled:
        _, content_P, copies = np.unique(content, return_inverse=True, return_counts=True)
        return Labelled(content_P=content_P, copies=copies, low_P=low_P, high_P=high_P)

    def numbers(self) -> dict[str, int]:
        return {"images": len(self.content_P), "unique": len(self.copies)}

    def images(self, threshold: float) -> tuple[int, int]:
        return int((self.low_P >= threshold).sum()), int((self.high_P >= threshold).sum())

    def share(self, threshold: float) -> tuple[float, float] | None:
        """Of contents; None when there are none."""
        if not len(self.copies):
            return None
        low, high = self._flagged(self.low_P, threshold), self._flagged(self.high_P, threshold)
        return low / len(self.copies), high / len(self.copies)

    def interval(self, threshold: float) -> tuple[float, float]:
        """Clopper and Pearson's at 95 %, from that of the lower share to that of the upper one."""
        unique = len(self.copies)
        low = interval(self._flagged(self.low_P, threshold), unique)[0]
        return low, interval(self._flagged(self.high_P, threshold), unique)[1]

    def _flagged(self, score_P: np.ndarray, threshold: float) -> float:
        hits = np.bincount(self.content_P, score_P >= threshold, len(self.copies))
        return float((hits / self.copies).sum())


def quality(judged: dict[str, Labelled], threshold: float) -> dict[str, Any]:
    """``judged``: the images that are violating, and the others. Where a score is not known, from the least to the most
    that it may be."""
    violating, others = judged["violating"], judged["others"]
    return {
        "recall": violating.share(threshold),
        "recall_interval": violating.interval(threshold),
        "false_positives": others.images(threshold),
        "false_positive_rate_interval": others.interval(threshold),
    }
