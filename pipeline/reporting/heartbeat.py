"""A driver's sign of life while it lists and between commits, from a thread of its own: a dead one is not a slow one.

A heartbeat never ends a run: what goes wrong with one is made up for by the next. Each driver writes to a file of its
own, so that nothing is written over, and a write that hangs is left behind.
"""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError
from obstore.exceptions import BaseError

from pipeline.output import commit
from pipeline.store import Store

T = TypeVar("T")
BEAT_SECONDS = 30.0
STALE_SECONDS = 180.0
"""Without a sign of life for so long a driver counts as gone: six beats, of which each may have been lost."""
RATE_BEATS = 10
"""The rate is that of the last five minutes."""


class Pulse:
    """How far, how fast and until when, from what is seen beat by beat. Its moments are UTC.

    How far is all that is decided; how fast is what was looked at. What earlier runs had judged is committed first and
    in bulk, and says nothing of when the rest will be done.
    """

    def __init__(self, listed: int, decided: int, now: datetime) -> None:
        self.listed, self.decided = listed, decided
        self.moved_at = now
        self.seen: deque[tuple[datetime, int]] = deque([(now, 0)], maxlen=RATE_BEATS + 1)

    def beat(self, decided: int, looked_at: int, now: datetime) -> dict[str, Any]:
        """``looked_at``: by this driver. ``ends_at`` is None while nothing is."""
        if decided != self.decided:
            self.decided, self.moved_at = decided, now
        self.seen.append((now, looked_at))
        began, first = self.seen[0]
        rate = (looked_at - first) / max((now - began).total_seconds(), 1e-9)
        left = self.listed - decided
        return {
            "updated_at": now.isoformat(),
            "moved_at": self.moved_at.isoformat(),
            "listed": self.listed,
            "decided": decided,
            "images_per_s": rate,
            "ends_at": (now + timedelta(seconds=left / rate)).isoformat() if rate > 0 else None,
        }


class Heartbeat:
    """While it is entered, ``say`` is asked every ``seconds``, and the answer written to ``key``."""

    def __init__(
        self, store: Store, key: str, say: Callable[[], dict[str, Any]], seconds: float = BEAT_SECONDS
    ) -> None:
        # Without patience: a beat that comes minutes late says nothing that the next one does not.
        self.store = replace(store, patience=0.0)
        self.key, self.say, self.seconds = key, say, seconds
        self.over = threading.Event()
        # A daemon: a write that hangs must not keep the process.
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join(timeout=1.0)

    def _run(self) -> None:
        while True:
            self._beat()
            if self.over.wait(self.seconds):
                return

    def _beat(self) -> None:
        beat = self.say()
        try:
            commit.write_json(self.store, self.key, beat)
        except (BaseError, BotoCoreError, OSError):
            return  # the next one says it


def of_driver(
    store: Store,
    run_id: str,
    epoch: int,
    listed: int,
    seen: Callable[[], tuple[int, int]],
    tell: Callable[[dict[str, Any]], None],
    seconds: float = BEAT_SECONDS,
) -> Heartbeat:
    """Of a run that is frozen. ``seen`` says at each beat how many images are decided, and how many of them this driver
    has looked at; ``tell`` is given the beat."""
    pulse = Pulse(listed, seen()[0], datetime.now(UTC))

    def say() -> dict[str, Any]:
        beat = {"run_id": run_id, "epoch": epoch} | pulse.beat(*seen(), datetime.now(UTC))
        tell(beat)
        return beat

    return Heartbeat(store, commit.heartbeat_key(run_id, epoch), say, seconds)


def newest_heartbeat(store: Store, run_id: str) -> dict[str, Any] | None:
    """Of the run's newest driver; None when that has not said anything, as drivers of older versions do not."""
    keys = store.sizes(f"{commit.state_prefix(run_id)}/heartbeats")
    return commit.read_json(store, max(keys)) if keys else None


class Listing:
    """The sign of life of a driver that lists a source: nothing says yet what the run is, and it may take hours.

    While it is entered it says how many objects have come. What it said last is left until there is more to say of the
    run; when listing fails there is no run, and it is taken back.
    """

    def __init__(self, store: Store, run_id: str, plan: str, seconds: float = BEAT_SECONDS) -> None:
        self.named = {"run_id": run_id, "plan": {"name": plan}, "started_at": datetime.now(UTC).isoformat()}
        self.listed = 0
        # A name of its own: two drivers that start one run at once must not write over each other.
        key = f"{commit.listing_prefix(run_id)}/{uuid.uuid4().hex[:8]}.json"
        self.heartbeat = Heartbeat(store, key, self._say, seconds)

    def __enter__(self) -> Listing:
        self.heartbeat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heartbeat.__exit__(kind, error, trace)
        if error is not None:
            with suppress(BaseError, BotoCoreError, OSError):
                self.heartbeat.store.delete([self.heartbeat.key])

    def count(self, rows: Iterable[T]) -> Iterator[T]:
        for row in rows:
            self.listed += 1
            yield row

    def _say(self) -> dict[str, Any]:
        return self.named | {"updated_at": datetime.now(UTC).isoformat(), "listed": self.listed}


def forget_listing(store: Store, run_id: str) -> None:
    """Removes what was said while the run's source was listed: its status says more. What stays is litter."""
    with suppress(BaseError, BotoCoreError, OSError):
        store.delete(list(store.sizes(commit.listing_prefix(run_id))))


def newest_listing(store: Store, run_id: str) -> dict[str, Any] | None:
    """Of whoever was alive last; None when nobody has begun to list."""
    said = [commit.read_json(store, key) for key in store.sizes(commit.listing_prefix(run_id))]
    return max((beat for beat in said if beat is not None), key=lambda beat: beat["updated_at"], default=None)
