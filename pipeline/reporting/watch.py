"""Who works on which window: a window that kills its actors again and again ends the run by name.

Ray restarts a dead actor and repeats its call without limit, so a window on which a net or a driver
crashes would be tested for ever. Every operator says here what it begins and what it has finished.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import RunError

MAX_DEATHS = 4
"""A fifth try is not made. Losing as many spot nodes in a row under one window is hardly chance."""

Call = tuple[str, tuple[tuple[int, int], ...]]
"""An operator and the (shard, window) of one of its calls."""


class Book:
    """Calls that have begun and not ended, and how often each has begun in vain."""

    def __init__(self) -> None:
        self.begun: Counter[Call] = Counter()
        self.since: dict[Call, float] = {}

    def begin(self, call: Call) -> int:
        """How often this call was begun before and never ended."""
        self.begun[call] += 1
        self.since[call] = time.monotonic()
        return self.begun[call] - 1

    def end(self, call: Call) -> None:
        self.begun.pop(call, None)
        self.since.pop(call, None)

    def died_on(self, windows: tuple[tuple[int, int], ...]) -> bool:
        """Whether any operator has begun with these windows and not ended: its actor died, or is still at it."""
        return any(call[1] == windows for call in self.begun)

    def open_calls(self) -> list[tuple[Call, float]]:
        """Calls without an end, with their seconds, the oldest first."""
        now = time.monotonic()
        return sorted(((call, now - since) for call, since in self.since.items()), key=lambda entry: -entry[1])


class Watch:
    """A handle on the run's book, which lives in an actor beside the driver."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Book)
        self.book = actor.options(scheduling_strategy=here).remote()

    def begin(self, operator: str, windows: list[tuple[int, int]]) -> None:
        """Raises RunError when these windows have killed their actors too often."""
        deaths = ray.get(self.book.begin.remote((operator, tuple(windows))))
        if deaths >= MAX_DEATHS:
            raise RunError(
                f"{deaths} actors of {operator!r} died on {name_windows(windows)}: mend what crashes there, or leave "
                "the images out with --exclude; the manifest in _state names them by shard and window"
            )

    def died_on(self, windows: list[tuple[int, int]]) -> bool:
        """Whether an actor may have died with these windows: they are better not mixed with others."""
        return bool(ray.get(self.book.died_on.remote(tuple(windows))))

    def end(self, operator: str, windows: list[tuple[int, int]]) -> None:
        self.book.end.remote((operator, tuple(windows)))

    def describe(self) -> str:
        """What has been going on for longest, in words."""
        calls = ray.get(self.book.open_calls.remote(), timeout=10)
        if not calls:
            return "no operator is at work"
        return "; ".join(
            f"{operator!r} has held {name_windows(windows)} for {seconds:.0f} s"
            for (operator, windows), seconds in calls[:3]
        )


def name_windows(windows: list[tuple[int, int]]) -> str:
    return ", ".join(f"window {window} of shard {shard}" for shard, window in windows)
