"""A labelled corpus of pictures, some with the prohibited emblem, written to any store.

Every picture is drawn from ``(seed, index)`` alone, so the corpus is the same on any number of
cores. ``labels.parquet`` (uri, category, label) is written last, beside the pictures.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
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

from pipeline.emblem import (
    LOOK_ALIKES,
    draw_background,
    draw_emblem,
    photo_background,
    stamp,
)
from pipeline.errors import UsageError
from pipeline.schema import LABELS
from pipeline.storage import Store

CATEGORY = "emblem"
# Share of the pictures without the emblem that carry a look-alike; and of those with it.
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
    """Share of the pictures that carry the emblem."""
    seed: int = 1
    """The same seed gives the same pictures."""
    sides: tuple[int, int] = (200, 1600)
    """Shortest and longest side in pixels."""
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
        if not 32 <= self.sides[0] <= self.sides[1]:
            raise UsageError(f"sides are {self.sides}, but they must be rising and at least 32 px")


def make_corpus(config: CorpusConfig) -> int:
    """Writes the pictures, then their labels; returns the number of positives."""
    photos = list_photos(config.backgrounds, config.backgrounds_part) if config.backgrounds else []
    positive = np.zeros(config.images, dtype=bool)
    chosen = np.random.default_rng(config.seed).permutation(config.images)
    positive[chosen[: round(config.images * config.prevalence)]] = True
    uris: list[str] = []
    with ProcessPoolExecutor(config.processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_write_pictures, config, photos, chunk, positive[chunk])
            for chunk in np.array_split(np.arange(config.images), math.ceil(config.images / 50))
        ]
        for job in jobs:
            uris += job.result()
    labels = pa.table({"uri": uris, "category": [CATEGORY] * len(uris), "label": positive.astype(np.int8)}, LABELS)
    buffer = io.BytesIO()
    pq.write_table(labels, buffer)
    Store(config.output, config.endpoint_url).write("labels.parquet", buffer.getvalue())
    return int(positive.sum())


def list_photos(folder: Path, part: Part) -> list[Path]:
    """The photographs of one part, by sorted name: a fixed list that needs no file of its own."""
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    names = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    wanted = {"all": range(5), "train": range(3), "held-out": range(3, 5)}[part]
    photos = [path for index, path in enumerate(names) if index % 5 in wanted]
    if not photos:
        raise UsageError(f"no photographs ({', '.join(sorted(suffixes))}) of part {part!r} in {folder}")
    return photos


def _write_pictures(config: CorpusConfig, photos: list[Path], indices: np.ndarray, positive: np.ndarray) -> list[str]:
    store = Store(config.output, config.endpoint_url)
    uris = []
    for index, violating in zip(indices.tolist(), positive.tolist(), strict=True):
        rng = np.random.default_rng([config.seed, index])
        picture = draw_picture(rng, violating=violating, sides=config.sides, photos=photos)
        body, suffix = encode(rng, picture)
        uris.append(store.write(f"{index // 1000:04d}/{index:07d}.{suffix}", body))
    return uris


def draw_picture(
    rng: np.random.Generator, *, violating: bool, sides: tuple[int, int], photos: list[Path]
) -> Image.Image:
    """One picture; ``violating`` decides whether the emblem is on it."""
    photo = _open_photo(photos[int(rng.integers(len(photos)))]) if photos else None
    limit = sides[1] if photo is None else min(sides[1], MAX_ENLARGEMENT * max(photo.size))
    low = min(1.3 * sides[0], sides[1])
    long_side = math.exp(rng.uniform(math.log(low), math.log(max(low, limit))))
    short_side = max(sides[0], long_side * rng.uniform(0.6, 1))
    size = (round(long_side), round(short_side))
    if rng.random() < 0.35:
        size = (size[1], size[0])
    canvas = photo_background(rng, photo, size) if photo else draw_background(rng, size)
    for draw in _choose_signs(rng, violating):
        stamp(canvas, rng, draw)
    return canvas


def _choose_signs(rng: np.random.Generator, violating: bool) -> Iterator:
    """Look-alikes first, so that the emblem is never hidden under one."""
    if rng.random() < (LOOK_ALIKE_BESIDE_EMBLEM if violating else LOOK_ALIKE_SHARE):
        names = list(LOOK_ALIKES)
        for _ in range(1 if rng.random() < 0.8 else 2):
            yield LOOK_ALIKES[names[int(rng.integers(len(names)))]]
    if violating:
        yield draw_emblem


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
