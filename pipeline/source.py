"""From a source to a frozen manifest: what is there, in which window, in which shard.

A listing is streamed to disk, sorted by DuckDB (out of core) by a salted hash of the image ids, and
cut into windows in that order. Neighbouring keys are alike, and calibration assumes that companions
are random. Shards are runs of whole windows, so their size never changes a window. Objects that an earlier
run has judged (``increment.py``) come last, in shards of their own: they are not companions of anybody.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import ne
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from botocore.exceptions import ClientError

from pipeline.errors import UsageError
from pipeline.increment import Earlier, Increment, count, judged, match
from pipeline.inventory import is_report, list_report
from pipeline.ordering import Sorter
from pipeline.plan import WindowSpec
from pipeline.schema import LISTED, MANIFEST, RANKED
from pipeline.storage import Location, list_side_by_side, parse_uri, read_object, s3_client
from pipeline.store import Store, digest

TOLD = ("uri", "size_bytes", "etag", "modified_at")
"""What a table of uris may say of each."""
BLANK = dict.fromkeys(("size_bytes", "etag", "modified_at"))
"""What a source does not tell of an object."""
LISTED_CHUNK = 20_000
ROW_GROUP = 4096
JOIN: dict[str, Any] = {"memory_limit": "1GB", "threads": 2, "preserve_insertion_order": "false"}
"""Of DuckDB. What does not fit it joins on disk, and each of many threads would want memory of its own."""
# Base names that are not listed: bookkeeping of tools, hidden files, tables.
DEFAULT_EXCLUDE = ("_*", ".*", "*.parquet")


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


def image_id(uri: str, etag: str | None) -> str:
    """Stable id of one object version."""
    return hashlib.blake2b(f"{uri}\0{etag or ''}".encode(), digest_size=16).hexdigest()


def list_source(source: str, exclude: tuple[str, ...], endpoint_url: str | None) -> Iterator[dict[str, Any]]:
    """Rows (uri, size_bytes, etag, modified_at) of everything in the source. Raises UsageError."""
    location = parse_uri(source)
    if is_report(location):
        rows = list_report(location, endpoint_url)
    elif location.key.endswith((".parquet", ".csv")):
        rows = _list_table(location, endpoint_url)
    elif location.bucket is None:
        rows = _list_folder(Path(location.key))
    else:
        rows = _list_s3(location, endpoint_url)
    excluded = re.compile("|".join(map(fnmatch.translate, exclude)) or r"(?!)").match
    for row in rows:
        name = row["uri"].rsplit("/", 1)[-1]
        if not name and not row["size_bytes"]:
            continue  # consoles make such objects to show a folder; with content it is an object like any other
        if not excluded(name):
            yield row


def _list_folder(folder: Path) -> Iterator[dict[str, Any]]:
    if not folder.is_dir():
        raise UsageError(f"source {folder}: no such folder")

    def refuse(error: OSError) -> None:
        # An unreadable folder left out in silence would be images lost.
        raise UsageError(f"source {folder}: cannot list {error.filename}: {error.strerror}") from error

    walked: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        # A link may lead back to a folder above it.
        walked.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) not in walked]
        for name in names:
            yield list_file(os.path.join(parent, name))


def list_file(path: str) -> dict[str, Any]:
    """The row of one local file. Gone or unreadable, it is listed by name: fetch will say so, by error row."""
    listed = BLANK | {"uri": Location(None, path).uri}
    try:
        status = os.stat(path)
    except OSError:
        return listed
    modified_at = datetime.fromtimestamp(status.st_mtime, UTC)
    return listed | {"size_bytes": status.st_size, "etag": file_etag(status), "modified_at": modified_at}


def list_object(uri: str, endpoint_url: str | None) -> dict[str, Any]:
    """The row of one object as it is now. Gone or out of reach, it is listed by name."""
    location = parse_uri(uri)
    if location.bucket is None:
        return list_file(location.key)
    listed = BLANK | {"uri": uri}
    try:
        head = s3_client(endpoint_url).head_object(Bucket=location.bucket, Key=location.key)
    except ClientError:
        return listed  # fetching will say so, by error row
    etag, modified_at = head["ETag"].strip('"'), head["LastModified"]
    return listed | {"size_bytes": head["ContentLength"], "etag": etag, "modified_at": modified_at}


def file_etag(status: os.stat_result) -> str:
    """What stands in for an etag on a local disk."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _list_s3(location: Location, endpoint_url: str | None) -> Iterator[dict[str, Any]]:
    """Lists the sub-prefixes side by side: one listing after the other is the limit in a large bucket."""
    for entry in list_side_by_side(location, endpoint_url):
        yield {
            "uri": f"s3://{location.bucket}/{entry['Key']}",
            "size_bytes": entry["Size"],
            "etag": entry["ETag"].strip('"'),
            "modified_at": entry["LastModified"],
        }


