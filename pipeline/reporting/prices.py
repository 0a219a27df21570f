"""What a scan costs in currency: what was there to be paid for, times a price table that its user gives. A YAML file.

What there was to pay for stands in every run record, so that a night can be priced later. It is that of the driver that
finished the run: earlier starts of it, which failed or stopped, left no account of their time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from pipeline.documents import Strict, read_document
from pipeline.listing.source import kind_of
from pipeline.mistakes import NUMBER, spelt
from pipeline.output.policy import Name
from pipeline.storage import parse_uri

STEADY_SHARE = 0.5
"""Of a driver's seconds, to have passed since its first result before anything is said of the cost without start-up:
what came in a shorter time was mostly begun before."""
Price = Annotated[float, NUMBER, Field(ge=0, allow_inf_nan=False)]
LISTED_PER_REQUEST = 1000
PUTS_OF_A_SHARD = 11
"""Four merged files and their copies, the marker, the manifest and the status: a copy is charged as a PUT."""
GETS_OF_A_SHARD = 2
"""The driver reads a shard's manifest twice. Actors read it too, now and then: not counted."""


class PriceTable(Strict):
    """In one currency, as all prices what its user pays."""

    name: Name
    currency: Annotated[str, spelt("[A-Z]{3}", "three capital letters, as in EUR")]
    cpu_hour: Price
    """Of one CPU as Ray counts them, on whichever node; 0 where nodes with GPUs are paid by the GPU."""
    gpu_hour: Price = 0.0
    million_gets: Price
    million_puts: Price
    storage_gb_month: Price | None = None
    """Of what the run wrote into its tables, for a month. None: not counted."""


def read_prices(uri: str, endpoint_url: str | None) -> dict[str, Any]:
    """The price table as a record keeps it, with the file's SHA-256. Raises UsageError."""
    prices, sha256 = read_document(PriceTable, "prices", uri, endpoint_url)
    return prices.model_dump(mode="json") | {"sha256": sha256}


