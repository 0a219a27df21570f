"""From a listing to a frozen manifest: which object is in which window, in which shard.

A listing is streamed to disk, sorted by a salted hash of the image ids (``ordering.py``), and cut into windows in that
order. Neighbouring keys are alike, and calibration assumes that companions are random. Shards are runs of whole
windows, so their size never changes a window. Objects that an earlier run has judged (``increment.py``) come last, in
shards of their own: they are not companions of anybody.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import ne
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.listing.increment import Earlier, Increment, compare
from pipeline.listing.ordering import Sorter
from pipeline.listing.source import LISTED_CHUNK, image_id
from pipeline.plan import WindowSpec
from pipeline.schema import LISTED, MANIFEST, RANKED
from pipeline.store import Store, digest

ROW_GROUP = 4096
ORDER = ("image_id", "ascending"), ("uri", "ascending")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A slice of the manifest: the unit of commit and of resume."""

    index: int
    images: int
    windows: int
    key: str
    sha256: str
    """Of the manifest file."""
    judged: bool = False
    """Whether an earlier run has judged all of it, so that nothing is to be tested."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    shards: tuple[Shard, ...]
    duplicates: int
    """Objects that the source listed more than once; they are tested once."""
    canaries: int
    largest_window_bytes: int
    """As listed."""
    increment: Increment | None = None
    """Against an earlier run, when there was one to compare with."""

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)


def build_manifest(
    rows: Iterable[dict[str, Any]],
    store: Store,
    prefix: str,
    *,
    salt: str,
    window: WindowSpec,
    shard_size: int,
    earlier: Earlier | None = None,
) -> Manifest:
    """Writes one manifest file per shard below ``prefix``. Zero rows make zero shards.

    ``earlier``: what an earlier run says of the objects it listed.
    """
    with tempfile.TemporaryDirectory(prefix="dorfman-manifest-") as name:
        folder = Path(name)
        sorter, writer, cutter = _JudgedLast(folder), _ShardWriter(store, prefix), _Cutter(window, shard_size)
        listed = _ranked(rows, salt)
        increment = None
        if earlier is None:
            for table in listed:
                sorter.add(_unjudged(table))
        else:
            increment = compare(listed, earlier, folder, sorter.add)
        duplicates = canaries = 0
        last_id = None
        for table in sorter.read():
            for start in range(0, len(table), LISTED_CHUNK):
                part = table.slice(start, LISTED_CHUNK)
                ids = part["image_id"].to_pylist()
                once = part.filter(list(map(ne, ids, [last_id, *ids])))
                last_id = ids[-1]
                duplicates += len(ids) - len(once)
                canaries += pc.sum(once["canary"]).as_py() or 0
                writer.add(cutter.cut(once))
        return Manifest(
            shards=tuple(writer.close()),
            duplicates=duplicates,
            canaries=canaries,
            largest_window_bytes=cutter.largest_bytes,
            increment=increment,
        )


def _ranked(rows: Iterable[dict[str, Any]], salt: str) -> Iterator[pa.Table]:
    """``schema.LISTED``, some thousand rows at a time."""
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, LISTED_CHUNK)):
        for row in chunk:
            row["image_id"] = image_id(row["uri"], row["etag"])
            row.setdefault("canary", False)
            digest = hashlib.blake2b(row["image_id"].encode(), key=key, digest_size=8).digest()
            row["rank"] = int.from_bytes(digest, "big", signed=True)
        yield pa.Table.from_pylist(chunk, LISTED)


def _unjudged(listed: pa.Table) -> pa.Table:
    """``schema.RANKED``, of objects that no earlier run has judged."""
    nothing = [pa.nulls(len(listed), field.type) for field in RANKED if field.name not in LISTED.names]
    return pa.table([*listed.columns, *nothing], schema=RANKED)


class _JudgedLast:
    """The order of the manifest: what is tested fills whole windows, and what is judged comes behind it."""

    def __init__(self, folder: Path) -> None:
        self.unjudged, self.judged = (Sorter(folder / name, RANKED, ORDER) for name in ("unjudged", "judged"))

    def add(self, table: pa.Table) -> None:
        judged = table["judged_run_id"].is_valid()
        for sorter, mine in ((self.unjudged, table.filter(pc.invert(judged))), (self.judged, table.filter(judged))):
            if mine.num_rows:
                sorter.add(mine)

    def read(self) -> Iterator[pa.Table]:
        return itertools.chain(self.unjudged.read(), self.judged.read())


def manifest_bytes(rows: pa.Table) -> bytes:
    """A manifest file, in row groups of which a window needs one or two."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd", row_group_size=ROW_GROUP)
    return buffer.getvalue()


