"""Thousands of damaged picture files through the decoder: every one ends as pixels or as a code, in flat memory."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from typing import get_args

import numpy as np
import psutil
import pytest
from PIL import Image as Pillow

from pipeline.plan import Preparation
from pipeline.steps.decode import Decoder
from pipeline.steps.picture import FORMATS, ErrorCode
from pipeline.window import Image, Window

SIDE = 64
WINDOW = 250
FLAT_BYTES = 200_000_000
ANSWERS = {*get_args(ErrorCode), "decode_timeout", "decode_crash"}


def originals() -> dict[str, list[bytes]]:
    """Small real files of every format, in the variants that have code of their own."""
    rng = np.random.default_rng(5)
    grain = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    picture = Pillow.fromarray(grain).resize((300, 220), Pillow.Resampling.BICUBIC)
    frames = [picture.rotate(angle) for angle in (90, 180)]
    animation = {"save_all": True, "append_images": frames}
    variants: dict[str, list[tuple[Pillow.Image, dict]]] = {
        "JPEG": [
            (picture, {}),
            (picture, {"progressive": True}),
            (picture.convert("CMYK"), {}),
            (picture.convert("L"), {}),
        ],
        "PNG": [
            (picture, {}),
            (picture.convert("P"), {}),
            (picture.convert("RGBA"), {}),
            (picture.convert("I;16"), {}),
        ],
        "WEBP": [(picture, {}), (picture, {"lossless": True}), (picture, animation)],
        "GIF": [(picture, {}), (picture, animation)],
        "BMP": [(picture, {}), (picture.convert("P"), {})],
        "TIFF": [(picture, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")],
        "AVIF": [(picture, {"speed": 10}), (picture, animation | {"speed": 10})],
    }
    return {name: [_save(image, name, **options) for image, options in files] for name, files in variants.items()}


def _save(image: Pillow.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def mutate(files: list[bytes], chance: random.Random) -> bytes:
    """Flipped bits, a lost end, or the beginning of one file with the end of another."""
    body = bytearray(chance.choice(files))
    kind = chance.randrange(4)
    if kind == 0:
        # Near the front are the headers, whose numbers decide how much memory and time a decoder takes.
        reach = chance.choice([64, 512, len(body)])
        for _ in range(chance.choice([1, 3, 30])):
            body[chance.randrange(min(reach, len(body)))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del body[chance.randrange(len(body)) :]
    elif kind == 2:
        other = chance.choice(files)
        body = body[: chance.randrange(len(body))] + other[chance.randrange(len(other)) :]
    else:
        start = chance.randrange(len(body))
        body[start : start + chance.choice([1, 4, 16, 200])] = chance.randbytes(chance.choice([0, 4, 64]))
    return bytes(body)


def resident_bytes(decoder: Decoder) -> int:
    """Of this process and of its decoder."""
    assert decoder.child is not None
    return sum(psutil.Process(pid).memory_info().rss for pid in (os.getpid(), decoder.child.process.pid))


@pytest.mark.parametrize(
    "images",
    [5_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_damaged_files_end_as_pixels_or_as_a_code_in_flat_memory(images):
    chance = random.Random(images)
    files = originals()
    assert set(files) == set(FORMATS)
    everything = [body for bodies in files.values() for body in bodies]
    decoder = Decoder("decode:s", SIDE, Preparation(decode_seconds=5, decode_gigabytes=1))
    codes: Counter[str] = Counter()
    start = peak = 0
    for number in range(images // WINDOW):
        # Each window of one format, whose files are spliced with one another; every eighth mixes all.
        pool = everything if number % 8 == 7 else list(files.values())[number % 8 % len(files)]
        members = [Image(image_id=str(i), uri=f"file:///{i}", payload=mutate(pool, chance)) for i in range(WINDOW)]
        (window,) = decoder([Window(shard=0, window=number, first_ordinal=0, images=members)])
        for image in members:
            assert (image.outcome is None) == (image.error_code is None)
            codes[image.error_code or "pixels"] += 1
        good = len(window.undecided)
        assert (window.pixels is None and good == 0) or window.pixels.shape == (good, SIDE, SIDE, 3)
        if number == 3:
            start = resident_bytes(decoder)
        peak = max(peak, resident_bytes(decoder))
    print(f"{images:,} files: {dict(codes.most_common())}; RSS {start / 1e6:.0f} MB, at most {peak / 1e6:.0f} MB")
    assert sum(codes.values()) == images and set(codes) <= ANSWERS | {"pixels"}
    assert codes["pixels"] > images / 10 and codes["truncated"] > images / 50 and codes["decode_failed"] > images / 50
    assert codes["decode_crash"] <= images / 1000
    assert peak - start < FLAT_BYTES
