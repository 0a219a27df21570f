"""A window of images: the unit of work and of every verdict, and one Ray row.

In Python it is plain objects; between operators it is one row of ``schema.WINDOW``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.codes import CODES

Outcome = Literal["cleared", "flagged", "error", "skipped"]
OUTCOMES: tuple[Outcome, ...] = ("cleared", "flagged", "error", "skipped")

CANARY_REASONS: dict[str, str] = {"flagged": "canary found", "cleared": "canary missed", "error": "canary failed"}
"""What the ledger says of a canary that ended so; its outcome there is ``skipped``."""

KNOWN_CONTENT = "known content"
"""Skip reason of an image whose very bytes an earlier run has cleared."""

UNCHANGED = "unchanged"
"""Skip reason of an object that is what it was when an earlier run judged it."""


@dataclass(slots=True, kw_only=True)
class GroupTest:
    """One test of one group that an image was a member of."""

    stage: str
    round: int
    group_id: str
    group_size: int
    scores: list[float]
    burst: bool = False


@dataclass(slots=True, kw_only=True)
class Image:
    """One listed image on its way to an outcome; ``outcome`` is None while it is undecided."""

    image_id: str
    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    modified_at: datetime | None = None
    canary: bool = False
    payload: bytes | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    outcome: Outcome | None = None
    error_code: str | None = None
    error_detail: str | None = None
    tests: list[GroupTest] = field(default_factory=list)
    sha256: str | None = None
    judged_run_id: str | None = None
    findings: list[dict[str, Any]] | None = None
    """What flags it without a test (``schema.FINDING``)."""
    match_ignored: bool = False

    @property
    def skip_reason(self) -> str | None:
        """Of a decided image: why it is no finding, whatever the nets say of it."""
        if self.canary and self.outcome:
            return CANARY_REASONS[self.outcome]
        return KNOWN_CONTENT if self.outcome == "skipped" else None

    @property
    def counted_as(self) -> Outcome | None:
        """The outcome in ledger and counts: a canary is known content, so never a finding, a miss or an error."""
        return "skipped" if self.skip_reason else self.outcome

    def decide(self, outcome: Outcome) -> None:
        """Sets the outcome, once, and drops the payload: nothing behind this needs it."""
        assert self.outcome is None, f"{self.uri} is already {self.outcome}"
        self.outcome = outcome
        self.payload = None

    def fail(self, code: str, detail: str) -> None:
        assert code in CODES, code
        self.decide("error")
        self.error_code = code
        self.error_detail = detail


@dataclass(slots=True, kw_only=True)
class Work:
    """What one operator did for one window (``schema.WORK``)."""

    operator: str
    round: int | None = None
    images_in: int = 0
    tests: int = 0
    positive_tests: int = 0
    images_out: int = 0
    gmac: float = 0.0
    seconds: float = 0.0
    transfer_seconds: float = 0.0
    waited_seconds: float = 0.0
    bursts: int = 0


@dataclass(slots=True, kw_only=True)
class Window:
    """``pixels``: uint8 (undecided images, side, side, 3) in ordinal order, or None."""

    shard: int
    window: int
    first_ordinal: int
    images: list[Image]
    pixels: np.ndarray | None = None
    work: list[Work] = field(default_factory=list)

    @property
    def undecided(self) -> list[int]:
        """Positions of the images without an outcome."""
        return [position for position, image in enumerate(self.images) if image.outcome is None]

    def keep_pixels(self, had_pixels: list[int]) -> None:
        """Drops the pixels of images decided since ``had_pixels`` were the undecided ones."""
        if self.pixels is not None:
            rows = [row for row, position in enumerate(had_pixels) if self.images[position].outcome is None]
            self.pixels = self.pixels[rows] if rows else None


_IMAGE_FIELDS = schema.IMAGE.names
_TEST_FIELDS = schema.TEST.names
_WORK_FIELDS = schema.WORK.names


def _as_dict(item: Any, names: Iterable[str]) -> dict[str, Any]:
    # dataclasses.asdict copies deeply, payloads included.
    return {name: getattr(item, name) for name in names}


def windows_to_table(windows: list[Window]) -> pa.Table:
    """Rows of ``schema.WINDOW``."""
    rows = []
    for window in windows:
        images = [_as_dict(image, _IMAGE_FIELDS) for image in window.images]
        for image in images:
            image["tests"] = [_as_dict(test, _TEST_FIELDS) for test in image["tests"]]
        pixels = window.pixels
        rows.append(
            {
                "shard": window.shard,
                "window": window.window,
                "first_ordinal": window.first_ordinal,
                "images": images,
                "pixels": None if pixels is None else pixels.tobytes(),
                "pixels_side": None if pixels is None else pixels.shape[1],
                "work": [_as_dict(work, _WORK_FIELDS) for work in window.work],
            }
        )
    return pa.Table.from_pylist(rows, schema.WINDOW)


def windows_from_table(table: pa.Table) -> list[Window]:
    windows = []
    for row in table.to_pylist():
        images = [
            Image(**(image | {"tests": [GroupTest(**test) for test in image["tests"]]})) for image in row["images"]
        ]
        side = row["pixels_side"]
        pixels = None if side is None else np.frombuffer(row["pixels"], np.uint8).reshape(-1, side, side, 3)
        windows.append(
            Window(
                shard=row["shard"],
                window=row["window"],
                first_ordinal=row["first_ordinal"],
                images=images,
                pixels=pixels,
                work=[Work(**work) for work in row["work"]],
            )
        )
    return windows
