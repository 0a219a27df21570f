"""Labelled pictures: which there are, what each shows, and how they are read. What training and measuring work on."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.listing.source import DEFAULT_EXCLUDE, list_source
from pipeline.plan import Preparation
from pipeline.review.decisions import FOLDER, read_all, source_labels
from pipeline.schema import LABELS
from pipeline.steps.decode import Decoder
from pipeline.steps.fetch import Fetcher
from pipeline.storage import READ_PATIENCE, parse_uri, read_object, reason
from pipeline.store import Store
from pipeline.window import Image, Window


def read_labels(uri: str, endpoint_url: str | None = None) -> pa.Table:
    """A labels file (uri, category, label) as a table. Raises UsageError when it is not one."""
    try:
        table = pq.read_table(io.BytesIO(read_object(parse_uri(uri), endpoint_url)))
        table = table.select(LABELS.names).cast(LABELS)
    except FileNotFoundError as error:
        raise UsageError(f"labels {uri}: no such file") from error
    except (KeyError, ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(f"labels {uri}: wanted Parquet with {', '.join(LABELS.names)}; {reason(error)}") from error
    values = set(pc.unique(table["label"]).to_pylist())
    if not values <= {0, 1}:
        raise UsageError(f"labels {uri}: labels are {sorted(values, key=str)}, but only 0 and 1 are labels")
    return table


def is_reviews(source: str) -> bool:
    """Whether a source of labels is the ``reviews/`` of an output, that is what people decided on the review page."""
    return source.rstrip("/").rpartition("/")[2] == FOLDER


def read_reviewed(uri: str, categories: tuple[str, ...], endpoint_url: str | None = None) -> pa.Table:
    """What stands of the decisions below an output's ``reviews/``, as labels of these categories.

    Raises UsageError when there are none.
    """
    store = Store(uri.rstrip("/").rpartition("/")[0] or ".", endpoint_url, patience=READ_PATIENCE)
    table = source_labels(read_all(store)[0])
    table = table.filter(pc.is_in(table["category"], pa.array(categories, pa.string())))
    if not table.num_rows:
        raise UsageError(
            f"labels {uri}: no decision in it gives a label of {list(categories)}; review with jobs.review first"
        )
    return table


def label_folder(uri: str, categories: tuple[str, ...], endpoint_url: str | None = None) -> pa.Table:
    """A folder per class, local or below an s3:// prefix, as a table (uri, category, label).

    A picture shows the category that its folder is called by, and no other; a folder of another name
    holds pictures that show none. Raises UsageError.
    """
    uris = sorted(row["uri"] for row in list_source(uri, DEFAULT_EXCLUDE, endpoint_url))
    if not uris:
        raise UsageError(f"labels {uri}: there are no pictures in it; wanted a folder per class with pictures in it")
    classes = [uri.rsplit("/", 2)[-2] for uri in uris]
    absent = sorted(set(categories) - set(classes))
    if absent:
        found = ", ".join(sorted(set(classes))[:20])
        raise UsageError(f"labels {uri}: no folder is called {', '.join(absent)}; there are {found}")
    rows = [
        {"uri": uri, "category": category, "label": int(name == category)}
        for uri, name in zip(uris, classes, strict=True)
        for category in categories
    ]
    return pa.Table.from_pylist(rows, LABELS)


@dataclass(frozen=True, kw_only=True)
class LabelledPictures:
    """Which pictures there are, and what each shows: ``labels_NK`` bool."""

    uris: list[str]
    labels_NK: np.ndarray

    def part(self, chosen_N: np.ndarray) -> LabelledPictures:
        uris = [uri for uri, wanted in zip(self.uris, chosen_N, strict=True) if wanted]
        return LabelledPictures(uris=uris, labels_NK=self.labels_NK[chosen_N])


UNKNOWN = -1


def read_labelled(
    sources: tuple[str, ...], categories: tuple[str, ...], endpoint_url: str | None = None
) -> LabelledPictures:
    """Every picture of these labels files (``.parquet``) or folders, once; one that no label calls violating in a
    category is not. Raises UsageError."""
    uris, known_NK, _ = read_known(sources, categories, endpoint_url)
    return LabelledPictures(uris=uris, labels_NK=known_NK == 1)


def read_known(
    sources: tuple[str, ...], categories: tuple[str, ...], endpoint_url: str | None = None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The same as (uris, labels (N, K) of 1, 0 and ``UNKNOWN``, which source (N,) names each first).

    What several files say of a picture is in one row.
    """
    tables = [
        read_labels(source, endpoint_url)
        if source.endswith(".parquet")
        else read_reviewed(source, categories, endpoint_url)
        if is_reviews(source)
        else label_folder(source, categories, endpoint_url)
        for source in sources
    ]
    for source, table in zip(sources, tables, strict=True):
        unknown = set(pc.unique(table["category"]).to_pylist()) - set(categories)
        if unknown:
            raise UsageError(f"labels {source}: categories {sorted(unknown)} are not among {list(categories)}")
    table = pa.concat_tables([LABELS.empty_table(), *tables])
    names = pc.unique(table["uri"])
    rows = pc.index_in(table["uri"], names).to_numpy()
    columns = pc.index_in(table["category"], pa.array(categories, pa.string())).to_numpy()
    said = table["label"].to_numpy()
    known_NK = np.full((len(names), len(categories)), UNKNOWN, dtype=np.int8)
    known_NK[rows, columns] = said
    both = known_NK[rows, columns] != said
    ends = np.cumsum([len(table) for table in tables])
    if both.any():
        row = int(np.argmax(both))
        same = np.flatnonzero((rows == rows[row]) & (columns == columns[row]))
        where = sorted({sources[int(np.searchsorted(ends, place, side="right"))] for place in same})
        raise UsageError(
            f"labels {', '.join(where)}: {names[int(rows[row])]} is labelled both with and without category "
            f"{categories[int(columns[row])]!r}, and {int(both.sum()) - 1} more are so: remove one of the labels"
        )
    first_N = np.unique(rows, return_index=True)[1]
    return names.to_pylist(), known_NK, np.searchsorted(ends, first_N, side="right")


