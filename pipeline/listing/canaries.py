"""Known positives that a scan tests among everything else, to see whether it still finds them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.listing.source import list_object
from pipeline.storage import parse_uri, read_object, reason
from pipeline.store import digest
from pipeline.window import CANARY_REASONS


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """``sha256``: of the file that names them, so that a resumed run has the same."""

    uris: frozenset[str]
    sha256: str


def read_canaries(uri: str, categories: tuple[str, ...], endpoint_url: str | None) -> Canaries:
    """A Parquet file with columns uri and category: images that violate in that category. Raises UsageError."""
    try:
        body = read_object(parse_uri(uri), endpoint_url)
        table = pq.read_table(io.BytesIO(body)).select(["uri", "category"])
        rows = table.cast(pa.schema([("uri", pa.string()), ("category", pa.string())])).to_pylist()
    except FileNotFoundError as error:
        raise UsageError(f"canaries {uri}: no such file") from error
    except (KeyError, ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(f"canaries {uri}: wanted Parquet with uri, category; {reason(error)}") from error
    if not rows or not all(row["uri"] for row in rows):
        raise UsageError(f"canaries {uri}: {'a row has no uri' if rows else 'there are no rows in it'}")
    unknown = sorted({str(row["category"]) for row in rows} - set(categories))
    if unknown:
        raise UsageError(f"canaries {uri}: categories {unknown} are not among the plan's, {list(categories)}")
    return Canaries(uris=frozenset(parse_uri(row["uri"]).uri for row in rows), sha256=digest(body))


def with_canaries(
    rows: Iterable[dict[str, Any]], canaries: Canaries, endpoint_url: str | None
) -> Iterator[dict[str, Any]]:
    """The source's rows, then those of canaries that it does not list: its own images are its own."""
    injected = set(canaries.uris)
    for row in rows:
        injected.discard(row["uri"])
        yield row
    for uri in sorted(injected):
        yield list_object(uri, endpoint_url) | {"canary": True}


def count_canaries(skips: dict[str, int]) -> dict[str, int]:
    """How many were found, missed and failed, from the ledger's skip reasons."""
    return {why.removeprefix("canary "): skips.get(why, 0) for why in CANARY_REASONS.values()}
