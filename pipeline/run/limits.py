"""What a user allows one start of a run: so much work, or until so late. It stops at a shard border, and can go on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline.errors import RunStopped, UsageError
from pipeline.listing.manifest import Shard
from pipeline.output.tally import Tally

CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Limits:
    gmac: float | None = None
    deadline: datetime | None = None

    @staticmethod
    def of(gmac: float | None, deadline: str | None, now: Callable[[], datetime] = _now) -> Limits:
        """Raises UsageError."""
        if gmac is not None and gmac <= 0:
            raise UsageError(f"limit cost is {gmac:g} GMAC: give more than 0, or leave it out")
        return Limits(gmac=gmac, deadline=_moment(deadline, now()) if deadline else None)

    def warning(self, pending: Sequence[Shard]) -> str | None:
        """What to tell a user, before the start, of a limit that cannot be kept; None where it can."""
        given = [
            flag for flag, limit in (("--limit-cost", self.gmac), ("--deadline", self.deadline)) if limit is not None
        ]
        left = _to_test(pending)
        if not given or len(left) != 1:
            return None
        return (
            f"{' and '.join(given)} cannot stop this start: it stops between shards, and there is one of "
            f"{left[0].images:,} images to test; a smaller --shard-size, which a new run takes, makes more of them"
        )


def _to_test(pending: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in pending if not shard.judged]


def _moment(text: str, now: datetime) -> datetime:
    clock = CLOCK.fullmatch(text)
    if clock:
        today = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return today if today > now else today + timedelta(days=1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"deadline {text!r}: write HH:MM (UTC), or a moment as in 2026-11-25T06:00+00:00") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    if moment <= now:
        raise UsageError(f"deadline {text} has passed; it is {now:%Y-%m-%dT%H:%M} UTC")
    return moment


class Budget:
    """Foretells, whenever a shard is committed, whether the next one would pass a limit.

    What a shard will take is what those took that this start has committed, by their images: known content among them
    on both sides, for the next one will have as much. The first shard of a start is always finished: a run that could
    not be would begin anew each night.
    """

    def __init__(
        self, limits: Limits, before: Tally, pending: Sequence[Shard], now: Callable[[], datetime] = _now
    ) -> None:
        """When the first shard that is to be tested begins: others cost nothing, and say nothing of it."""
        self.limits, self.now = limits, now
        self.began = now()
        self.gmac_before = before.gmac
        self.images = _images(pending)

    def check(self, tally: Tally, pending: Sequence[Shard]) -> None:
        """Raises RunStopped. ``pending``: fewer than there were at the start, as a shard has been committed."""
        left = _to_test(pending)
        if not left:
            return
        share = left[0].images / (self.images - _images(pending))  # the next one, as they are streamed
        spent, taken = tally.gmac - self.gmac_before, self.now() - self.began
        if self.limits.gmac is not None and spent * (1 + share) > self.limits.gmac:
            raise RunStopped(
                f"{spent:,.1f} GMAC are done, and another shard would pass the limit of {self.limits.gmac:,.1f}"
            )
        deadline = self.limits.deadline
        if deadline is not None and self.now() + taken * share > deadline:
            raise RunStopped(f"another shard would not be done by {deadline:%Y-%m-%dT%H:%M} UTC")


def _images(pending: Sequence[Shard]) -> int:
    return sum(shard.images for shard in _to_test(pending))