class _Cutter:
    """Where in the manifest each image stands: its window and its shard, which is a run of whole windows."""

    def __init__(self, spec: WindowSpec, shard_size: int) -> None:
        self.spec, self.shard_size = spec, shard_size
        self.window, self.images, self.bytes = 0, 0, 0
        self.shard, self.shard_images = 0, 0
        self.ordinal = 0
        self.judged = False
        self.largest_bytes = 0

    def cut(self, rows: pa.Table) -> pa.Table:
        """The next rows, as ``schema.MANIFEST``."""
        judged = rows["judged_run_id"].is_valid()
        sizes = pc.if_else(judged, 0, rows["size_bytes"].fill_null(0))
        places = list(map(self._next, sizes.to_pylist(), judged.to_pylist()))
        placed = {
            "ordinal": range(self.ordinal, self.ordinal + len(rows)),
            "window": [window for window, _ in places],
            "shard": [shard for _, shard in places],
        }
        self.ordinal += len(rows)
        columns = {name: rows[name] for name in rows.column_names if name != "rank"}
        return pa.table(columns | placed).select(MANIFEST.names).cast(MANIFEST)

    def _next(self, size_bytes: int, judged: bool) -> tuple[int, int]:
        full = self.images == self.spec.images
        heavy = self.images > 0 and self.bytes + size_bytes > self.spec.megabytes * 1_000_000
        other = self.images > 0 and judged != self.judged
        if full or heavy or other:
            self.window, self.images, self.bytes = self.window + 1, 0, 0
            if other or self.shard_images >= self.shard_size:
                self.shard, self.shard_images = self.shard + 1, 0
        self.judged = judged
        self.images += 1
        self.shard_images += 1
        self.bytes += size_bytes
        self.largest_bytes = max(self.largest_bytes, self.bytes)
        return self.window, self.shard


class _ShardWriter:
    """One file for each shard. Its rows are compressed as they come: there may be a million."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix
        self.shards: list[Shard] = []
        self.open: _OpenShard | None = None

    def add(self, rows: pa.Table) -> None:
        """``rows``: of ``schema.MANIFEST``, in order."""
        for index in rows["shard"].unique().to_pylist():
            if self.open is None or index > len(self.shards):
                self.close()
                self.open = _OpenShard()
            self.open.add(rows.filter(pc.equal(rows["shard"], index)))

    def close(self) -> list[Shard]:
        """Ends the shard that is open, and gives all of them."""
        if self.open is not None:
            index = len(self.shards)
            key = f"{self.prefix}/shard-{index:05d}.parquet"
            body = self.open.close()
            self.store.write(key, body)
            images, windows, judged = self.open.images, len(self.open.windows), self.open.judged
            self.shards.append(
                Shard(index=index, images=images, windows=windows, key=key, sha256=digest(body), judged=judged)
            )
            self.open = None
        return self.shards


class _OpenShard:
    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.file = pq.ParquetWriter(self.buffer, MANIFEST, compression="zstd")
        self.images = 0
        self.windows: set[int] = set()
        self.judged = False

    def add(self, rows: pa.Table) -> None:
        self.file.write_table(rows, row_group_size=ROW_GROUP)
        self.images += len(rows)
        self.windows.update(rows["window"].unique().to_pylist())
        self.judged = rows["judged_run_id"][-1].is_valid

    def close(self) -> bytes:
        self.file.close()
        return self.buffer.getvalue()
