"""Where bytes live: uris, clients, listings and whole objects, in S3 or in a local folder.

obstore moves the bytes. boto3 finds the credentials for it, and lists and fetches what obstore cannot
name: see ``is_plain_key``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import boto3
import obstore
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
)
from obstore.store import S3Store
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from pipeline.errors import RunError, StoreError, UsageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectTypeDef

CONNECT_SECONDS = 10
READ_SECONDS = 60
CREDENTIAL_TTL = timedelta(minutes=10)
READ_PATIENCE = 20.0
"""Seconds for which a single read of a file that the user named is tried again."""
LONGEST_PAUSE = 15.0
LISTING_THREADS = 16
LISTING_DEPTH = 3
ANSWERS = (FileNotFoundError, NotFoundError, AlreadyExistsError, PreconditionError)
"""What a store says when it works."""
STORAGE_ERRORS = (BaseError, BotoCoreError, ClientError, OSError, ValueError)
"""What clients and files raise, obstore ValueError too."""
# What errors of S3 servers and of clients say of the caller's credentials.
SECRETS = re.compile(
    r"<(AWSAccessKeyId|StringToSign|StringToSignBytes|SignatureProvided|CanonicalRequest|CanonicalRequestBytes)>.*?(</\1>|$)"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"
    r"|(?i:\b(?:X-Amz-(?:Credential|Signature|Security-Token)|AWSAccessKeyId|Signature|Credential)=[^&\s,]+)"
    r"|(?<=://)[^/\s@]+@",
    re.DOTALL,
)

# obstore's preface to an error, with an address that repeats the key; what matters comes after it.
PERFORMED = re.compile(r"Error performing (\w+) \S+ in \S+ - ")

T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """A parsed uri. ``bucket`` is None for local paths, whose ``key`` is the absolute path."""

    bucket: str | None
    key: str

    @property
    def uri(self) -> str:
        if self.bucket is None:
            return "file://" + quote(self.key.encode("utf-8", "surrogateescape"))
        return f"s3://{self.bucket}/{self.key}"


def parse_uri(uri: str) -> Location:
    """``s3://bucket/key`` (the key taken literally), ``file:///quoted/path`` or a local path."""
    if uri.startswith("s3://"):
        bucket, _, key = uri[5:].partition("/")
        if not bucket:
            raise UsageError(f"{uri!r} names no bucket: write s3://bucket/prefix")
        return Location(bucket, key)
    if uri.startswith("file://"):
        return Location(None, unquote(urlsplit(uri).path, errors="surrogateescape"))
    if "://" in uri:
        raise UsageError(f"{uri!r}: only s3:// and local paths can be read and written")
    return Location(None, str(Path(uri).absolute()))


def is_plain_key(key: str) -> bool:
    """Whether obstore can name this key: it refuses empty, ``.`` and ``..`` segments and control characters."""
    return key.isprintable() and not {"", ".", ".."} & set(key.split("/"))


@lru_cache(maxsize=8)
def s3_client(endpoint_url: str | None, attempts: int = 4, read_seconds: float = READ_SECONDS) -> S3Client:
    """A boto3 client; path-style addresses whenever an endpoint is given, as most servers want."""
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=read_seconds,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        max_pool_connections=64,
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    return boto3.client("s3", endpoint_url=endpoint_url, region_name=region(), config=config)


def region() -> str:
    return boto3.Session().region_name or "us-east-1"


@lru_cache(maxsize=64)
def open_bucket(bucket: str, prefix: str | None, endpoint_url: str | None, **options: Any) -> S3Store:
    """An obstore client for one bucket, with boto3's credentials. It tries nothing twice: see ``patiently``."""
    address: dict[str, Any] = {"endpoint": endpoint_url, "virtual_hosted_style_request": False} if endpoint_url else {}
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=region(),
        # A role's credentials may end sooner than obstore would ask again by itself.
        credential_provider=Boto3CredentialProvider(ttl=CREDENTIAL_TTL),
        client_options={
            "allow_http": bool(endpoint_url and endpoint_url.startswith("http://")),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "timeout": timedelta(seconds=READ_SECONDS),
        },
        retry_config={"max_retries": 0},
        **address,
        **options,
    )