class Meter:
    """What there is to be paid for while a driver works. ``size``: CPUs and GPUs of the cluster at this moment, None
    while there is none."""

    LOOK_SECONDS = 10.0

    def __init__(
        self, size: Callable[[], tuple[float, float] | None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.size, self.clock = size, clock
        self.attempt_files = 0
        self.first_images = self.images = 0
        self.looked: float | None = None
        self.seconds = self.cpu_seconds = self.gpu_seconds = 0.0
        self.now: tuple[float, float] | None = None

    def look(self, *, at_once: bool = False) -> None:
        """Clusters grow and shrink: what one look found is taken to hold until the next."""
        moment = self.clock()
        if self.looked is not None and self.now is not None:
            passed = moment - self.looked
            if passed < self.LOOK_SECONDS and not at_once:
                return
            self.seconds += passed
            self.cpu_seconds += passed * self.now[0]
            self.gpu_seconds += passed * self.now[1]
        self.looked, self.now = moment, self.size()

    def took(self, receipt: Mapping[str, Any]) -> None:
        images = sum(entry["images"] for entry in receipt["outcomes"])
        self.first_images = self.first_images or images
        self.images += images
        self.attempt_files += len(receipt["files"])
        self.look()

    @property
    def cluster(self) -> tuple[float, float] | None:
        """CPUs and GPUs on the average over the time in which there was a cluster; None when there was none."""
        if not self.seconds:
            return self.now
        return self.cpu_seconds / self.seconds, self.gpu_seconds / self.seconds


def resources(
    meter: Meter,
    *,
    source: str,
    output: str,
    listed: int,
    seconds: float,
    startup_seconds: float,
    images: float,
    fetched: float,
    shards: float,
    written: float,
) -> dict[str, Any]:
    """What was there to pay for, for the record. ``images``, those of them that were fetched, ``shards`` and bytes
    ``written`` into tables are one driver's, and so are ``seconds``, ``startup_seconds`` of them until its first
    result; ``listed`` is the whole run's.

    Counted are objects fetched and attempt files; what a shard and a listing take is known; requests that were
    repeated, HEADs and DELETEs are not in it. A folder is asked for nothing that costs.
    """
    kind = kind_of(source)
    gets = 0 if kind == "folder" else fetched  # a file that lists uris mostly lists those of a bucket
    puts = 0.0
    if parse_uri(output).bucket is not None:
        gets += meter.attempt_files + GETS_OF_A_SHARD * shards
        puts += meter.attempt_files + PUTS_OF_A_SHARD * shards
    if kind == "prefix":
        puts += math.ceil(listed / LISTED_PER_REQUEST)  # a LIST is charged as a PUT
    cpus, gpus = meter.cluster or (None, None)
    return {
        "cpus": cpus,
        "gpus": gpus,
        "seconds": seconds,
        "startup_seconds": startup_seconds,
        "images": int(images),
        "tested": meter.images,  # or known content; what was unchanged is in neither of the two
        "tested_after_startup": meter.images - meter.first_images,
        "gets": int(gets),
        "puts": int(puts),
        "bytes_written": int(written),
    }


def cost_of(record: Mapping[str, Any], prices: dict[str, Any]) -> dict[str, Any]:
    """The run's cost, in parts, and what testing every image alone would have cost.

    Only the stages' part would grow: the GPUs, and of the CPUs the share of the time at work that stages without GPUs
    had. It is divided by the relative cost, as if seconds grew as multiply-adds do. Parts that nobody knows are None.

    ``startup``: of the total, the processors until the first result, while the source is listed, Ray comes up, nets are
    loaded and the first windows are tested. ``steady_per_million``: of images tested after that; see STEADY_SHARE.
    """
    there = record["resources"]
    hours = there["seconds"] / 3600
    cpus, gpus = there["cpus"], there["gpus"]
    storage = prices["storage_gb_month"]
    parts = {
        "cpus": None if cpus is None else cpus * hours * prices["cpu_hour"],
        "gpus": None if gpus is None else gpus * hours * prices["gpu_hour"],
        "gets": there["gets"] / 1e6 * prices["million_gets"],
        "puts": there["puts"] / 1e6 * prices["million_puts"],
        "storage": None if storage is None else there["bytes_written"] / 1e9 * storage,
    }
    total = sum(part for part in parts.values() if part is not None)
    stages = _stage_part(record, parts)
    relative = record["relative_cost"]
    scales = bool(relative) and cpus is not None
    return {
        "currency": prices["currency"],
        "prices": prices,
        "parts": parts,
        "total": total,
        "startup": _startup_part(there, parts),
        "steady_per_million": _steady_per_million(there, parts),
        "per_million_images": total / there["images"] * 1e6 if there["images"] else None,
        "stages": stages,
        "alone": total - stages + stages / relative if scales else None,
    }


def _processors(parts: Mapping[str, float | None]) -> float:
    return (parts["cpus"] or 0.0) + (parts["gpus"] or 0.0)


def _startup_part(there: Mapping[str, Any], parts: Mapping[str, float | None]) -> float:
    return _processors(parts) * min(1.0, there["startup_seconds"] / there["seconds"])


def _steady_per_million(there: Mapping[str, Any], parts: Mapping[str, float | None]) -> float | None:
    """Processors by the images that came after the first result, requests and storage by all that were tested."""
    steady = 1 - there["startup_seconds"] / there["seconds"]
    if parts["cpus"] is None or not there["tested_after_startup"] or steady < STEADY_SHARE:
        return None
    other = sum(part for name, part in parts.items() if name not in ("cpus", "gpus") and part is not None)
    return 1e6 * (steady * _processors(parts) / there["tested_after_startup"] + other / there["tested"])


def _stage_part(record: Mapping[str, Any], parts: Mapping[str, float | None]) -> float:
    """Of the cost: the GPUs where stages run on them, and the CPUs by the share of the operators' time there that
    stages without GPUs had."""
    on_gpus = {stage["name"] for stage in record["plan"]["stages"] if stage.get("num_gpus")}
    on_cpus = {stage["name"] for stage in record["plan"]["stages"]} - on_gpus
    work = [(row["operator"], row["seconds"]) for row in record["operators"] if row["operator"] not in on_gpus]
    whole = sum(seconds for _, seconds in work)
    share = sum(seconds for operator, seconds in work if operator in on_cpus) / whole if whole else 0.0
    return (parts["cpus"] or 0.0) * share + ((parts["gpus"] or 0.0) if on_gpus else 0.0)


def cost_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """For people at the end of a scan; nothing without a price table, as in older records."""
    cost = record.get("cost")
    if not cost:
        return
    currency = cost["currency"]
    yield f"cost by price table {cost['prices']['name']}", money(cost["total"], currency)
    for name, part in cost["parts"].items():
        if part is not None:
            yield f"  {PARTS[name]}", money(part, currency)
    yield from _million_rows(cost)
    if cost["alone"] is not None:
        yield "cost of testing every image alone, estimated", money(cost["alone"], currency)


def _million_rows(cost: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    currency = cost["currency"]
    if cost["per_million_images"] is not None:
        yield "cost per million listed images, with start-up", money(cost["per_million_images"], currency)
    if "startup" not in cost:
        return  # older records do not tell it apart
    if cost["total"]:
        yield "  of the cost start-up, until the first result", f"{cost['startup'] / cost['total']:.0%}"
    steady = cost["steady_per_million"]
    yield (
        "cost per million tested images, without start-up",
        "too short a scan to tell" if steady is None else money(steady, currency),
    )


PARTS = {
    "cpus": "CPUs",
    "gpus": "GPUs",
    "gets": "GETs",
    "puts": "PUTs",
    "storage": "tables, for a month",
}


def money(amount: float, currency: str) -> str:
    """Cents where there are some; of less, three digits."""
    return f"{amount:,.2f} {currency}" if amount >= 1 or amount == 0 else f"{amount:.3g} {currency}"
