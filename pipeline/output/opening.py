"""The output of scans as those jobs open it that ask or tend what is there: they never make one."""

from __future__ import annotations

from pipeline.errors import UsageError
from pipeline.storage import READ_PATIENCE
from pipeline.store import Store

TRACES = {"runs", "_state", "_attempts", "reviews"}
"""Folders of which every scan has left one, also one that still lists its source, or died; decisions outlive runs, and
must be reached by an erasure."""


def open_output(uri: str, endpoint_url: str | None, *, kms_key: str | None = None) -> Store:
    """Raises UsageError where no scan has ever begun: a name that is mistyped must not look like an output at rest."""
    store = Store(uri, endpoint_url, kms_key=kms_key, patience=READ_PATIENCE)
    if not store.is_there:
        raise UsageError(f"output {store.name}: no such folder; give the --output of the scans")
    if TRACES.isdisjoint(store.folders("")):
        raise UsageError(f"there is no run under {store.name}; give the --output of the scans")
    return store
