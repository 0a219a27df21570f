"""From manifest rows to bytes. What cannot be fetched is an error of its own, never an exception.

obstore fetches, many requests in flight; boto3 fetches the keys that obstore cannot name, and what only
it can check. Of local files each thread reads some. What fails for a reason that may pass is tried again
until the image's deadline.
Bytes that an earlier run has judged keep their verdict (``contents.py``).
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import os
import re
import stat
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypedDict

import obstore
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, ReadTimeoutError
from botocore.exceptions import ConnectTimeoutError as BotoConnectTimeoutError
from botocore.response import StreamingBody
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from tenacity import AsyncRetrying, retry_if_exception, stop_before_delay, wait_random_exponential
from urllib3.exceptions import HTTPError

from pipeline.errors import UsageError
from pipeline.listing.source import file_etag
from pipeline.past.contents import Contents
from pipeline.plan import Preparation
from pipeline.storage import Location, is_plain_key, open_bucket, parse_uri, reason, s3_client
from pipeline.store import Store
from pipeline.window import Image, Window, Work

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

OPERATOR = "fetch"
TRIES = 3
"""Requests that stall for which an image's deadline has room."""
REQUESTS_PER_READER = 4
"""Requests to a store that a plan has in flight for each thread that reads local files: more of them take turns."""
CHUNK_BYTES = 1 << 16
PASSING_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
LONGEST_PAUSE = 10.0
HASTE_SECONDS = 5.0
"""Deadline of a window's other images once a whole round of requests has used up theirs: the store is down."""
MD5 = re.compile(r"[0-9a-f]{32}")
THROTTLED = re.compile(r"\b(429|503|SlowDown)\b")


class WindowRef(TypedDict):
    """Where a window stands in the manifest."""

    shard: int
    window: int
    key: str
    sha256: str
    first_row: int
    rows: int


class FetchError(Exception):
    """Why there are no bytes. ``may_pass``: whether the same request can succeed a moment later."""

    def __init__(self, code: str, detail: str, *, may_pass: bool = False) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.may_pass = may_pass


