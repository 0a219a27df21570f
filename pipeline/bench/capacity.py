"""What a night of so many images takes: arithmetic from measured costs, the limits that are in the way, which is first.

``simulation.py`` plays such a night.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.flow import MAX_SOURCE_BLOCKS

GETS_PER_PREFIX = 5_500
PUTS_PER_PREFIX = 3_500
"""Requests a second that S3 takes below one prefix (AWS, "Best practices design patterns: optimizing performance")."""


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """What a night of so many images takes, and what breaks first: on paper, then simulated with nodes that vanish.

    docs/scale.yaml has the numbers of docs/scale.md, and says how each was measured. Exit codes: 0 done, 2 wrong usage.
    """

    images: tuple[int, ...] = (10_000_000, 100_000_000, 1_000_000_000, 4_000_000_000)
    """Images of a night; a column each."""
    hours: float = 8.0
    """From the first image to the last."""
    listing_hours: float = 4.0
    """How long the source may be listed before that."""
    image_bytes: int = 80_000
    """Of one object, on the average."""
    side: int = 224
    """Pixels that the first stage takes of an image, along one side."""
    window_images: int = 1024
    shard_images: int = 1_000_000
    prefixes: int = 16
    """Prefixes that the source is spread over."""

    fetch_cpu_ms: float
    """Processor time of an image: this and the next three are measured."""
    decode_cpu_ms: float
    write_cpu_ms: float
    net_cpu_ms: float = 0.0
    """Of all stages together, where they run on CPUs."""
    stage_images_per_s: tuple[float, ...] = ()
    """Of one GPU, for each stage; none where they run on CPUs."""
    stage_shares: tuple[float, ...] = ()
    """Of the images, which reach each of these stages: the first is 1."""

    listing_us: float
    """The driver's time of a key, until the manifest stands: this and the next five are printed by ``scale --idle``."""
    window_ms: float
    """The driver's time of a window, between its source and its receipt."""
    commit_us: float
    """The driver's time of an image when its shard is committed."""
    driver_base_mb: float
    """The driver's memory whatever the number of keys."""
    driver_bytes: float
    """The driver's memory of a key beyond that."""
    row_bytes: float
    """Of an image in manifest, attempts and tables together."""

    cpu_node_cpus: int
    cpu_node_gbit: float
    """What a node's network bears in one direction, for long."""
    cpu_node_dollars: float
    """Of a node for an hour, as all prices what its user pays."""
    gpu_node_gpus: int = 1
    gpu_node_gbit: float = 10.0
    gpu_node_dollars: float = 0.0
    get_dollars: float = 0.40
    """Of a million GETs."""
    put_dollars: float = 5.0
    """Of a million PUTs."""
    head_node_gb: float = 16.0
    """Memory that the driver may take."""
    utilisation: float = 0.8
    """Share of processors, GPUs and networks that is planned to be busy."""

    vanish_per_hour: float = 0.05
    """How often a node is taken away."""
    replace_minutes: float = 5.0
    """Until another one is at work."""
    seed: int = 1
    json: Path | None = None
    """File to write the numbers to."""

    def __post_init__(self) -> None:
        if not self.images or min(self.images) < 1:
            raise UsageError(f"images are {list(self.images)}: give numbers of images, at least 1 each")
        if len(self.stage_images_per_s) != len(self.stage_shares):
            raise UsageError(
                f"stage_images_per_s has {len(self.stage_images_per_s)} stages, stage_shares {len(self.stage_shares)}: "
                "give one of each for every stage on GPUs"
            )
        for name, shares in (("stage_shares", self.stage_shares), ("utilisation", (self.utilisation,))):
            if any(not 0 < share <= 1 for share in shares):
                given = ", ".join(f"{share:g}" for share in shares)
                raise UsageError(f"{name} is {given}, but a share is above 0 and at most 1")
        free = {"net_cpu_ms", "gpu_node_dollars", "cpu_node_dollars", "get_dollars", "put_dollars", "vanish_per_hour",
                "driver_bytes", "seed"}  # fmt: skip
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and (value < 0 or (not value and field.name not in free)):
                least = "at least" if field.name in free else "above"
                raise UsageError(f"{field.name} is {value:g}, but it must be {least} 0")
        if any(rate <= 0 for rate in self.stage_images_per_s):
            raise UsageError(f"stage_images_per_s are {list(self.stage_images_per_s)}: give rates above 0")

    @property
    def cpu_ms(self) -> float:
        """Processor time of an image, outside the driver."""
        return self.fetch_cpu_ms + self.decode_cpu_ms + self.write_cpu_ms + self.net_cpu_ms

    @property
    def gpu_seconds(self) -> float:
        """Of a GPU, for one image."""
        return sum(share / rate for share, rate in zip(self.stage_shares, self.stage_images_per_s, strict=True))

    @property
    def driver_seconds(self) -> float:
        """Of the driver, for one image, while images are tested."""
        return self.window_ms / 1e3 / self.window_images + self.commit_us / 1e6

    @property
    def moved_bytes(self) -> int:
        """Of an image on its way to a stage: the file, which later stages may need, and its pixels."""
        return self.image_bytes + 3 * self.side**2


