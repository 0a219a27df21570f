"""A night as a play: nodes fetch and decode block after block and vanish now and then, GPUs test what they send.

One driver takes every receipt and commits every shard.

Nothing of Ray is here but its rules: a slot works through a block of the source, a block whose node is gone begins
anew, windows that wait for a GPU are bounded, and the driver does one thing after the other. Times are in seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.bench.capacity import CapacityConfig, Night
from pipeline.errors import UsageError

SPREAD = 0.2
"""Standard deviation of a window's time, as a share of its mean."""
ENDLESS = 20
"""A night that takes so many times its hours is given up."""

Kind = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Played:
    """What became of a night."""

    images: int
    hours: float
    """Until the last shard was committed."""
    driver_busy: float
    """Share of that time that the driver was at work."""
    longest_wait: float
    """Seconds that a receipt waited for the driver, at the most."""
    open_shards: int
    """Shards of which some windows had come and others not, at the most."""
    vanished: int
    """Nodes."""
    done_again: float
    """Windows that were fetched a second time or a third, over all there are."""


class Driver:
    """One server, in the order of arrival. What it does for a window and for an image's commit is measured."""

    def __init__(self, config: CapacityConfig, windows: int) -> None:
        self.window_seconds = config.window_ms / 1e3
        self.commit_seconds = config.window_images * config.commit_us / 1e6
        self.shard_windows = math.ceil(config.shard_images / config.window_images)
        self.windows = windows
        self.left: dict[int, int] = {}
        self.taken = self.most_open = 0
        self.free = self.busy = self.longest_wait = 0.0

    def take(self, now: float, window: int) -> None:
        """A receipt; the last one of its shard brings on the commit."""
        self.longest_wait = max(self.longest_wait, self.free - now)
        self.taken += 1
        shard = window // self.shard_windows
        size = min(self.shard_windows, self.windows - shard * self.shard_windows)
        left = self.left.pop(shard, size) - 1
        if left:
            self.left[shard] = left
            self.most_open = max(self.most_open, len(self.left))
        took = self.window_seconds + (0 if left else size * self.commit_seconds)
        self.free = max(self.free, now) + took
        self.busy += took


@dataclass(slots=True)
class _Job:
    """``item``: a block for a processor, a window for a GPU. ``done``: windows of the block."""

    kind: Kind
    node: int
    item: int
    done: int = 0


