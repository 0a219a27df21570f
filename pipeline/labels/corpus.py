"""A labelled corpus of pictures, some with a prohibited emblem, written to any store.

Every picture is drawn from ``(seed, index)`` alone, so the corpus is the same on any number of
cores. ``labels.parquet`` (uri, category, label) is written last, beside the pictures.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.errors import UsageError
from pipeline.labels.emblem import (
    EMBLEMS,
    LOOK_ALIKES,
    draw_background,
    photo_background,
    stamp,
)
from pipeline.schema import LABELS
from pipeline.store import Store

# Share of the violating pictures that show two categories.
TWO_EMBLEMS_SHARE = 0.06
# Share of the pictures without an emblem that carry a look-alike; and of those with one.
LOOK_ALIKE_SHARE = 0.45
LOOK_ALIKE_BESIDE_EMBLEM = 0.2
# A photograph is never enlarged beyond this, or the corpus would be all blur.
MAX_ENLARGEMENT = 1.6

Part = Literal["all", "train", "held-out"]


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What to draw."""

    output: str
    """Folder or s3:// prefix that receives the pictures and labels.parquet."""
    images: int = 8000
    """Number of pictures."""
    prevalence: float = 0.015
    """Share of the pictures that carry an emblem; the categories take turns."""
    categories: tuple[str, ...] = ("trefoil",)
    """Prohibited emblems: trefoil, star, bolt. Those left out are look-alikes like any other."""
    seed: int = 1
    """The same seed gives the same pictures."""
    sides: tuple[int, int] = (200, 1600)
    """Shortest and longest side in pixels."""
    size: tuple[int, int] | None = None
    """Width and height of every picture, as benchmarks want them; instead of sides."""
    backgrounds: Path | None = None
    """Folder of photographs to stamp; without it the backgrounds are drawn."""
    backgrounds_part: Part = "all"
    """Which photographs to take: of every five in order of name, three are for training and two held out."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    processes: int = 0
    """Number of processes; 0 takes every core."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UsageError(f"images is {self.images}, but a corpus needs at least 1")
        if not 0 <= self.prevalence <= 1:
            raise UsageError(f"prevalence is {self.prevalence}, but it is a share between 0 and 1")
        if (
            not self.categories
            or len(set(self.categories)) < len(self.categories)
            or set(self.categories) - set(EMBLEMS)
        ):
            raise UsageError(f"categories are {self.categories}; name some of {', '.join(EMBLEMS)}, each once")
        if not 32 <= self.sides[0] <= self.sides[1]:
            raise UsageError(f"sides are {self.sides}, but they must be rising and at least 32 px")
        if self.size is not None and min(self.size) < 32:
            raise UsageError(f"size is {self.size}, but both sides must be at least 32 px")


def make_corpus(config: CorpusConfig) -> int:
    """Writes the pictures, then their labels; returns the number of positives."""
    photos = list_photos(config.backgrounds, config.backgrounds_part) if config.backgrounds else []
    shown_NK = choose_categories(config)
    uris: list[str] = []
    with ProcessPoolExecutor(config.processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_write_pictures, config, photos, chunk, shown_NK[chunk])
            for chunk in np.array_split(np.arange(config.images), math.ceil(config.images / 50))
        ]
        for job in jobs:
            uris += job.result()
    columns = (
        np.repeat(uris, len(config.categories)),
        np.tile(config.categories, len(uris)),
        shown_NK.astype(np.int8).ravel(),
    )
    labels = pa.table(dict(zip(LABELS.names, columns, strict=True))).cast(LABELS)
    buffer = io.BytesIO()
    pq.write_table(labels, buffer)
    Store(config.output, config.endpoint_url).write("labels.parquet", buffer.getvalue())
    return int(shown_NK.any(axis=1).sum())


def choose_categories(config: CorpusConfig) -> np.ndarray:
    """Which picture shows which categories, bool (N, K): ``prevalence`` of them one, a few of these two."""
    rng = np.random.default_rng(config.seed)
    violating = rng.permutation(config.images)[: round(config.images * config.prevalence)]
    count = len(config.categories)
    shown_NK = np.zeros((config.images, count), dtype=bool)
    first = np.arange(len(violating)) % count
    shown_NK[violating, first] = True
    if count == 1:
        return shown_NK
    second = (first + rng.integers(1, count, len(violating))) % count
    both = rng.random(len(violating)) < TWO_EMBLEMS_SHARE
    shown_NK[violating[both], second[both]] = True
    return shown_NK


