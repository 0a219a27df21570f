"""What a source lists: an S3 prefix, a report of S3 Inventory, a table of uris, a folder, or one object."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from botocore.exceptions import ClientError

from pipeline.errors import UsageError
from pipeline.listing.inventory import is_report, list_report
from pipeline.schema import LISTED
from pipeline.storage import Location, list_side_by_side, parse_uri, read_object, s3_client

TOLD = ("uri", "size_bytes", "etag", "modified_at")
"""What a table of uris may say of each."""
BLANK = dict.fromkeys(("size_bytes", "etag", "modified_at"))
"""What a source does not tell of an object."""
LISTED_CHUNK = 20_000
"""Rows that a listing is handed on in."""
# Base names that are not listed: bookkeeping of tools, hidden files, tables.
DEFAULT_EXCLUDE = ("_*", ".*", "*.parquet")


def image_id(uri: str, etag: str | None) -> str:
    """Stable id of one object version."""
    return hashlib.blake2b(f"{uri}\0{etag or ''}".encode(), digest_size=16).hexdigest()


def kind_of(source: str) -> Literal["report", "table", "folder", "prefix"]:
    location = parse_uri(source)
    if is_report(location):
        return "report"
    if location.key.endswith((".parquet", ".csv")):
        return "table"
    return "folder" if location.bucket is None else "prefix"


def list_source(source: str, exclude: tuple[str, ...], endpoint_url: str | None) -> Iterator[dict[str, Any]]:
    """Rows (uri, size_bytes, etag, modified_at) of everything in the source. Raises UsageError."""
    location = parse_uri(source)
    match kind_of(source):
        case "report":
            rows = list_report(location, endpoint_url)
        case "table":
            rows = _list_table(location, endpoint_url)
        case "folder":
            rows = _list_folder(Path(location.key))
        case "prefix":
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