class Play:
    """One night with the nodes that it has on paper."""

    def __init__(self, config: CapacityConfig, night: Night) -> None:
        self.config, self.night = config, night
        self.rng = np.random.default_rng(config.seed)
        self.driver = Driver(config, night.windows)
        self.seconds = window_seconds(config)
        self.times = {kind: self._times(mean) for kind, mean in self.seconds.items()}
        self.block = night.windows_per_block
        self.room = 2 * night.gpus
        self.came = bytearray(night.windows)  # from the nodes that fetch
        self.waiting: dict[Kind, deque[int]] = {
            "cpu": deque(range(math.ceil(night.windows / self.block))),
            "gpu": deque(),
        }
        self.idle: dict[Kind, deque[int]] = {"cpu": deque(), "gpu": deque()}
        self.nodes: dict[int, set[int]] = {}
        self.jobs: dict[int, _Job] = {}
        self.stuck: deque[int] = deque()
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, Callable, tuple]] = []
        self.now = 0.0
        self.vanished = self.again = 0

    def run(self) -> Played:
        """Raises UsageError when nodes vanish before they have done anything."""
        for _ in range(self.night.cpu_nodes):
            self._arrive("cpu", self.config.cpu_node_cpus)
        for _ in range(self.night.gpu_nodes):
            self._arrive("gpu", self.config.gpu_node_gpus)
        while self.driver.taken < self.night.windows:
            self.now, _, act, arguments = heapq.heappop(self.events)
            act(*arguments)
            if self.now > ENDLESS * self.config.hours * 3600:
                raise UsageError(
                    f"vanish_per_hour is {self.config.vanish_per_hour:g}: nodes are gone before a block is done, in "
                    f"{self.block * self.seconds['cpu']:.0f} s; give a lower rate, or larger windows"
                )
        end = max(self.now, self.driver.free)
        return Played(
            images=self.night.images,
            hours=end / 3600,
            driver_busy=self.driver.busy / end,
            longest_wait=self.driver.longest_wait,
            open_shards=self.driver.most_open,
            vanished=self.vanished,
            done_again=self.again / self.night.windows,
        )

    def _at(self, seconds: float, act: Callable, *arguments: object) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), act, arguments))

    def _arrive(self, kind: Kind, slots: int) -> None:
        node = next(self.numbers)
        self.nodes[node] = set()
        self.idle[kind].extend([node] * slots)
        if self.config.vanish_per_hour:
            self._at(self.rng.exponential(3600 / self.config.vanish_per_hour), self._vanish, node, kind, slots)
        self._assign(kind)

    def _vanish(self, node: int, kind: Kind, slots: int) -> None:
        self.vanished += 1
        for number in self.nodes.pop(node):
            self.waiting[kind].appendleft(self.jobs.pop(number).item)
        self.idle[kind] = deque(other for other in self.idle[kind] if other != node)
        self._at(60 * self.config.replace_minutes, self._arrive, kind, slots)
        self._assign(kind)

    def _assign(self, kind: Kind) -> None:
        while self.waiting[kind] and self.idle[kind]:
            number, node = next(self.numbers), self.idle[kind].popleft()
            self.jobs[number] = _Job(kind=kind, node=node, item=self.waiting[kind].popleft())
            self.nodes[node].add(number)
            self._work(number)

    def _work(self, number: int) -> None:
        """On the job's next window."""
        self._at(next(self.times[self.jobs[number].kind]), self._finish_window, number)

    def _times(self, mean: float) -> Iterator[float]:
        # A gamma distribution has no negative times; drawn one by one they would take longer than the rest.
        while True:
            yield from self.rng.gamma(SPREAD**-2, mean * SPREAD**2, 10_000).tolist()

    def _finish_window(self, number: int) -> None:
        if number not in self.jobs:
            return  # its node is gone
        job = self.jobs[number]
        if job.kind == "gpu":
            self._end(number)
            self.driver.take(self.now, job.item)
            while self.stuck and len(self.waiting["gpu"]) < self.room:
                self._pass_on(self.stuck.popleft())
        elif self.room and len(self.waiting["gpu"]) >= self.room:
            self.stuck.append(number)
        else:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        """A fetched window to the GPUs, or without any to the driver; then the next one of its block."""
        if number not in self.jobs:
            return
        job = self.jobs[number]
        window = job.item * self.block + job.done
        if self.came[window]:
            self.again += 1
        else:
            self.came[window] = True
            if self.room:
                self.waiting["gpu"].append(window)
                self._assign("gpu")
            else:
                self.driver.take(self.now, window)
        job.done += 1
        if job.done < self.block and window + 1 < self.night.windows:
            self._work(number)
        else:
            self._end(number)

    def _end(self, number: int) -> None:
        job = self.jobs.pop(number)
        self.nodes[job.node].remove(number)
        self.idle[job.kind].append(job.node)
        self._assign(job.kind)


def window_seconds(config: CapacityConfig) -> dict[Kind, float]:
    """Of one window in one slot: a processor, with its share of the node's network, or a GPU."""
    sent = config.moved_bytes if config.gpu_seconds else 0
    gbit = 8e-9 * max(config.image_bytes, sent)
    image = {
        "cpu": max(config.cpu_ms / 1e3, gbit * config.cpu_node_cpus / config.cpu_node_gbit),
        "gpu": config.gpu_seconds,
    }
    return {"cpu": config.window_images * image["cpu"], "gpu": config.window_images * image["gpu"]}