class Fetcher:
    """``refs -> windows``, every image with its payload or with an error.

    ``output``: where the manifest is; None for who brings windows of their own to ``fetch``. ``contents``: what has a
    verdict already.
    """

    def __init__(
        self, output: Store | None, endpoint_url: str | None, limits: Preparation, contents: Contents | None = None
    ) -> None:
        self.output = output
        self.contents = contents
        self.endpoint_url = endpoint_url
        self.limits = limits
        self.overdue = 0
        self.readers = max(1, limits.fetch_concurrency // REQUESTS_PER_READER)
        self.read_seconds = 0.0
        """What the readers have taken of the deadline of this window's local files."""
        # Not asyncio's own: that one has few threads, and waits at the end for those that hang.
        self.threads = ThreadPoolExecutor(2 * limits.fetch_concurrency + self.readers)
        # Buckets with objects under a KMS key: their etags look like an MD5 and are none.
        self.encrypted: set[str] = set()

    def __call__(self, refs: list[WindowRef]) -> list[Window]:
        return [self.fetch(self._read_window(ref)) for ref in refs]

    def _read_window(self, ref: WindowRef) -> Window:
        assert self.output is not None
        rows = _read_rows(open_manifest(self.output, ref["key"], ref["sha256"]), ref["first_row"], ref["rows"])
        images = [
            Image(**{name: row[name] for name in ("image_id", "uri", "size_bytes", "etag", "modified_at", "canary")})
            for row in rows
        ]
        return Window(shard=ref["shard"], window=ref["window"], first_ordinal=rows[0]["ordinal"], images=images)

    def fetch(self, window: Window) -> Window:
        """Gives every image its payload or its error."""
        began = time.perf_counter()
        self.overdue = 0
        self._read_files(window.images)
        others = [image for image in window.images if image.payload is None]
        if others:
            asyncio.run(self._fetch_all(others))
        for image in window.images:
            self._recognise(image)
        window.work.append(
            Work(
                operator=OPERATOR,
                images_in=len(window.images),
                images_out=len(window.undecided),
                seconds=time.perf_counter() - began,
            )
        )
        return window

    def _recognise(self, image: Image) -> None:
        """Gives known content the verdict that it has already. A canary is there to be tested."""
        if image.sha256 is None or self.contents is None or image.canary:
            return
        known = self.contents.find(image.sha256)
        if known is None:
            return
        image.judged_run_id = known.run_id
        image.findings = list(known.findings) or None
        image.decide("flagged" if known.findings else "skipped")

    def _read_files(self, images: list[Image]) -> None:
        """Gives local files their bytes. A request for each, as for objects, takes longer than the reading.

        Those that fail, or that a thread has not come to in the time of one try, are left to be fetched like objects:
        each with a reason of its own, and with what is left of its deadline.
        """
        began = time.monotonic()
        files = deque(image for image in images if not image.uri.startswith("s3://"))
        found: list[tuple[Image, bytes, str]] = []
        work = [
            self.threads.submit(_read_some, files, self._limit, found) for _ in range(min(len(files), self.readers))
        ]
        wait(work, self.limits.fetch_seconds / TRIES)
        # Nobody begins another; a thread that comes back from a file system that hung is too late, hence the copy.
        files.clear()
        for image, payload, sha256 in tuple(found):
            image.payload, image.sha256 = payload, sha256
        self.read_seconds = time.monotonic() - began

    async def _fetch_all(self, images: list[Image]) -> None:
        slots = asyncio.Semaphore(self.limits.fetch_concurrency)

        async def fetch(image: Image) -> None:
            async with slots:
                try:
                    image.payload = await self._fetch(image)
                except FetchError as error:
                    image.fail(error.code, error.detail)
                else:
                    # Here and not behind the window: the other requests go on meanwhile.
                    image.sha256 = _sha256(image.payload)

        await asyncio.gather(*(fetch(image) for image in images))

    async def _fetch(self, image: Image) -> bytes:
        limit = self._limit
        if image.size_bytes is not None:
            _check_size(image.size_bytes, limit)
        try:
            location = parse_uri(image.uri)
        except UsageError as error:
            raise FetchError("fetch_failed", str(error)) from error
        seconds = self.limits.fetch_seconds - (0 if location.bucket else self.read_seconds)
        if self.overdue >= self.limits.fetch_concurrency:
            seconds = min(seconds, HASTE_SECONDS)
        end = time.monotonic() + seconds
        attempt = partial(self._try, location, image, limit, seconds / TRIES, end)
        try:
            return await attempt()
        except FetchError as error:
            if not error.may_pass:
                raise
            first = error
        try:
            return await _try_again(first, attempt, seconds, end)
        except FetchError as error:
            self.overdue += error.may_pass
            raise

    async def _try(self, location: Location, image: Image, limit: int, seconds: float, end: float) -> bytes:
        seconds = max(0.1, min(seconds, end - time.monotonic()))
        try:
            async with asyncio.timeout(seconds):
                payload = await self._read(location, image, limit, seconds)
        except TimeoutError as error:
            raise FetchError("fetch_timeout", f"no whole answer within {seconds:.3g} s", may_pass=True) from error
        if image.size_bytes is not None and len(payload) != image.size_bytes:
            raise FetchError("fetch_short", f"{len(payload):,} bytes came of {image.size_bytes:,}")
        return payload

    async def _read(self, location: Location, image: Image, limit: int, seconds: float) -> bytes:
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self.threads)
        if location.bucket is None:
            return await in_thread(_read_file, location, image.etag, limit)
        # Of an object that came in parts the etag is no digest of its bytes, but boto3 checks the store's checksum.
        if not is_plain_key(location.key) or "-" in (image.etag or ""):
            return await in_thread(self._get_by_boto3, self._boto3(), location, image, limit, seconds)
        payload, found = await self._get(location, image, limit)
        if location.bucket in self.encrypted or _agrees(payload, found):
            return payload
        return await in_thread(self._get_by_boto3, self._boto3(), location, image, limit, seconds)

    @property
    def _limit(self) -> int:
        """Bytes of one image."""
        return self.limits.max_megabytes * 1_000_000

    def _boto3(self) -> S3Client:
        """Made here, in one thread: boto3's default session is not to be asked by several for the first time."""
        return s3_client(self.endpoint_url, attempts=1, read_seconds=max(1.0, self.limits.fetch_seconds / TRIES))

    async def _get(self, location: Location, image: Image, limit: int) -> tuple[bytes, str | None]:
        """The object's bytes and the etag that came with them."""
        assert location.bucket is not None
        try:
            store = open_bucket(location.bucket, None, self.endpoint_url)
            response = await obstore.get_async(store, location.key)
            found = response.meta["e_tag"]
            _check_object(found, response.meta["size"], image, limit)
            return bytes(await response.bytes_async()), found
        except (FileNotFoundError, NotFoundError) as error:
            raise FetchError("fetch_not_found", "gone since it was listed") from error
        except PermissionDeniedError as error:
            raise FetchError("fetch_denied", reason(error)) from error
        except (UnauthenticatedError, ValueError) as error:
            # ValueError: boto3 finds no credentials. Services that hand them out have their moments.
            raise FetchError("fetch_denied", reason(error), may_pass=True) from error
        except (BaseError, OSError) as error:
            raise _passing(error) from error

    def _get_by_boto3(self, client: S3Client, location: Location, image: Image, limit: int, seconds: float) -> bytes:
        """One request. boto3 compares the bytes with the checksum that the store keeps of them, where it keeps one."""
        assert location.bucket is not None
        end = time.monotonic() + seconds
        try:
            response = client.get_object(Bucket=location.bucket, Key=location.key)
            _check_object(response["ETag"], response["ContentLength"], image, limit)
            payload = _read_until(response["Body"], end)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
            code = {404: "fetch_not_found", 403: "fetch_denied", 401: "fetch_denied"}.get(status)
            if code:
                raise FetchError(code, reason(error)) from error
            raise _passing(error) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            raise _passing(error) from error
        if "kms" in response.get("ServerSideEncryption", "") or response.get("SSECustomerAlgorithm"):
            self.encrypted.add(location.bucket)
        elif not _agrees(payload, response["ETag"]):
            raise FetchError("fetch_corrupt", "the bytes that came are not those of the etag", may_pass=True)
        return payload


