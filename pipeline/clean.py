"""What dead drivers leave behind, and what may be removed of it: never what a marker names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline import commit, schema
from pipeline.errors import UsageError
from pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class Litter:
    """Dead files of one run. ``reason``: why they are dead, or why the run was left alone (then there are none)."""

    run_id: str
    reason: str
    keys: tuple[str, ...] = ()
    bytes: int = 0


def find_litter(store: Store, older_than: timedelta) -> list[Litter]:
    """Attempts and listings that nothing refers to, run by run.

    A run under which anything was written within ``older_than`` may have a living driver and is left alone.
    A driver that comes later makes its own attempts: it never reads those of another.
    """
    runs = sorted({*store.folders("_attempts"), *store.folders("_state")})
    return [_of_run(store, run_id, older_than) for run_id in runs]


def _of_run(store: Store, run_id: str, older_than: timedelta) -> Litter:
    last = _last_write(store, run_id)
    if last is not None and datetime.now(UTC) - last < older_than:
        return Litter(run_id=run_id, reason=f"left alone: written to at {last:%Y-%m-%d %H:%M} UTC")
    state = store.sizes(commit.state_prefix(run_id))
    kept = _referred_to(store, run_id, list(state))
    listings = {key: size for key, size in state.items() if f"{commit.state_prefix(run_id)}/manifest-" in key}
    found = store.sizes(commit.attempts_prefix(run_id)) | listings
    dead = {key: size for key, size in found.items() if key not in kept}
    reason = "nothing to remove"
    if dead:
        complete = store.exists(commit.record_key(run_id))
        reason = "of a complete run" if complete else "of drivers that are gone; the run can still go on"
    return Litter(run_id=run_id, reason=reason, keys=tuple(sorted(dead)), bytes=sum(dead.values()))


def _last_write(store: Store, run_id: str) -> datetime | None:
    objects = store.objects(commit.state_prefix(run_id)) | store.objects(commit.attempts_prefix(run_id))
    return max((moment for _, moment in objects.values()), default=None)


def _referred_to(store: Store, run_id: str, state: list[str]) -> set[str]:
    kept = set()
    frozen = commit.read_frozen(store, run_id)
    if frozen:
        kept = {shard["key"] for shard in frozen["shards"]}
    for key in state:
        if key.startswith(f"{commit.state_prefix(run_id)}/markers/"):
            marker = commit.read_json(store, key)
            assert marker is not None
            kept |= {file["attempt"] for file in marker["files"]}
    return kept


def find_abandoned(store: Store, run_id: str, older_than: timedelta) -> Litter:
    """Everything of a run that will never be finished, its rows in the tables included.

    Raises UsageError when it is complete, or may have a living driver, or is not there.
    """
    if store.exists(commit.record_key(run_id)):
        raise UsageError(f"run {run_id!r} is complete: its tables stay")
    last = _last_write(store, run_id)
    if last is not None and datetime.now(UTC) - last < older_than:
        raise UsageError(
            f"run {run_id!r} was written to at {last:%Y-%m-%d %H:%M} UTC and may have a living driver: stop that, and "
            "wait, or give a shorter --older-than"
        )
    found: dict[str, int] = {}
    for prefix in (commit.state_prefix(run_id), commit.attempts_prefix(run_id), f"runs/{run_id}"):
        found |= store.sizes(prefix)
    named = re.compile(re.escape(run_id) + r"-shard-\d+\.parquet")
    for table in schema.TABLES:
        rows = store.sizes(table)
        found |= {key: size for key, size in rows.items() if named.fullmatch(key.rsplit("/", 1)[1])}
    if not found:
        raise UsageError(f"there is no run {run_id!r} in {store.uri}")
    return Litter(run_id=run_id, reason="given up", keys=tuple(sorted(found)), bytes=sum(found.values()))
