"""Records of the runs before a run: many are read side by side, and each once, whoever wants it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
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

    def newest(self, most: int) -> list[str]:
        """Names of complete runs, those first whose record was written last: an output may hold years of nights."""
        written = {run_id: self.found[commit.record_key(run_id)][1] for run_id in commit.recorded(self.found)}
        return sorted(written, key=lambda run_id: written[run_id], reverse=True)[:most]

    def read(self, run_ids: Iterable[str]) -> Iterator[tuple[str, Content]]:
        """In the order of the names."""
        run_ids = list(run_ids)
        lacking = [run_id for run_id in run_ids if run_id not in self.kept]
        with ThreadPoolExecutor(READERS) as readers:
            self.kept.update(zip(lacking, readers.map(self._read, lacking), strict=True))
        return ((run_id, self.kept[run_id]) for run_id in run_ids)

    def whole(self, run_ids: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Those that are there. Raises what reading a broken one does."""
        for _, content in self.read(run_ids):
            if isinstance(content, Exception):
                raise content
            if content is not None:
                yield content

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
