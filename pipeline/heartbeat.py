"""A driver's sign of life between commits, from a thread of its own: a dead driver is not a slow one.

A heartbeat never ends a run: what goes wrong with one is made up for by the next. Each driver writes to a file of its
own, so that nothing is written over, and a write that hangs is left behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from botocore.exceptions import BotoCoreError
from obstore.exceptions import BaseError

from pipeline import commit
from pipeline.store import Store

BEAT_SECONDS = 30.0
STALE_SECONDS = 180.0
"""Without a sign of life for so long a driver counts as gone: six beats, of which each may have been lost."""
RATE_BEATS = 10
"""The rate is that of the last five minutes."""


class Pulse:
    """How far, how fast and until when, from what is seen beat by beat. Its moments are UTC."""

    def __init__(self, listed: int, decided: int, now: datetime) -> None:
        self.listed = listed
        self.moved_at = now
        self.seen: deque[tuple[datetime, int]] = deque([(now, decided)], maxlen=RATE_BEATS + 1)

    def beat(self, decided: int, now: datetime) -> dict[str, Any]:
        """``ends_at`` is None while nothing moves."""
        if decided != self.seen[-1][1]:
            self.moved_at = now
        self.seen.append((now, decided))
        began, first = self.seen[0]
        rate = (decided - first) / max((now - began).total_seconds(), 1e-9)
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
    """While it is entered, ``decided`` is asked every ``seconds``; the answer is written and given to ``tell``."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        epoch: int,
        listed: int,
        decided: Callable[[], int],
        tell: Callable[[dict[str, Any]], None],
        seconds: float = BEAT_SECONDS,
    ) -> None:
        # Without patience: a beat that comes minutes late says nothing that the next one does not.
        self.store = replace(store, patience=0.0)
        self.key = commit.heartbeat_key(run_id, epoch)
        self.named = {"run_id": run_id, "epoch": epoch}
        self.decided, self.tell, self.seconds = decided, tell, seconds
        self.pulse = Pulse(listed, decided(), datetime.now(UTC))
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
        beat = self.named | self.pulse.beat(self.decided(), datetime.now(UTC))
        self.tell(beat)
        try:
            commit.write_json(self.store, self.key, beat)
        except (BaseError, BotoCoreError, OSError):
            return  # the next one says it


def newest_heartbeat(store: Store, run_id: str) -> dict[str, Any] | None:
    """Of the run's newest driver; None when that has not said anything, as drivers of older versions do not."""
    keys = store.sizes(f"{commit.state_prefix(run_id)}/heartbeats")
    return commit.read_json(store, max(keys)) if keys else None
