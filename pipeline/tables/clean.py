"""What dead drivers leave behind, and what may be removed of it: never what a marker names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline import schema
from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.store import Store
from pipeline.tables.compact import unnamed_files

ENDED = ("stopped", "failed")
"""What a driver says of a run that it has left unfinished."""


@dataclass(frozen=True, kw_only=True)
class Litter:
    """Dead files of one run. ``reason``: why they are dead, or why the run was left alone (then there are none)."""

    run_id: str
    reason: str
    keys: tuple[str, ...] = ()
    bytes: int = 0


def find_litter(store: Store, older_than: timedelta) -> list[Litter]:
    """Attempts, listings and, of complete runs, files in the tables that nothing refers to, run by run.

    A run under which anything was written within ``older_than`` may have a living driver and is left alone.
    A driver that comes later makes its own attempts: it never reads those of another.
    """
    runs = sorted({*store.folders("_attempts"), *store.folders("_state"), *commit.complete_runs(store)})
    return [_of_run(store, run_id, older_than) for run_id in runs]


def _of_run(store: Store, run_id: str, older_than: timedelta) -> Litter:
    state, attempts = store.objects(commit.state_prefix(run_id)), store.objects(commit.attempts_prefix(run_id))
    record = commit.read_record(store, run_id)
    unnamed = unnamed_files(store, record) if record else {}
    alive = _written_lately(state | attempts | unnamed, older_than)
    if alive:
        return Litter(run_id=run_id, reason=f"left alone: {alive}")
    kept = _referred_to(store, run_id, list(state))
    begun = (f"{commit.state_prefix(run_id)}/manifest-", f"{commit.listing_prefix(run_id)}/")
    listings = {key: found for key, found in state.items() if key.startswith(begun)}
    dead = {key: size for key, (size, _) in (attempts | listings | unnamed).items() if key not in kept}
    reason = "nothing to remove"
    if dead and record:
        reason = "of a complete run"
    elif dead:
        frozen = f"{commit.state_prefix(run_id)}/run.json" in state
        reason = f"of drivers that are gone; {'the run can still go on' if frozen else 'there is no run to go on with'}"
    return Litter(run_id=run_id, reason=reason, keys=tuple(sorted(dead)), bytes=sum(dead.values()))


def _written_lately(objects: dict[str, tuple[int, datetime]], older_than: timedelta) -> str | None:
    """In words, when anything of a run is younger than that."""
    last = max((moment for _, moment in objects.values()), default=None)
    if last is None or datetime.now(UTC) - last >= older_than:
        return None
    return f"written to at {last:%Y-%m-%d %H:%M} UTC"


def _referred_to(store: Store, run_id: str, state: list[str]) -> set[str]:
    kept = set()
    frozen = commit.read_frozen(store, run_id)
    if frozen:
        # Older runs knew neither contents nor banks.
        parts = [*frozen["shards"], *frozen.get("contents", []), *frozen.get("banks", [])]
        kept = {part["key"] for part in parts}
    for key in state:
        if key.startswith(f"{commit.state_prefix(run_id)}/markers/"):
            marker = commit.read_json(store, key)
            assert marker is not None
            kept |= {file["attempt"] for file in marker["files"]}
    return kept


def find_abandoned(store: Store, run_id: str, older_than: timedelta) -> Litter:
    """Everything of a run that will never be finished, its rows in the tables included.

    Of one that said itself that it has stopped or failed, at once; of any other when nothing was written within
    ``older_than``. Raises UsageError when it is complete, or may have a living driver, or is not there.
    Workers outlive what their driver says of the end by seconds: what they write after this is litter of a later day.
    """
    if store.exists(commit.record_key(run_id)):
        raise UsageError(f"run {run_id!r} is complete: its tables stay")
    state, attempts = store.objects(commit.state_prefix(run_id)), store.objects(commit.attempts_prefix(run_id))
    alive = _written_lately(state | attempts, older_than)
    if alive and not _has_ended(store, run_id, state):
        raise UsageError(
            f"run {run_id!r} was {alive} and may have a living driver: stop that, and wait, or give a "
            "shorter --older-than"
        )
    found = {key: size for key, (size, _) in (state | attempts).items()} | store.sizes(f"runs/{run_id}")
    named = re.compile(re.escape(run_id) + r"-shard-\d+\.parquet")
    for table in schema.TABLES:
        rows = store.sizes(table)
        found |= {key: size for key, size in rows.items() if named.fullmatch(key.rsplit("/", 1)[1])}
    if not found:
        raise UsageError(f"there is no run {run_id!r} in {store.uri}")
    return Litter(run_id=run_id, reason="given up", keys=tuple(sorted(found)), bytes=sum(found.values()))


def _has_ended(store: Store, run_id: str, state: dict[str, tuple[int, datetime]]) -> bool:
    """Whether its driver has said so, and none has come after it: that would have left a sign in the state at once.

    Attempts are none: workers of the driver that has ended still write some until Ray has ended too.
    """
    status = commit.read_json(store, commit.status_key(run_id))
    if status is None or status["status"] not in ENDED:
        return False
    said = store.objects(f"runs/{run_id}")[commit.status_key(run_id)][1]
    return all(moment <= said for _, moment in state.values())
