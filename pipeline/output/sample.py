"""Which cleared images are kept for an audit: a random sample that depends on image, salt and verdict alone.

So a call that Ray repeats, or a driver that goes on, draws the same images. Who uploads does not know the
salt, and cannot choose a name that is never looked at.
"""

from __future__ import annotations

import hashlib

from pipeline.plan import Audit

NEAR_SHARE = 0.1
"""Of a threshold: a test that reached it in any category, and cleared, came near."""


class Sampler:
    """Draws images by the hash of their id. ``salt``: the run's."""

    def __init__(self, audit: Audit, salt: str) -> None:
        self.audit = audit
        # A key of its own: with that of the ordinals the sample would be the first images of the run.
        self.key = hashlib.blake2b(salt.encode(), digest_size=32, person=b"dorfman audit").digest()

    def probability(self, scores: list[float], thresholds: list[float]) -> float:
        """With which an image is drawn that was cleared by a test with these scores."""
        near = any(score >= NEAR_SHARE * limit for score, limit in zip(scores, thresholds, strict=True))
        return self.audit.near_rate if near else self.audit.rate

    def draw(self, image_id: str) -> float:
        """The image's lot, uniform in [0, 1): it is drawn when this lies under its probability."""
        lot = hashlib.blake2b(image_id.encode(), key=self.key, digest_size=8).digest()
        return (int.from_bytes(lot, "big") >> 11) / 2**53
