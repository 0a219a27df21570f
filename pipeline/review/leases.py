"""Who is looking at which image: a small file a lease, so that two reviewers do not get the same one at one time.

    OUT/reviews/_leases/<kind>-<image_id>.json

Made by conditional PUT; when it has run out, the next one takes it over by compare-and-swap. Reviewers may sit at two
machines, so a lease is a file in the output and not in anybody's memory. Nothing is lost when one fails: two people
then look at one image, and both decisions are kept.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from pipeline.errors import RunError
from pipeline.review.decisions import FOLDER
from pipeline.store import Store

LEASES = f"{FOLDER}/_leases"
LEASE_SECONDS = 300.0


def now() -> datetime:
    return datetime.now(UTC)


def image_of(key: str) -> str:
    """The image that a lease is about, by the lease's key."""
    return key.rsplit("/", 1)[-1].partition("-")[2].removesuffix(".json")


@contextmanager
def alone(store: Store, what: str, clock: Callable[[], datetime] = now) -> Iterator[Callable[[], None]]:
    """Keeps out whoever else rewrites the same. What it yields holds on to it: to be called before each change.

    Both raise RunError when it is another's. One that was killed loses it when its lease has run out.
    """
    leases = Leases(store, "alone", secrets.token_hex(16), clock)

    def hold() -> None:
        if not leases.take(what):
            raise RunError(
                f"{what} are being merged or erased by another job at this moment: run this again when that has ended, "
                f"or {LEASE_SECONDS / 60:g} minutes after it was killed"
            )

    hold()
    try:
        yield hold
    finally:
        leases.release([what])


class Leases:
    """The leases of one session, for decisions of one kind. ``holder``: unique to the session."""

    def __init__(self, store: Store, kind: str, holder: str, clock: Callable[[], datetime] = now) -> None:
        self.store = store
        self.kind = kind
        self.holder = holder
        self.clock = clock
        self.until: dict[str, datetime] = {}
        """By image: until when a lease of ours runs."""
        self.others: dict[str, datetime] = {}
        """The same of others', as last seen: while it runs nobody is asked again, until ``forget``."""

    def runs(self, image_id: str) -> bool:
        """Whether we hold the image."""
        moment = self.clock()
        return self.until.get(image_id, moment) > moment

    def forget(self) -> None:
        """Others may have given up leases before their time."""
        self.others.clear()

    def take(self, image_id: str) -> bool:
        """Takes the image's lease or prolongs our own; False while another session holds it."""
        moment = self.clock()
        if self.others.get(image_id, moment) > moment:
            return False
        if self.until.get(image_id, moment) > moment + timedelta(seconds=LEASE_SECONDS / 2):
            return True
        until = moment + timedelta(seconds=LEASE_SECONDS)
        body = json.dumps({"holder": self.holder, "until": until.isoformat()}).encode()
        if not self.store.create(self._key(image_id), body) and not self._take_over(image_id, body, moment):
            self.until.pop(image_id, None)
            return False
        self.until[image_id] = until
        return True

    def _take_over(self, image_id: str, body: bytes, moment: datetime) -> bool:
        try:
            present, version = self.store.read_version(self._key(image_id))
        except FileNotFoundError:
            return self.store.create(self._key(image_id), body)
        lease = json.loads(present)
        until = datetime.fromisoformat(lease["until"])
        if lease["holder"] != self.holder and until > moment:
            self.others[image_id] = until
            return False
        return self.store.replace(self._key(image_id), body, version) is not None

    def release(self, images: list[str]) -> None:
        """Gives up leases of ours that still run. One that has run out may be another's by now."""
        moment = self.clock()
        held = [image for image in images if self.until.pop(image, moment) > moment]
        self.store.delete([self._key(image) for image in held])

    def sweep(self) -> None:
        """Removes leases, whoever's, that ran out long ago: what sessions that were killed have left."""
        dead = self.clock() - timedelta(seconds=2 * LEASE_SECONDS)
        self.store.delete([key for key, (_, written) in self.store.objects(LEASES).items() if written < dead])

    def _key(self, image_id: str) -> str:
        return f"{LEASES}/{self.kind}-{image_id}.json"
