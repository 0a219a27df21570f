"""Labelled pictures as arrays: what training and measuring work on."""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.picture import PictureError, decode_picture
from pipeline.schema import LABELS
from pipeline.storage import parse_uri, read_object


def read_labels(uri: str, endpoint_url: str | None = None) -> pa.Table:
    """A labels file (uri, category, label) as a table. Raises UsageError when it is not one."""
    try:
        table = pq.read_table(io.BytesIO(read_object(parse_uri(uri), endpoint_url)))
        table = table.select(LABELS.names).cast(LABELS)
    except FileNotFoundError as error:
        raise UsageError(f"labels {uri}: no such file") from error
    except (KeyError, ValueError, pa.ArrowException, obstore.exceptions.BaseError) as error:
        raise UsageError(f"labels {uri}: wanted Parquet with {', '.join(LABELS.names)}; {error}") from error
    values = set(pc.unique(table["label"]).to_pylist())
    if not values <= {0, 1}:
        raise UsageError(f"labels {uri}: labels are {sorted(values, key=str)}, but only 0 and 1 are labels")
    return table


def load_examples(
    uris: list[str], categories: tuple[str, ...], side: int, cache: Path, endpoint_url: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, side, side, 3) and labels bool (N, K) of every picture in these labels files.

    Decoded once and kept below ``cache``. Unreadable pictures are an error that names the first.
    """
    pixels, labels = [], []
    for uri in uris:
        table = read_labels(uri, endpoint_url)
        unknown = set(pc.unique(table["category"]).to_pylist()) - set(categories)
        if unknown:
            raise UsageError(f"labels {uri}: categories {sorted(unknown)} are not among {list(categories)}")
        names = pc.unique(table["uri"]).to_pylist()
        row = {name: index for index, name in enumerate(names)}
        truth = np.zeros((len(names), len(categories)), dtype=bool)
        for name, category, label in zip(*(table[column].to_pylist() for column in LABELS.names), strict=True):
            truth[row[name], categories.index(category)] = bool(label)
        labels.append(truth)
        content = hashlib.sha256(f"{table.to_pylist()} {side}".encode()).hexdigest()[:16]
        pixels.append(_decoded(cache / f"{content}.npy", names, side, endpoint_url))
    return np.concatenate(pixels), np.concatenate(labels)


def _decoded(path: Path, names: list[str], side: int, endpoint_url: str | None) -> np.ndarray:
    """The pictures of one labels file, memory-mapped; made on the first call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        chunks = [names[start : start + 200] for start in range(0, len(names), 200)]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(_decode_chunk, chunk, side, endpoint_url) for chunk in chunks]
            pixels = np.concatenate([future.result() for future in futures])
        partial = path.with_suffix(".part.npy")
        np.save(partial, pixels)
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def _decode_chunk(uris: list[str], side: int, endpoint_url: str | None) -> np.ndarray:
    pixels = []
    for uri in uris:
        try:
            pixels.append(decode_picture(read_object(parse_uri(uri), endpoint_url), side).pixels)
        except PictureError as error:
            raise UsageError(f"{uri}: {error.code}: {error.detail}; remove it from the labels") from error
    return np.stack(pixels)
