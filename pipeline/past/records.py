"""Records of the runs before a run: many are read side by side, each once, whoever wants it, and the newest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from heapq import nlargest
from typing import Any

from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.store import Store

READERS = 16
"""Threads: from a distant store years of nights one after the other would take minutes."""
Content = Any
"""Of a record all but its files, of which a large run has thousands, unless they are wanted; None where it is gone; and
of one that is broken the exception, for whoever wants it to judge. Anybody may have written it: it can be whatever JSON
can be."""
BROKEN = (LookupError, TypeError, AttributeError, ValueError, RecursionError)
"""What reading raises of what is no record."""
Read = Callable[[Iterable[str]], Iterable[tuple[str, Content]]]
Wanted = Callable[[str, Content], bool]
"""Of a run's name and content. Raises one of BROKEN for what is no record."""


def moment(text: str) -> datetime:
    """Raises one of BROKEN. Where no zone is given, UTC is meant."""
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def last_started(
    written: Mapping[str, datetime], read: Read, most: int, wanted: Wanted = lambda *_: True
) -> list[tuple[str, Content]]:
    """Of the runs that are wanted those ``most`` that were started last, newest first; of broken ones the exception.

    ``written``: when something was last written of each. A run starts no later than that, so runs are read in this
    order, ``READERS`` at a time, until none that is left can be newer: also when an erasure or a compaction has written
    old records anew. What is broken may be of any run. It counts as started when it was written, so that whoever
    asked can name it, and takes no other's place.
    """
    waiting = sorted(written, key=lambda run_id: (written[run_id], run_id), reverse=True)
    found: list[tuple[datetime, str, Content]] = []
    for first in range(0, len(waiting), READERS):
        newest = nlargest(most, (started for started, _, content in found if not isinstance(content, Exception)))
        if len(newest) == most and newest[-1] > written[waiting[first]]:
            break
        for run_id, content in read(waiting[first : first + READERS]):
            try:
                if _is_wanted(run_id, content, wanted):
                    found.append((moment(content["started_at"]), run_id, content))
            except (*BROKEN, OSError) as error:
                found.append((written[run_id], run_id, error))
    found.sort(key=lambda each: each[:2], reverse=True)
    return list(_up_to(most, ((run_id, content) for _, run_id, content in found)))


def _is_wanted(run_id: str, content: Content, wanted: Wanted) -> bool:
    if isinstance(content, Exception):
        raise content
    return content is not None and wanted(run_id, content)  # None: removed a moment ago


def _up_to(most: int, runs: Iterable[tuple[str, Content]]) -> Iterator[tuple[str, Content]]:
    """The first ones, until ``most`` of them are whole."""
    for run_id, content in runs:
        yield run_id, content
        most -= not isinstance(content, Exception)
        if not most:
            return


@dataclass(frozen=True)
class PastRuns:
    """As they are when they are first asked for. Ask anew what may have changed since."""

    store: Store
    with_files: bool = field(default=False, kw_only=True)
    """Keep a record's files too, for whoever reads the tables."""
    kept: dict[str, Content] = field(default_factory=dict)

    @cached_property
    def found(self) -> Mapping[str, tuple[int, datetime]]:
        """Everything below ``runs``."""
        return self.store.objects("runs")

    def newest(self, most: int, wanted: Wanted | None = None) -> list[tuple[str, Content]]:
        """The complete runs that were started last; see ``last_started``. All are wanted that have a run record."""
        written = {run_id: self.found[commit.record_key(run_id)][1] for run_id in commit.recorded(self.found)}
        return last_started(written, self.read, most, wanted or self._is_record)

    def _is_record(self, run_id: str, content: Content) -> bool:
        return bool(commit.checked(self.store, commit.record_key(run_id), content))

    def read(self, run_ids: Iterable[str]) -> Iterator[tuple[str, Content]]:
        """In the order of the names."""
        run_ids = list(run_ids)
        lacking = [run_id for run_id in run_ids if run_id not in self.kept]
        with ThreadPoolExecutor(READERS) as readers:
            self.kept.update(zip(lacking, readers.map(self._read, lacking), strict=True))
        return ((run_id, self.kept[run_id]) for run_id in run_ids)

    def stands_suspect(self, record: Mapping[str, Any]) -> bool:
        """Whether the gates found something in that run, and nobody has accepted it."""
        return bool(record.get("suspect")) and commit.accepted_key(record["run_id"]) not in self.found

    def whole(self, run_ids: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Those that are there. Raises what reading a broken one does, and UsageError for what is no run record."""
        for run_id, content in self.read(run_ids):
            if isinstance(content, Exception):
                raise content
            if content is not None:
                yield commit.checked(self.store, commit.record_key(run_id), content)

    def audits(self, run_ids: Iterable[str]) -> dict[str, Content]:
        """Of those that have one. They are not kept."""
        audited = [run_id for run_id in run_ids if commit.audit_key(run_id) in self.found]
        with ThreadPoolExecutor(READERS) as readers:
            return dict(zip(audited, readers.map(self._json, map(commit.audit_key, audited)), strict=True))

    def _read(self, run_id: str) -> Content:
        content = self._json(commit.record_key(run_id))
        if isinstance(content, dict) and not self.with_files:
            content.pop("files", None)
        return content

    def _json(self, key: str) -> Content:
        try:
            return commit.read_json(self.store, key)
        except (UsageError, OSError) as error:
            return error
