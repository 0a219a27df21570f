"""The images of an earlier run that failed for reasons that may pass, as the source of another run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.codes import MAY_PASS
from pipeline.errors import UsageError
from pipeline.listing.source import BLANK, list_object
from pipeline.output import commit
from pipeline.store import Store


def read_parent(store: Store, run_id: str) -> dict[str, Any]:
    """The record of the run whose errors are taken up. Raises UsageError."""
    record = commit.read_record(store, run_id)
    if record is None:
        raise UsageError(
            f"--retry-errors {run_id}: no complete run of that name in {store.uri}; one that failed goes on with "
            f"--run-id {run_id}"
        )
    return record


def list_failed(store: Store, record: dict[str, Any], endpoint_url: str | None) -> Iterator[dict[str, Any]]:
    """Rows as ``list_source`` gives them. An object that was replaced meanwhile is listed as it is now."""
    for file in commit.files_of("errors", record["files"]):
        if not file["rows"]:
            continue
        table = pq.read_table(io.BytesIO(store.read(file["path"], file["sha256"])))
        columns = ["source_uri", "size_bytes", "etag", "error_code"]
        for row in table.filter(pc.field("error_code").isin(MAY_PASS)).select(columns).to_pylist():
            uri = row["source_uri"]
            if row["error_code"] == "fetch_changed":
                yield list_object(uri, endpoint_url)
            else:
                yield BLANK | {"uri": uri, "size_bytes": row["size_bytes"], "etag": row["etag"]}