def split_off(pictures: LabelledPictures, share: float) -> tuple[LabelledPictures, LabelledPictures]:
    """The pictures to learn from, and a ``share`` to judge by.

    Chosen by the last two parts of the uri, so that they are the same ones wherever the folder lies.
    """
    digests = [hashlib.sha256("/".join(uri.split("/")[-2:]).encode()).digest()[:8] for uri in pictures.uris]
    held_N = np.array([int.from_bytes(digest, "big") < share * 2**64 for digest in digests])
    return pictures.part(~held_N), pictures.part(held_N)


class PictureReader:
    """``chunks -> pictures``: fetches and decodes as a scan does. An unreadable picture is named in its row."""

    def __init__(self, side: int, endpoint_url: str | None) -> None:
        limits = Preparation()
        self.fetcher = Fetcher(None, endpoint_url, limits)
        self.decoder = Decoder("decode", side, limits)
        self.decoder.start()

    def __call__(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows (first, uris) to rows of ``schema.PICTURES``."""
        return [self._read(chunk["first"], chunk["uris"]) for chunk in chunks]

    def _read(self, first: int, uris: list[str]) -> dict[str, Any]:
        images = [Image(image_id=uri, uri=uri) for uri in uris]
        (window,) = self.decoder([self.fetcher.fetch(Window(shard=0, window=0, first_ordinal=first, images=images))])
        seconds = sum(work.seconds for work in window.work if work.operator == "decode")
        row: dict[str, Any] = {"first": first, "pixels": None, "decode_seconds": seconds, "uri": None, "error": None}
        for image in images:
            if image.outcome == "error":
                return row | {"uri": image.uri, "error": f"{image.error_code}: {image.error_detail}"}
        assert window.pixels is not None
        return row | {"pixels": window.pixels.tobytes()}
