"""The scan's own files below one uri: written whole or not at all, decided by conditional PUT, patient with outages."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import obstore
from botocore.exceptions import BotoCoreError
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, S3Store

from pipeline.errors import StoreError, UsageError
from pipeline.storage import open_bucket, parse_uri, patiently, reason

T = TypeVar("T")


def digest(body: bytes) -> str:
    """SHA-256, as files are named by in receipts, markers and records."""
    return hashlib.sha256(body).hexdigest()


@dataclass(frozen=True)
class Store:
    """Objects named by clean relative keys. A value that travels to actors; the connection is each process's own."""

    uri: str
    endpoint_url: str | None = None
    kms_key: str | None = field(default=None, kw_only=True)
    """Id or ARN of the key in AWS KMS that encrypts what is written; without it the bucket's own rule holds."""
    patience: float = field(default=0.0, kw_only=True)
    """Seconds for which a request that fails is tried again."""
    conditional: bool = field(default=True, kw_only=True)
    """Whether to ask the store to refuse a PUT of what exists. If not, ``create`` looks first, and can be late."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", parse_uri(self.uri).uri.rstrip("/"))

    @property
    def _client(self) -> S3Store | LocalStore:
        """To read by. Raises FileNotFoundError for a folder that is not there: only writing makes one."""
        return _open(self.uri, self.endpoint_url, self.kms_key, make=False)

    @property
    def _writer(self) -> S3Store | LocalStore:
        return _open(self.uri, self.endpoint_url, self.kms_key, make=True)

    @property
    def is_there(self) -> bool:
        """Whether there is a folder to look into; of a bucket its server says so, at the first request."""
        location = parse_uri(self.uri)
        return location.bucket is not None or Path(location.key).is_dir()

    def _patiently(self, request: Callable[[], T]) -> T:
        # A bucket whose policy is being changed denies for a while what it took before: that is waited for too.
        return patiently(request, self.patience)

    @staticmethod
    def around(file: str, endpoint_url: str | None, *, patience: float) -> tuple[Store, str]:
        """The store that a single file, a uri or a path, is in, and the file's key there."""
        folder, _, key = file.rpartition("/")
        return Store(folder or ".", endpoint_url, patience=patience), key

    @property
    def name(self) -> str:
        """As its user wrote it, for messages: a folder's path, or the uri."""
        location = parse_uri(self.uri)
        return location.key if location.bucket is None else self.uri

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def read(self, key: str, sha256: str | None = None) -> bytes:
        """Raises FileNotFoundError. Bytes of another digest than is expected are read again, and raise StoreError."""

        def get() -> bytes:
            body = bytes(obstore.get(self._client, key).bytes())
            if sha256 is not None and digest(body) != sha256:
                raise StoreError(f"{self.uri_of(key)}: what came is not what was written")
            return body

        return self._patiently(get)

    def write(self, key: str, body: bytes) -> str:
        """Writes or replaces, whole or not at all; returns the object's uri."""
        self._patiently(lambda: obstore.put(self._writer, key, body))
        return self.uri_of(key)

    def create(self, key: str, body: bytes) -> bool:
        """Writes unless the object exists; False when it does, which may be an earlier try of this very call.

        A store that says it knows no such condition is looked at first, which can be late: ``check_writable`` refuses
        it to scans.
        """
        return self._patiently(lambda: self._create(key, body))

    def _create(self, key: str, body: bytes) -> bool:
        created = self._put_if_new(key, body) if self.conditional else None
        if created is None:
            created = not self.exists(key)
            if created:
                obstore.put(self._writer, key, body)
        return created

    def overwrites(self, key: str) -> bool:
        """Whether an object that exists is not safe from ``create``, which was to be so. Tries it."""
        if not self.conditional:
            return False
        return self._patiently(lambda: self._put_if_new(key, b"dorfman was here twice")) is not False

    def _put_if_new(self, key: str, body: bytes) -> bool | None:
        """None when the store does not know the condition."""
        try:
            obstore.put(self._writer, key, body, mode="create")
        except (AlreadyExistsError, PreconditionError) as error:
            if not self.exists(key):
                # S3's "conflict": another PUT of this key was under way, and has not come to an end.
                raise StoreError(f"{self.uri_of(key)} is being written by another: {reason(error)}") from None
            return False
        except BaseError as error:
            if not _is_unknown(error):
                raise
            return None
        return True

    def read_version(self, key: str) -> tuple[bytes, str]:
        """An object, and the name of this version of it for ``replace``. Raises FileNotFoundError."""

        def get() -> tuple[bytes, str]:
            answer = obstore.get(self._client, key)
            return bytes(answer.bytes()), answer.meta["e_tag"] or ""

        return self._patiently(get)

    def replace(self, key: str, body: bytes, version: str) -> str | None:
        """Writes over that version and no other; the new one's name, or None when the object is another one by now.

        In a folder this holds among the processes of one machine. A store that knows no such condition is looked at
        first, which can be late.
        """

        def put() -> str | None:
            try:
                return self._put_over(key, body, version)
            except (PreconditionError, FileNotFoundError):
                # An earlier try may have gone through unheard.
                with suppress(FileNotFoundError):
                    answer = obstore.get(self._client, key)
                    return answer.meta["e_tag"] if bytes(answer.bytes()) == body else None
                return None

        return self._patiently(put)

    def _put_over(self, key: str, body: bytes, version: str) -> str | None:
        if isinstance(self._client, LocalStore):
            with _locked(Path(parse_uri(self.uri_of(key)).key).parent):
                return self._look_and_put(key, body, version)
        if self.conditional:
            try:
                return obstore.put(self._client, key, body, mode={"e_tag": version})["e_tag"]
            except BaseError as error:
                if not _is_unknown(error):
                    raise
        return self._look_and_put(key, body, version)

    def _look_and_put(self, key: str, body: bytes, version: str) -> str | None:
        if obstore.head(self._client, key)["e_tag"] != version:
            raise PreconditionError(key)
        obstore.put(self._client, key, body)
        return obstore.head(self._client, key)["e_tag"]

    def exists(self, key: str) -> bool:
        try:
            self._patiently(lambda: obstore.head(self._client, key))
        except FileNotFoundError:
            return False
        return True

    def publish(self, source: str, target: str) -> None:
        """Copies what will never change to the name that readers know. Raises FileNotFoundError.

        In a folder it appears as a link: whole, and without a half-written neighbour that a reader of the folder
        would take for a file. To replace a link by itself would leave such a neighbour (rename does nothing then).
        """
        local = isinstance(self._client, LocalStore)
        with suppress(AlreadyExistsError):
            self._patiently(lambda: obstore.copy(self._client, source, target, overwrite=not local))

    def delete(self, keys: list[str]) -> None:
        """Removes what is there of them."""
        try:
            if keys:
                self._patiently(lambda: obstore.delete(self._client, keys))
        except FileNotFoundError:
            # A folder says that one is gone already, and has left the others.
            for key in keys:
                with suppress(FileNotFoundError):
                    self._patiently(partial(obstore.delete, self._client, key))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Key and size in bytes of every object below a folder."""
        return {key: size for key, (size, _) in self.objects(prefix).items()}

    def objects(self, prefix: str) -> dict[str, tuple[int, datetime]]:
        """Key, size in bytes and time of the last write of every object below a folder."""

        def collect() -> dict[str, tuple[int, datetime]]:
            chunks = obstore.list(self._client, prefix)
            return {meta["path"]: (meta["size"], meta["last_modified"]) for chunk in chunks for meta in chunk}

        return self._patiently(collect) if self.is_there else {}

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder; "" is the store's own."""
        if not self.is_there:
            return []
        listed = self._patiently(lambda: obstore.list_with_delimiter(self._client, prefix))
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in listed["common_prefixes"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine out; the lock ends with the process that holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@lru_cache(maxsize=16)
def _open(uri: str, endpoint_url: str | None, kms_key: str | None, *, make: bool) -> S3Store | LocalStore:
    location = parse_uri(uri)
    if location.bucket is None:
        if not (make or Path(location.key).is_dir()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location.key)
        return LocalStore(location.key, mkdir=make, automatic_cleanup=True)
    encryption: dict[str, Any] = {}
    if kms_key:
        encryption = {"server_side_encryption": "aws:kms", "sse_kms_key_id": kms_key}
    return open_bucket(location.bucket, location.key.strip("/"), endpoint_url, **encryption)


def check_writable(store: Store) -> None:
    """Writes a probe, twice under the condition that it is new. Raises UsageError.

    A store that takes the second one would let two drivers of one run both decide what a shard's rows are.
    """
    if store.kms_key and parse_uri(store.uri).bucket is None:
        raise UsageError(f"a KMS key encrypts objects in S3, and {store.name} is a folder: leave --kms-key out")
    probe = f"_state/probe-{uuid.uuid4().hex}"  # two scans may start at once
    try:
        store.write(probe, b"dorfman was here")
        overwrites = store.overwrites(probe)
        store.delete([probe])
    except (BaseError, OSError, BotoCoreError, ValueError) as error:
        raise UsageError(f"cannot write to {store.name}: {reason(error)}") from error
    if overwrites:
        raise UsageError(
            f"{store.name} overwrites what a conditional PUT (If-None-Match: *) must not: two drivers of one run could "
            "both commit a shard. Use a store that has it, or promise with --single-driver that a run is never "
            "driven twice at a time"
        )


def _is_unknown(error: BaseError) -> bool:
    """Whether a server says that it does not know what it was asked."""
    return "501 Not Implemented" in str(error) or "NotImplemented" in str(error)