def list_photos(folder: Path, part: Part) -> list[Path]:
    """The photographs of one part, by sorted name: a fixed list that needs no file of its own."""
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    names = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    wanted = {"all": range(5), "train": range(3), "held-out": range(3, 5)}[part]
    photos = [path for index, path in enumerate(names) if index % 5 in wanted]
    if not photos:
        raise UsageError(f"no photographs ({', '.join(sorted(suffixes))}) of part {part!r} in {folder}")
    return photos


def _write_pictures(config: CorpusConfig, photos: list[Path], indices: np.ndarray, shown_NK: np.ndarray) -> list[str]:
    store = Store(config.output, config.endpoint_url)
    uris = []
    for index, shown_K in zip(indices.tolist(), shown_NK, strict=True):
        rng = np.random.default_rng([config.seed, index])
        shown = [category for category, there in zip(config.categories, shown_K, strict=True) if there]
        picture = draw_picture(
            rng, shown=shown, prohibited=config.categories, sides=config.sides, photos=photos, size=config.size
        )
        body, suffix = encode(rng, picture)
        uris.append(store.write(f"{index // 1000:04d}/{index:07d}.{suffix}", body))
    return uris


def draw_picture(
    rng: np.random.Generator,
    *,
    shown: Sequence[str],
    prohibited: Sequence[str],
    sides: tuple[int, int],
    photos: list[Path],
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """One picture with the emblems ``shown`` on it, at most two; what is not ``prohibited`` may look alike.

    Of ``size``, or of one between ``sides``.
    """
    photo = _open_photo(photos[int(rng.integers(len(photos)))]) if photos else None
    if size is None:
        limit = sides[1] if photo is None else min(sides[1], MAX_ENLARGEMENT * max(photo.size))
        size = _draw_size(rng, sides, limit)
    canvas = photo_background(rng, photo, size) if photo else draw_background(rng, size)
    # Look-alikes first, and two emblems side by side: an emblem is never hidden.
    innocent = LOOK_ALIKES | {name: draw for name, draw in EMBLEMS.items() if name not in prohibited}
    if rng.random() < (LOOK_ALIKE_BESIDE_EMBLEM if shown else LOOK_ALIKE_SHARE):
        for _ in range(1 if rng.random() < 0.8 else 2):
            stamp(canvas, rng, innocent[str(rng.choice(list(innocent)))])
    for category, region in zip(shown, emblem_regions(canvas.size, len(shown)), strict=True):
        stamp(canvas, rng, EMBLEMS[category], region)
    return canvas


def _draw_size(rng: np.random.Generator, sides: tuple[int, int], limit: float) -> tuple[int, int]:
    low = min(1.3 * sides[0], sides[1])
    long_side = math.exp(rng.uniform(math.log(low), math.log(max(low, limit))))
    short_side = max(sides[0], long_side * rng.uniform(0.6, 1))
    size = (round(long_side), round(short_side))
    return size if rng.random() >= 0.35 else (size[1], size[0])


def emblem_regions(size: tuple[int, int], count: int) -> list[tuple[float, float, float, float]]:
    """The whole picture, or its two halves across the longer side."""
    if count < 2:
        return [(0.0, 0.0, 1.0, 1.0)][:count]
    if size[0] >= size[1]:
        return [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    return [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]


@lru_cache(maxsize=256)
def _open_photo(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def encode(rng: np.random.Generator, picture: Image.Image) -> tuple[bytes, str]:
    """The file's bytes and suffix: mostly JPEG, some WebP, and PNG where the picture is small."""
    draw = rng.random()
    buffer = io.BytesIO()
    if draw < 0.1 and max(picture.size) <= 800:
        picture.save(buffer, "PNG", compress_level=3)
        return buffer.getvalue(), "png"
    if draw < 0.2:
        picture.save(buffer, "WEBP", quality=int(rng.integers(60, 96)), method=0)
        return buffer.getvalue(), "webp"
    subsampling = "4:2:0" if rng.random() < 0.7 else "4:4:4"
    picture.save(buffer, "JPEG", quality=int(rng.integers(60, 96)), subsampling=subsampling)
    return buffer.getvalue(), "jpg"
