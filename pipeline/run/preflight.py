"""What can be known to be wrong before a run begins, each in one line that names the remedy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.listing.manifest import Shard
from pipeline.plan import Preparation
from pipeline.steps.fetch import Fetcher, WindowRef, open_manifest
from pipeline.storage import parse_uri
from pipeline.store import Store, check_writable

# For the sorted listing, and for what Ray spills beside it.
MIN_SCRATCH_BYTES = 1_000_000_000
MIN_OUTPUT_BYTES = 20_000_000
SAMPLED_IMAGES = 3
# A store that hiccups while it is looked at is no wrong configuration.
PATIENCE = 5.0


def check_apart(source: str, output: str) -> None:
    """The output must not be listed. An S3 source is a prefix, with or without a slash at its end."""
    inner, outer = parse_uri(output), parse_uri(source)
    inside = outer.key if outer.bucket else outer.key.rstrip("/") + "/"
    if inner.bucket == outer.bucket and (inner.key.rstrip("/") + "/").startswith(inside):
        raise UsageError(f"output {output} lies inside source {source}: it would be scanned")


def check_outside(rows: Iterable[dict[str, Any]], output: Store) -> Iterator[dict[str, Any]]:
    """The rows, none of which may be the scan's own: a report or a table of uris may list its bucket."""
    for row in rows:
        if row["uri"].startswith(f"{output.uri}/"):
            raise UsageError(
                f"the source lists {row['uri']}, which lies in the output {output.name}: it would be scanned; leave it "
                "out of the list, or give another --output"
            )
        yield row


def check_output(store: Store) -> None:
    """That the output can be written, keeps what is there, and has room."""
    check_writable(replace(store, patience=PATIENCE))
    location = parse_uri(store.uri)
    if location.bucket is None:
        _check_room(Path(location.key), MIN_OUTPUT_BYTES, "the output", "give another --output")
    _check_room(Path(tempfile.gettempdir()), MIN_SCRATCH_BYTES, "listings and what Ray spills", "set TMPDIR")


def _check_room(folder: Path, least: int, what: str, remedy: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < least:
        raise UsageError(f"{folder} has {free:,} bytes free and {what} need {least:,}: make room there, or {remedy}")


def check_readable(store: Store, shard: Shard, limits: Preparation, endpoint_url: str | None) -> None:
    """Fetches a few listed images: who may list a bucket may not always read it. Raises UsageError."""
    fetcher = Fetcher(store, endpoint_url, limits.model_copy(update={"fetch_seconds": 4 * PATIENCE}))
    rows = min(SAMPLED_IMAGES, shard.images)
    sample = WindowRef(shard=shard.index, window=0, key=shard.key, sha256=shard.sha256, first_row=0, rows=rows)
    (window,) = fetcher([sample])
    open_manifest.cache_clear()  # the driver reads no more of it
    images = window.images
    if all(image.error_code == "fetch_denied" for image in images):
        raise UsageError(
            f"the source can be listed but not read: {images[0].uri}: {images[0].error_detail}; "
            "allow s3:GetObject on its objects"
        )
