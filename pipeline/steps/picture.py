"""One picture: from a file's bytes to the net's input, or the reason why not.

The header is read first; pixels are decoded only when it is within the limits, and at the smallest
size that serves. The picture is stretched to a square: cropping would hide what lies at its edge.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ErrorCode = Literal[
    "empty", "not_an_image", "too_many_pixels", "too_many_frames", "truncated", "decode_failed", "decode_memory"
]  # fmt: skip

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 120_000_000
MAX_FRAMES = 1000
# JPEG is decoded at a half, a quarter or an eighth that is still this many times the target: photographs are then
# within half a grey level of a full decode. An eighth is blunt, for it is the mean of each block of pixels.
DRAFT_OVERSAMPLING = 1.5
EIGHTH_OVERSAMPLING = 2.0
# A hash match wants more pixels than small nets: at this side a hash is within 8 bits of that of a full decode.
HASH_SIDE = 512
ORIENTATION_TAG = 0x0112
ON_ITS_SIDE = (5, 6, 7, 8)
# What Pillow's plugins raise on broken files.
BROKEN_FILE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, NotImplementedError,
    ArithmeticError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip


class PictureError(Exception):
    """A picture that cannot be judged. ``code`` goes to the ledger, ``detail`` is for people."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Picture:
    """``pixels``: uint8 (side, side, 3), RGB. ``width``, ``height``: as stored, before EXIF rotation, or as shown."""

    pixels: np.ndarray
    format: str
    width: int
    height: int
    pdq: tuple[str, int] | None = None
    """The upright picture's PDQ hash, 64 hexadecimal digits, and its quality from 0 to 100; when it was asked for."""


def decode_picture(
    payload: bytes,
    side: int,
    max_pixels: int = MAX_PIXELS,
    max_frames: int = MAX_FRAMES,
    *,
    hashed: bool = False,
    as_shown: bool = False,
) -> Picture:
    """Decodes the first frame, upright, on white where transparent; ``hashed``: with its PDQ hash.

    ``as_shown``: width and height are those of the upright picture, for whoever gives it its shape again. Raises
    PictureError.
    """
    if not payload:
        raise PictureError("empty", "the object has no bytes")
    # The header check below is ours; Pillow's own bomb warning would only add noise.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(payload)
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError("too_many_pixels", f"{width} x {height} is over the limit of {max_pixels:,} pixels")
        try:
            frames = getattr(image, "n_frames", 1)
            if frames > max_frames:
                raise PictureError("too_many_frames", f"{frames:,} frames are over the limit of {max_frames:,}")
            pixels, pdq = _render(image, side, hashed=hashed)
            if as_shown and image.getexif().get(ORIENTATION_TAG, 1) in ON_ITS_SIDE:
                width, height = height, width
        except MemoryError as error:
            detail = f"{width} x {height} needs more memory than a decoder may take"
            raise PictureError("decode_memory", detail) from error
        except BROKEN_FILE as error:
            raise _broken(error) from error
    return Picture(pixels=pixels, format=image.format or "", width=width, height=height, pdq=pdq)


def _open(payload: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(payload), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise PictureError("not_an_image", f"no {', '.join(FORMATS)} file; it begins with {payload[:8]!r}") from error
    except BROKEN_FILE as error:
        raise _broken(error) from error


def _broken(error: Exception) -> PictureError:
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    return PictureError("truncated" if "truncated" in detail.lower() else "decode_failed", detail)


def _render(image: Image.Image, side: int, *, hashed: bool) -> tuple[np.ndarray, tuple[str, int] | None]:
    # What is left of the picture after a draft: its last row and column may stand for pixels that are not there.
    box = _draft(image, side, HASH_SIDE if hashed else 0) if image.format == "JPEG" else None
    orientation = image.getexif().get(ORIENTATION_TAG, 1)
    picture = _to_rgb(image)
    # reducing_gap would box-reduce before filtering: faster, but it is what the draft already did.
    small = picture.resize((side, side), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(upright(small, orientation))
    if not hashed:
        return pixels, None
    picture.thumbnail((2 * HASH_SIDE,) * 2, Image.Resampling.BILINEAR)
    return pixels, _pdq(np.asarray(upright(picture, orientation)))


def _draft(image: Image.Image, side: int, least: int) -> tuple[float, float, float, float] | None:
    """Has the JPEG decoded at a fraction of its size, not below ``least``; the box of the picture in what comes."""
    wanted = math.ceil(max(DRAFT_OVERSAMPLING * side, least))
    if min(image.size) // wanted >= 8:
        wanted = max(wanted, math.ceil(EIGHTH_OVERSAMPLING * side))
    drafted = image.draft("RGB" if image.mode != "CMYK" else None, (wanted, wanted))
    return drafted[1] if drafted else None


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture turned and mirrored as EXIF's ``orientation`` (1 to 8) says."""
    if orientation == 1:
        return picture
    picture.getexif()[ORIENTATION_TAG] = orientation
    return ImageOps.exif_transpose(picture)


def _pdq(pixels_HW3: np.ndarray) -> tuple[str, int]:
    # Here: most scans match no bank, and a decoder imports as little as it can.
    import pdqhash  # noqa: PLC0415

    bits, quality = pdqhash.compute(pixels_HW3)
    return np.packbits(bits.astype(np.uint8)).tobytes().hex(), int(quality)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        levels = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode == "I" and levels.max(initial=0) > 255 else 255
        return Image.fromarray((levels * (255 / top)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