async def _try_again(first: FetchError, attempt: Callable[[], Awaitable[bytes]], seconds: float, end: float) -> bytes:
    """What follows a first attempt that failed: that one does without tenacity, whose part of the CPU was a tenth."""
    failed = [first]

    async def again() -> bytes:
        if failed:
            raise failed.pop()
        return await attempt()

    attempts = AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, FetchError) and error.may_pass),
        stop=stop_before_delay(end - time.monotonic()),
        wait=wait_random_exponential(multiplier=0.25, max=min(LONGEST_PAUSE, seconds / 10)),
        reraise=True,
    )
    return await attempts(again)


def _check_object(etag: str | None, size: int, image: Image, limit: int) -> None:
    """The object must still be the one that was listed: its verdict will be stored under that id."""
    if image.etag and etag and etag.strip('"') != image.etag:
        raise FetchError("fetch_changed", f"etag was {image.etag} when listed, now it is {etag}")
    if image.size_bytes not in (None, size):
        raise FetchError("fetch_short", f"{image.size_bytes:,} bytes were listed, the object has {size:,}")
    _check_size(size, limit)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise FetchError("too_large", f"{size:,} bytes are over the limit of {limit:,}")


def _agrees(payload: bytes, etag: str | None) -> bool:
    """Whether the bytes are those of an etag that is the MD5 of its object, as it is unless parts or KMS made it."""
    plain = (etag or "").strip('"')
    return not MD5.fullmatch(plain) or hashlib.md5(payload, usedforsecurity=False).hexdigest() == plain


def _passing(error: Exception) -> FetchError:
    """What a server or a connection does wrong once it may do right a moment later."""
    text = reason(error)
    if isinstance(error, (ReadTimeoutError, BotoConnectTimeoutError, TimeoutError)):
        return FetchError("fetch_timeout", text, may_pass=True)
    if isinstance(error, FlexibleChecksumError):
        return FetchError("fetch_corrupt", text, may_pass=True)
    throttled = THROTTLED.search(text)
    return FetchError("fetch_throttled" if throttled else "fetch_failed", text, may_pass=True)


def _read_until(body: StreamingBody, end: float) -> bytes:
    """The whole body, unless it dribbles. Raises TimeoutError."""
    chunks = []
    # At its end the body raises when it was shorter than announced, or is not what its checksum says.
    while chunk := body.read(CHUNK_BYTES):
        if time.monotonic() > end:
            body.close()
            raise TimeoutError("the body came too slowly")
        chunks.append(chunk)
    return b"".join(chunks)


def _read_some(waiting: deque[Image], limit: int, found: list[tuple[Image, bytes, str]]) -> None:
    """Files with their bytes and digests, as they are read, until none waits; those that fail are not among them."""
    while True:
        try:
            image = waiting.popleft()
        except IndexError:
            return
        with suppress(FetchError, UsageError):
            payload = _read_file(parse_uri(image.uri), image.etag, limit)
            if image.size_bytes in (None, len(payload)):
                found.append((image, payload, _sha256(payload)))


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _read_file(location: Location, etag: str | None, limit: int) -> bytes:
    try:
        # Before it is opened, which for a pipe would wait and for a device might do something.
        found = os.stat(location.key)
        if not stat.S_ISREG(found.st_mode):
            raise FetchError("fetch_failed", "not a regular file")
        _check_size(found.st_size, limit)
        with open(location.key, "rb", buffering=0) as file:
            payload = file.readall()
            now = file_etag(os.fstat(file.fileno()))
        _check_size(len(payload), limit)  # it may have grown, and who lists no etags would not notice
    except FileNotFoundError as error:
        raise FetchError("fetch_not_found", "gone since it was listed") from error
    except PermissionError as error:
        raise FetchError("fetch_denied", error.strerror or "permission denied") from error
    except (OSError, ValueError) as error:
        passing = isinstance(error, OSError) and error.errno in PASSING_ERRNOS
        raise FetchError("fetch_failed", str(error), may_pass=passing) from error
    if etag and now != etag:
        raise FetchError("fetch_changed", "written to since it was listed")
    return payload


@lru_cache(maxsize=2)
def open_manifest(output: Store, key: str, sha256: str) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(output.read(key, sha256)))


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