def _list_table(location: Location, endpoint_url: str | None) -> Iterator[dict[str, Any]]:
    """A file of uris: column ``uri``, and ``size_bytes``, ``etag``, ``modified_at`` where it has them."""
    try:
        local = location.bucket is None
        with open(location.key, "rb") if local else io.BytesIO(read_object(location, endpoint_url)) as body:
            for table in _uri_tables(location, body):
                yield from _uri_rows(location, table)
    except FileNotFoundError as error:
        raise UsageError(f"source {location.uri}: no such file") from error
    except pa.ArrowException as error:
        raise UsageError(f"source {location.uri}: cannot be read as a table of uris: {error}") from error


def _uri_tables(location: Location, body: BinaryIO) -> Iterator[pa.Table]:
    """What the file has of ``LISTED``'s columns, some rows at a time: as Python objects a key takes a kilobyte."""
    batches: Iterable[pa.RecordBatch]
    if location.key.endswith(".parquet"):
        file = pq.ParquetFile(body)
        there, batches = file.schema_arrow.names, file.iter_batches(LISTED_CHUNK)
    else:
        there = pyarrow.csv.open_csv(body).schema.names
        body.seek(0)
        # Columns of others would have to stay what their first rows are taken for, and etags of digits would be
        # numbers. Sizes of which some are missing are written with a point by some.
        types = {"uri": pa.string(), "etag": pa.string(), "size_bytes": pa.float64()}
        wanted = [name for name in TOLD if name in there]
        options = pyarrow.csv.ConvertOptions(column_types=types, include_columns=wanted)
        batches = pyarrow.csv.open_csv(body, convert_options=options)
    if "uri" not in there:
        raise UsageError(f"source {location.uri}: no column 'uri' among {there}")
    columns = pa.schema([LISTED.field(name) for name in TOLD if name in there])
    for batch in batches:
        try:
            yield pa.Table.from_batches([batch]).select(columns.names).cast(columns)
        except (pa.ArrowException, ValueError) as error:
            raise UsageError(f"source {location.uri}: {error}") from error


def _uri_rows(location: Location, table: pa.Table) -> Iterator[dict[str, Any]]:
    for row in table.to_pylist():
        if not row["uri"]:
            raise UsageError(f"source {location.uri}: a row has no uri")
        uri = parse_uri(row["uri"]).uri  # a local path gets its file:// form; what is neither is refused here
        yield BLANK | row | {"uri": uri, "etag": row["etag"].strip('"') if row.get("etag") else None}


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
        sorter, writer, cutter = Sorter(folder), _ShardWriter(store, prefix), _Cutter(window, shard_size)
        listed = _ranked(rows, salt)
        increment = None
        if earlier is None:
            for table in listed:
                sorter.add(_unjudged(table))
        else:
            increment = _join(listed, earlier, folder, sorter)
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


def _join(listed: Iterable[pa.Table], earlier: Earlier, folder: Path, sorter: Sorter) -> Increment | None:
    """Hands on what is listed, with the verdicts that stand. None when nothing is listed."""
    there = folder / "listed"
    there.mkdir()
    for number, table in enumerate(listed):
        pq.write_table(table, there / f"{number:06d}.parquet")
    if not any(there.iterdir()):
        return None
    with duckdb.connect(config=JOIN | {"temp_directory": f"{folder}/join"}) as connection:
        match(connection, there, earlier)
        for batch in judged(connection).to_arrow_reader(LISTED_CHUNK):
            sorter.add(pa.Table.from_batches([batch]).cast(RANKED))
        return count(connection)


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