def patiently(request: Callable[[], T], seconds: float, final: tuple[type[Exception], ...] = ANSWERS) -> T:
    """Tries a request again, with growing random pauses, until it gets through, fails finally or time is up.

    Raises what is final as it is, and StoreError with the redacted reason for the rest: it may go into a log.
    """
    attempts = Retrying(
        retry=retry_if_exception(
            lambda error: isinstance(error, (BaseError, OSError)) and not isinstance(error, final)
        ),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE),
        reraise=True,
    )
    try:
        return attempts(request)
    except final:
        raise
    except BaseError as error:
        raise StoreError(reason(error)) from None


def list_side_by_side(location: Location, endpoint_url: str | None) -> Iterator[ObjectTypeDef]:
    """Every object below a prefix with its literal key, in no order, never more than a few thousand in memory.

    Prefixes are split at their ``/`` for LISTING_DEPTH levels and listed by LISTING_THREADS threads: one
    listing after the other is what limits a large bucket. Raises UsageError.
    """
    found: Queue[ObjectTypeDef | Exception | None] = Queue(maxsize=4000)
    todo: Queue[tuple[str, int] | None] = Queue()
    todo.put((location.key, 0))
    client = s3_client(endpoint_url)

    def work() -> None:
        while (item := todo.get()) is not None:
            prefix, depth = item
            delimiter = "/" if depth < LISTING_DEPTH else ""
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=location.bucket or "", Prefix=prefix, Delimiter=delimiter
            )
            try:
                for page in pages:
                    for entry in page.get("Contents", []):
                        found.put(entry)
                    for below in page.get("CommonPrefixes", []):
                        todo.put((below["Prefix"], depth + 1))
            except Exception as error:  # noqa: BLE001  the reader of the queue raises it
                found.put(error)
            todo.task_done()

    def finish() -> None:
        todo.join()
        found.put(None)
        for _ in range(LISTING_THREADS):
            todo.put(None)

    for target in (*(work for _ in range(LISTING_THREADS)), finish):
        Thread(target=target, daemon=True).start()
    while (entry := found.get()) is not None:
        if isinstance(entry, Exception):
            raise UsageError(f"cannot list {location.uri}: {reason(entry)}") from entry
        yield entry


def reason(error: Exception) -> str:
    """The part of a storage error that a person can act on, in one line and without credentials."""
    if isinstance(error, ClientError):
        detail = error.response.get("Error", {})
        return redact(f"{detail.get('Code', 'error')}: {detail.get('Message', '')}".strip(": "))
    name = type(error).__name__
    if name == "NoCredentialsError" or "from session.get_credentials" in str(error):
        return "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
    text = PERFORMED.sub(r"\1: ", str(error).split("\n\nDebug source")[0])
    return " ".join(redact(text).split())[:300] or name


def redact(text: str) -> str:
    """Without key ids, signatures, tokens and user names in addresses, which servers like to repeat in their errors."""
    return SECRETS.sub("[redacted]", text)


def storage_errors_as_usage() -> AbstractContextManager[None]:
    """Before a run has begun, a store that does not answer is a matter of configuration."""
    return _storage_errors_as(UsageError)


def storage_errors_as_failure() -> AbstractContextManager[None]:
    """For work on an output that can be repeated: once it has begun, some of it may be done."""
    return _storage_errors_as(RunError, "; some of it may be done: start it again until it ends with 0")


@contextmanager
def _storage_errors_as(kind: type[Exception], remedy: str = "") -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except STORAGE_ERRORS as error:
        raise kind(f"storage: {reason(error)}{remedy}") from error


def check_endpoint(endpoint_url: str | None) -> None:
    """An address is printed, logged and handed on: it must not hold a password."""
    if endpoint_url and "@" in endpoint_url.partition("://")[2].partition("/")[0]:
        raise UsageError("the endpoint url holds a user name or password; give credentials by environment or profile")


def read_object(location: Location, endpoint_url: str | None) -> bytes:
    """One whole object or file, by its literal name. Raises FileNotFoundError."""
    if location.bucket is None:
        return Path(location.key).read_bytes()
    if is_plain_key(location.key):
        store = open_bucket(location.bucket, None, endpoint_url)
        final = (*ANSWERS, PermissionDeniedError)
        try:
            return patiently(lambda: bytes(obstore.get(store, location.key).bytes()), READ_PATIENCE, final)
        except PermissionDeniedError as error:
            raise StoreError(reason(error)) from None
    try:
        return s3_client(endpoint_url).get_object(Bucket=location.bucket, Key=location.key)["Body"].read()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in {"NoSuchKey", "404"}:
            raise FileNotFoundError(location.uri) from error
        raise
