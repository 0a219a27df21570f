"""How fast pictures become pixels, on one core: ours, with and without its guard, against what others decode with."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize

from pipeline.bench.measure import (
    Clock,
    Report,
    Rival,
    Sample,
    Say,
    named,
    plot_rates,
    rate_table,
    result_of,
    take_turns,
    write_result,
)
from pipeline.errors import UsageError
from pipeline.labels.corpus import list_photos
from pipeline.plan import Preparation
from pipeline.steps.decode import Decoder
from pipeline.steps.decode_device import DeviceDecoder
from pipeline.steps.picture import decode_picture
from pipeline.window import Image, Window

QUALITY = 90
FULL = "pillow-full"


@dataclass(frozen=True, kw_only=True)
class DecodeBenchConfig:
    """Decodes photographs to a net's input with several decoders in turn, each on one core.

    Exit codes: 0 done, 2 wrong usage.
    """

    pictures: Path
    """Folder of photographs."""
    images: int = 200
    """How many of them; each is brought to every size and compressed again, as JPEG of quality 90."""
    sizes: tuple[str, ...] = ("500x375", "1600x1200")
    """Widths and heights of the files."""
    sides: tuple[int, ...] = (80, 160, 224)
    """Sides of the pixels that are wanted, as plans name them in input_size."""
    repeats: int = 5
    """Turns of every decoder at every size and side."""
    json: Path | None = None
    """File to write the rows to."""
    plot: Path | None = None
    """File for a plot of the rates at the first side, .svg or .png; one for each size, which its name gets."""

    def __post_init__(self) -> None:
        for name in ("images", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if not self.sizes or not self.sides or min(self.sides) < 16:
            raise UsageError(f"sizes are {self.sizes} and sides {self.sides}: give some, and sides of at least 16")
        self.dimensions()

    def dimensions(self) -> list[tuple[int, int]]:
        """Raises UsageError."""
        parts = [size.split("x") for size in self.sizes]
        if not all(len(part) == 2 and all(side.isdigit() and int(side) >= 32 for side in part) for part in parts):
            raise UsageError(f"sizes are {self.sizes}: write WIDTHxHEIGHT, as in 1600x1200, of at least 32 pixels")
        return [(int(width), int(height)) for width, height in parts]


def bench_decode(config: DecodeBenchConfig, say: Say) -> dict[str, Any]:
    """A row per decoder, size and side. Raises UsageError."""
    photos = list_photos(config.pictures, "all")
    rows = []
    with one_core() as core:
        for width, height in config.dimensions():
            payloads = [_file(photos[index % len(photos)], (width, height)) for index in range(config.images)]
            for side in config.sides:
                say(f"{len(payloads)} files of {width}x{height} to {side} px")
                turns = named(take_turns(_rivals(payloads, side), config.repeats, say), "images_per_s")
                rows += [{"size": f"{width}x{height}", "side": side} | row for row in turns]
    result = result_of("decode", rows, "pillow", "torchvision", images=config.images, core=core)
    write_result(config.json, result)
    if config.plot:
        for size in config.sizes:
            shown = [row for row in rows if row["size"] == size and row["side"] == config.sides[0]]
            path = config.plot.with_stem(f"{config.plot.stem}-{size}")
            plot_rates(path, f"{size} to {config.sides[0]} px, one core", shown, "images_per_s")
    return result


@contextmanager
def one_core() -> Iterator[int | None]:
    """Keeps this process, its children and torch to one core, whose number it yields: so a rate is a cost.

    None where the system cannot.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if before:
        os.sched_setaffinity(0, {max(before)})
    try:
        yield max(before) if before else None
    finally:
        torch.set_num_threads(threads)
        if before:
            os.sched_setaffinity(0, before)


def _file(photo: Path, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    with PillowImage.open(photo) as picture:
        picture.convert("RGB").resize(size, PillowImage.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _rivals(payloads: list[bytes], side: int) -> list[Rival]:
    wanted = [pillow_full(payload, side) for payload in payloads]
    functions: dict[str, tuple[Callable[[bytes, int], np.ndarray], str]] = {
        FULL: (pillow_full, "open, convert, resize: what loaders do"),
        "torchvision": (_torchvision, "decode_jpeg, antialiased resize"),
        "ours-unguarded": (lambda payload, side: decode_picture(payload, side).pixels, "in this process"),
    }
    rivals = [
        Rival(name=name, note=note, run=partial(_decode_here, function, payloads, side, wanted))
        for name, (function, note) in functions.items()
    ]
    decoders = {"ours": (Decoder("decode", side, Preparation()), "in a child that can be killed")}
    if torch.cuda.is_available():
        decoders["ours-device"] = (
            DeviceDecoder("decode", side, Preparation(), "cuda"),
            "on the GPU, for trusted sources",
        )
    guarded = [
        Rival(name=name, note=note, run=partial(_decode_guarded, decoder, payloads, wanted))
        for name, (decoder, note) in decoders.items()
    ]
    return [*rivals, *guarded]


def pillow_full(payload: bytes, side: int) -> np.ndarray:
    """uint8 (side, side, 3) by way of all pixels: what ours is measured against."""
    with PillowImage.open(io.BytesIO(payload)) as picture:
        return np.asarray(picture.convert("RGB").resize((side, side), PillowImage.Resampling.BILINEAR))


def _torchvision(payload: bytes, side: int) -> np.ndarray:
    pixels_3HW = decode_jpeg(torch.frombuffer(bytearray(payload), dtype=torch.uint8), ImageReadMode.RGB)
    return resize(pixels_3HW, [side, side], antialias=True).permute(1, 2, 0).contiguous().numpy()


def _decode_here(
    function: Callable[[bytes, int], np.ndarray], payloads: list[bytes], side: int, wanted: list[np.ndarray]
) -> Sample:
    with Clock() as clock:
        found = [function(payload, side) for payload in payloads]
    return clock.sample(len(payloads), difference=_difference(found, wanted))


def _decode_guarded(decoder: Decoder, payloads: list[bytes], wanted: list[np.ndarray]) -> Sample:
    images = [Image(image_id=str(number), uri="", payload=payload) for number, payload in enumerate(payloads)]
    window = Window(shard=0, window=0, first_ordinal=0, images=images)
    decoder.start()
    with Clock(machine=True) as clock:
        decoder([window])
    assert window.pixels is not None and len(window.pixels) == len(payloads)
    return clock.sample(len(payloads), difference=_difference(list(window.pixels), wanted))


def _difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Mean absolute difference in grey levels."""
    pairs = zip(found, wanted, strict=True)
    return float(np.mean([np.abs(mine.astype(np.int16) - theirs).mean() for mine, theirs in pairs]))


def decode_report(result: dict[str, Any]) -> Report:
    """One a size and side."""
    kinds = dict.fromkeys((row["size"], row["side"]) for row in result["rows"])
    return [
        rate_table(
            f"{size} to {side} px, one core",
            [row for row in result["rows"] if (row["size"], row["side"]) == (size, side)],
            "images_per_s",
            against=FULL,
            **{"difference, grey levels": "difference"},
        )
        for size, side in kinds
    ]
