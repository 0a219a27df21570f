"""From manifest rows to bytes. What cannot be fetched is an error of its own, never an exception.

obstore fetches, many requests in flight; boto3 fetches the keys that obstore cannot name.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import obstore
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError
from obstore import exceptions as failures

from pipeline.errors import UsageError
from pipeline.plan import Preparation
from pipeline.source import file_etag
from pipeline.storage import Location, Store, is_plain_key, open_bucket, parse_uri, reason, s3_client
from pipeline.window import Image, Window, Work

OPERATOR = "fetch"


class WindowRef(TypedDict):
    """Where a window stands in the manifest."""

    shard: int
    window: int
    key: str
    first_row: int
    rows: int


class FetchError(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Fetcher:
    """``refs -> windows``, every image with its payload or with an error."""

    def __init__(self, output: str, endpoint_url: str | None, limits: Preparation) -> None:
        self.output = output
        self.endpoint_url = endpoint_url
        self.limits = limits

    def __call__(self, refs: list[WindowRef]) -> list[Window]:
        return [self.fetch(self._read_window(ref)) for ref in refs]

    def _read_window(self, ref: WindowRef) -> Window:
        manifest = _open_manifest(self.output, self.endpoint_url, ref["key"])
        rows = _read_rows(manifest, ref["first_row"], ref["rows"])
        images = [
            Image(**{name: row[name] for name in ("image_id", "uri", "size_bytes", "etag", "modified_at")})
            for row in rows
        ]
        return Window(shard=ref["shard"], window=ref["window"], first_ordinal=rows[0]["ordinal"], images=images)

    def fetch(self, window: Window) -> Window:
        """Gives every image its payload or its error."""
        began = time.perf_counter()
        asyncio.run(self._fetch_all(window.images))
        window.work.append(
            Work(
                operator=OPERATOR,
                images_in=len(window.images),
                images_out=len(window.undecided),
                seconds=time.perf_counter() - began,
            )
        )
        return window

    async def _fetch_all(self, images: list[Image]) -> None:
        slots = asyncio.Semaphore(self.limits.fetch_concurrency)

        async def fetch(image: Image) -> None:
            async with slots:
                try:
                    image.payload = await self._fetch(image)
                except FetchError as error:
                    image.fail(error.code, error.detail)

        await asyncio.gather(*(fetch(image) for image in images))

    async def _fetch(self, image: Image) -> bytes:
        limit = self.limits.max_megabytes * 1_000_000
        if image.size_bytes is not None and image.size_bytes > limit:
            raise FetchError("too_large", f"{image.size_bytes:,} bytes are over the limit of {limit:,}")
        try:
            location = parse_uri(image.uri)
        except UsageError as error:
            raise FetchError("fetch_failed", str(error)) from error
        if location.bucket is None:
            payload = await asyncio.to_thread(_read_file, location, image.etag)
        elif is_plain_key(location.key):
            payload = await self._get(location, image.etag, limit)
        else:
            payload = await asyncio.to_thread(self._get_by_boto3, location, image.etag, limit)
        if image.size_bytes is not None and len(payload) != image.size_bytes:
            raise FetchError("fetch_short", f"{len(payload):,} bytes came of {image.size_bytes:,}")
        return payload

    async def _get(self, location: Location, etag: str | None, limit: int) -> bytes:
        assert location.bucket is not None
        store = open_bucket(location.bucket, None, self.endpoint_url)
        try:
            response = await obstore.get_async(store, location.key)
            _check_object(response.meta["e_tag"], response.meta["size"], etag, limit)
            return bytes(await response.bytes_async())
        except (FileNotFoundError, failures.NotFoundError) as error:
            raise FetchError("fetch_not_found", "gone since it was listed") from error
        except (failures.PermissionDeniedError, failures.UnauthenticatedError) as error:
            raise FetchError("fetch_denied", reason(error)) from error
        except (failures.BaseError, OSError) as error:
            raise FetchError("fetch_failed", reason(error)) from error

    def _get_by_boto3(self, location: Location, etag: str | None, limit: int) -> bytes:
        assert location.bucket is not None
        try:
            response = s3_client(self.endpoint_url).get_object(Bucket=location.bucket, Key=location.key)
            _check_object(response["ETag"], response["ContentLength"], etag, limit)
            return response["Body"].read()
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = {404: "fetch_not_found", 403: "fetch_denied", 401: "fetch_denied"}.get(status or 0, "fetch_failed")
            raise FetchError(code, reason(error)) from error
        except (BotoCoreError, OSError) as error:
            raise FetchError("fetch_failed", reason(error)) from error


def _check_object(found_etag: str | None, size: int, listed_etag: str | None, limit: int) -> None:
    """The object must still be the one that was listed: its verdict will be stored under that id."""
    if listed_etag and found_etag and found_etag.strip('"') != listed_etag:
        raise FetchError("fetch_changed", f"etag was {listed_etag} when listed, now it is {found_etag}")
    if size > limit:
        raise FetchError("too_large", f"{size:,} bytes are over the limit of {limit:,}")


def _read_file(location: Location, etag: str | None) -> bytes:
    try:
        path = Path(location.key)
        if path.exists() and not path.is_file():
            raise FetchError("fetch_failed", "not a regular file")
        payload = path.read_bytes()
        now = file_etag(os.stat(path))
    except FileNotFoundError as error:
        raise FetchError("fetch_not_found", "gone since it was listed") from error
    except PermissionError as error:
        raise FetchError("fetch_denied", error.strerror or "permission denied") from error
    except (OSError, ValueError) as error:
        raise FetchError("fetch_failed", str(error)) from error
    if etag and now != etag:
        raise FetchError("fetch_changed", "written to since it was listed")
    return payload


@lru_cache(maxsize=2)
def _open_manifest(output: str, endpoint_url: str | None, key: str) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(Store(output, endpoint_url).read(key)))


def _read_rows(manifest: pq.ParquetFile, first: int, count: int) -> list[dict]:
    """A slice of the file, from the row groups that hold it."""
    start, offset = 0, 0
    groups: list[int] = []
    for index in range(manifest.num_row_groups):
        rows = manifest.metadata.row_group(index).num_rows
        if start + rows > first and start < first + count:
            if not groups:
                offset = start
            groups.append(index)
        start += rows
    return manifest.read_row_groups(groups).slice(first - offset, count).to_pylist()
