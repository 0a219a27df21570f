"""An S3 Inventory report as a source: what AWS has listed of a bucket, without a request for each thousand keys.

``--source`` names the report's ``manifest.json``. Its data files are CSV, ORC or Parquet; each is checked against the
digest that the report gives of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.csv
import pyarrow.orc
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.storage import Location, read_object

# The folder of one report, as S3 names it by its date.
DATED = re.compile(r"/\d{4}-\d\d-\d\dT\d\d-\d\dZ/manifest\.json$")
ROWS = 50_000
# The fields that are read, without "_" and in lower case: each format spells them in its own way.
FIELDS = ("bucket", "key", "size", "lastmodifieddate", "etag", "islatest", "isdeletemarker")


def is_report(location: Location) -> bool:
    return location.key.endswith("/manifest.json")


def scope(source: str) -> str:
    """What the source of one night has in common with that of another: of a report all but its date."""
    return DATED.sub("", source)


def list_report(location: Location, endpoint_url: str | None) -> Iterator[dict[str, Any]]:
    """Rows as ``source.list_source`` gives them, of current versions only. Raises UsageError."""
    try:
        report = json.loads(read_object(location, endpoint_url))
        bucket, kind = report["sourceBucket"], report["fileFormat"].upper()
        files = [(file["key"], file["MD5checksum"]) for file in report["files"]]
        destination = report["destinationBucket"].removeprefix("arn:aws:s3:::")
        names = [name.strip() for name in report["fileSchema"].split(",")] if kind == "CSV" else []
    except FileNotFoundError as error:
        raise UsageError(f"source {location.uri}: no such report") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"source {location.uri}: not the manifest.json of an S3 Inventory report: {error!r}"
        ) from error
    for key, md5 in files:
        place = _beside(location, destination, key)
        try:
            body = read_object(place, endpoint_url)
        except FileNotFoundError as error:
            raise UsageError(f"source {location.uri}: its data file {place.uri} is gone") from error
        if hashlib.md5(body, usedforsecurity=False).hexdigest() != md5:
            raise UsageError(f"source {location.uri}: {place.uri} is not what the report says of it; take another one")
        try:
            yield from _rows(_tables(body, kind, names), bucket, encoded=kind == "CSV")
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            raise UsageError(f"source {location.uri}: {place.uri} cannot be read: {error}") from error


def _beside(report: Location, destination: str, key: str) -> Location:
    """Where a data file is: in the bucket the report names; of a copy on disk, in the folder beside the dated one."""
    if report.bucket is not None:
        return Location(destination, key)
    return Location(None, str(Path(report.key).parents[1] / "data" / key.rpartition("/")[2]))


def _tables(body: bytes, kind: str, names: list[str]) -> Iterator[pa.Table]:
    if kind == "CSV":
        # Everything as text: S3 quotes every field, and a key may look like a number.
        convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        read = pyarrow.csv.ReadOptions(column_names=names)
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        plain = pa.CompressedInputStream(pa.BufferReader(body), "gzip")
        for batch in pyarrow.csv.open_csv(plain, read, parse, convert):
            yield pa.Table.from_batches([batch])
    elif kind == "PARQUET":
        for batch in pq.ParquetFile(io.BytesIO(body)).iter_batches(ROWS):
            yield pa.Table.from_batches([batch])
    elif kind == "ORC":
        file = pyarrow.orc.ORCFile(pa.BufferReader(body))
        for stripe in range(file.nstripes):
            yield pa.Table.from_batches([file.read_stripe(stripe)])
    else:
        raise ValueError(f"format {kind!r} is not CSV, ORC or Parquet")


def _rows(tables: Iterator[pa.Table], bucket: str, *, encoded: bool) -> Iterator[dict[str, Any]]:
    for table in tables:
        plain = table.rename_columns([name.replace("_", "").lower() for name in table.column_names])
        if "key" not in plain.column_names:
            raise KeyError(f"no column of keys among {table.column_names}")
        for row in plain.select([name for name in FIELDS if name in plain.column_names]).to_pylist():
            # Without versions in the report every row is current.
            if _is(row.get("isdeletemarker"), False) and _is(row.get("islatest"), True):
                yield _row(row, bucket, encoded=encoded)


def _is(value: Any, wanted: bool) -> bool:
    """Whether a field that may be missing, a word or a truth value is what is wanted; missing it is."""
    return value in (None, "") or (str(value).lower() == "true") == wanted


def _row(row: dict[str, Any], bucket: str, *, encoded: bool) -> dict[str, Any]:
    key = unquote_plus(row["key"]) if encoded else row["key"]
    size, etag = row.get("size"), row.get("etag")
    return {
        "uri": f"s3://{bucket}/{key}",
        "size_bytes": int(size) if size not in (None, "") else None,
        "etag": etag.strip('"') if etag else None,
        "modified_at": _moment(row.get("lastmodifieddate")),
    }


def _moment(value: Any) -> datetime | None:
    """A time in UTC, from text (CSV) or from a timestamp with or without a zone (ORC, Parquet)."""
    if value in (None, ""):
        return None
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