@dataclass(frozen=True, kw_only=True)
class Night:
    """On paper. Rates are the night's average."""

    images: int
    images_per_s: float
    gets_per_s: float
    gets_per_s_and_prefix: float
    source_gbit: float
    """From the source to the nodes that fetch, a second."""
    moved_gbit: float
    """From these to nodes with GPUs; 0 without."""
    cpus: float
    """At work, on the average."""
    cpu_nodes: int
    gpus: int
    gpu_nodes: int
    windows: int
    windows_per_block: int
    """In one block of the source: what one actor takes, and begins anew where its node vanishes."""
    shards: int
    receipts_per_s: float
    driver_busy: float
    """Share of the night that the driver is at work. Above 1 it does not keep up."""
    listing_hours: float
    driver_gb: float
    object_store_gb: float
    """What Ray holds at one time: a window in the hands of every processor and GPU, and another one before it."""
    written_gb: float
    node_dollars: float
    request_dollars: float


def plan_night(config: CapacityConfig, images: int) -> Night:
    seconds = config.hours * 3600
    rate = images / seconds
    windows = math.ceil(images / config.window_images)
    gbit = 8e-9 * rate * config.image_bytes
    moved = 8e-9 * rate * config.moved_bytes if config.gpu_seconds else 0.0
    cpus = rate * config.cpu_ms / 1e3
    # A network takes in and gives at one time, so the larger direction counts.
    cpu_nodes = _nodes(config, cpus / config.cpu_node_cpus, max(gbit, moved) / config.cpu_node_gbit)
    gpus = math.ceil(rate * config.gpu_seconds / config.utilisation)
    gpu_nodes = max(math.ceil(gpus / config.gpu_node_gpus), _nodes(config, moved / config.gpu_node_gbit))
    at_work = cpu_nodes * config.cpu_node_cpus + gpu_nodes * config.gpu_node_gpus
    node_dollars = config.hours * (cpu_nodes * config.cpu_node_dollars + gpu_nodes * config.gpu_node_dollars)
    return Night(
        images=images,
        images_per_s=rate,
        gets_per_s=rate,
        gets_per_s_and_prefix=rate / config.prefixes,
        source_gbit=gbit,
        moved_gbit=moved,
        cpus=cpus,
        cpu_nodes=cpu_nodes,
        gpus=gpus,
        gpu_nodes=gpu_nodes,
        windows=windows,
        windows_per_block=math.ceil(windows / MAX_SOURCE_BLOCKS),
        shards=math.ceil(images / config.shard_images),
        receipts_per_s=rate / config.window_images,
        driver_busy=rate * config.driver_seconds,
        listing_hours=images * config.listing_us / 3.6e9,
        driver_gb=(config.driver_base_mb * 1e6 + config.driver_bytes * images) / 1e9,
        object_store_gb=min(2 * at_work, windows) * config.window_images * config.moved_bytes / 1e9,
        written_gb=images * config.row_bytes / 1e9,
        node_dollars=node_dollars,
        request_dollars=(images * config.get_dollars + _puts(windows) * config.put_dollars) / 1e6,
    )


def _nodes(config: CapacityConfig, *shares: float) -> int:
    """How many nodes bear what would keep these numbers of them busy."""
    return math.ceil(max(shares) / config.utilisation)


def _puts(windows: float) -> float:
    """Attempt files: of each window a ledger, and now and then another table."""
    return 2 * windows


@dataclass(frozen=True, kw_only=True)
class Limit:
    """``images``: of a night at which it is reached."""

    what: str
    images: float
    remedy: str


def limits(config: CapacityConfig) -> list[Limit]:
    """What no further node helps against, the first to be reached first."""
    return sorted(_limits(config), key=lambda limit: limit.images)


def _limits(config: CapacityConfig) -> Iterator[Limit]:
    seconds = config.hours * 3600
    yield Limit(
        what=f"one process lists the source within {config.listing_hours:g} hours",
        images=config.listing_hours * 3.6e9 / config.listing_us,
        remedy="sources of a part each, with a run each",
    )
    yield Limit(
        what="the driver takes receipts and commits shards",
        images=seconds / config.driver_seconds,
        remedy="larger windows; runs side by side, with a part of the source each",
    )
    if config.driver_bytes:
        yield Limit(
            what=f"the driver's memory is {config.head_node_gb:g} GB",
            images=(config.head_node_gb * 1e9 - config.driver_base_mb * 1e6) / config.driver_bytes,
            remedy="a larger head node",
        )
    yield Limit(
        what=f"GETs below {config.prefixes} prefixes",
        images=GETS_PER_PREFIX * config.prefixes * seconds,
        remedy="more prefixes; S3 splits them as load grows",
    )
    yield Limit(
        what="PUTs of attempts below one prefix",
        images=PUTS_PER_PREFIX * seconds / _puts(1 / config.window_images),
        remedy="larger windows, more windows per call of the writer",
    )
