"""A picture for the review page: fetched when it is asked for, decoded in a child process, and encoded anew.

The browser gets a JPEG of our own making, or the reason why there is none. It never sees a byte that an uploader wrote.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass

from PIL import Image as PillowImage

from pipeline.codes import CODES
from pipeline.plan import Preparation
from pipeline.reporting.visible import visible
from pipeline.steps.decode import Decoder
from pipeline.steps.fetch import Fetcher
from pipeline.window import Image, Window

SIDE = 1280
"""Pixels of the longer side, at most."""
QUALITY = 88
FETCH_SECONDS = 15.0
"""A person waits."""
CHANGED = ("fetch_changed", "fetch_short")
GONE = {
    "fetch_not_found": "The picture is gone since the scan.",
    **dict.fromkeys(CHANGED, "The object is another one than was scanned. What is there now is not shown."),
}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What there is to see of an image: ``jpeg``, or a ``problem`` in a sentence with its ``code``.

    ``sha256``: of the object's bytes. ``may_pass``: whether asking again can help. ``asked``: how often it was.
    """

    jpeg: bytes | None = None
    sha256: str | None = None
    code: str | None = None
    problem: str | None = None
    may_pass: bool = False
    asked: int = 1

    @property
    def lost(self) -> bool:
        """Whether it may be said that it could not be seen: not before asking again was tried where it may help."""
        return self.problem is not None and not (self.may_pass and self.asked < 2)


class Pictures:
    """Fetches in several threads at once, decodes one after the other. ``limits``: those of the scan."""

    def __init__(self, limits: Preparation, endpoint_url: str | None) -> None:
        few = {"fetch_concurrency": 4, "fetch_seconds": min(FETCH_SECONDS, limits.fetch_seconds)}
        self.limits = limits.model_copy(update=few)
        self.endpoint_url = endpoint_url
        self.decoder = Decoder("review", SIDE, self.limits, as_shown=True)
        self.decoding = threading.Lock()

    def show(self, uri: str, etag: str | None, size_bytes: int | None) -> Shown:
        """The object as it was scanned; one that has changed since is not shown."""
        image = Image(image_id=uri, uri=uri, etag=etag, size_bytes=size_bytes)
        # A fetcher counts what is overdue in a window: each request has one of its own.
        window = Fetcher(None, self.endpoint_url, self.limits).fetch(
            Window(shard=0, window=0, first_ordinal=0, images=[image])
        )
        sha256 = image.sha256
        if image.outcome is None:
            with self.decoding:
                (window,) = self.decoder([window])
                pixels = None if window.pixels is None else window.pixels[0].copy()
            if pixels is not None:
                assert image.width and image.height
                return Shown(jpeg=_jpeg(PillowImage.fromarray(pixels), image.width, image.height), sha256=sha256)
        return _problem(image)

    def start(self) -> None:
        """Has the decoder ready before the first picture. Raises EOFError."""
        with self.decoding:
            self.decoder.start()


def _jpeg(square: PillowImage.Image, width: int, height: int) -> bytes:
    """The decoder stretches to a square: this gives a picture its shape again, and never more pixels than it had."""
    scale = min(1.0, SIDE / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    square.resize(size, PillowImage.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _problem(image: Image) -> Shown:
    code = image.error_code or "decode_failed"
    passing = code.startswith("fetch_") and code not in GONE
    meaning = GONE.get(code) or f"It cannot be shown. {CODES[code].meaning}"
    if passing and image.error_detail:
        meaning = f"{meaning.rstrip('.')}: {visible(image.error_detail).rstrip('.')}."
    return Shown(code=code, problem=meaning, may_pass=passing)
