"""Operators as Ray actors hold them: tables in, tables out.

A module of its own with few imports: an actor that fetches must not load torch to unpickle its class.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Condition, Lock
from typing import Any, Protocol

import pyarrow as pa

from pipeline.errors import RunError
from pipeline.schema import PICTURES, RECEIPT, SCORING
from pipeline.window import windows_from_table, windows_to_table


class Watcher(Protocol):
    """Is told which windows an operator begins and has finished: ``watch.Watch``, without Ray."""

    def begin(self, operator: str, windows: list[tuple[int, int]]) -> None: ...

    def end(self, operator: str, windows: list[tuple[int, int]]) -> None: ...

    def died_on(self, windows: list[tuple[int, int]]) -> bool: ...


class Operator:
    """Builds its operator once, in the actor.

    What the building refuses with RunError, the first call raises: an actor that fails as it starts makes Ray print
    tracebacks, and wrap the reason in an error of its own.
    """

    def __init__(self, build: Callable[..., Callable[[list], list]], args: tuple, options: dict[str, Any]) -> None:
        try:
            self.operator = build(*args, **options)
        except RunError as error:
            self.operator = partial(_refuse, error)


def build_stage(*args: Any, **options: Any) -> Callable[[list], list]:
    """A ``GroupStage``, where it is to work: whoever only names one need not import torch."""
    from pipeline.steps.stages import GroupStage  # noqa: PLC0415

    return GroupStage(*args, **options)


def build_device_decoder(*args: Any) -> Callable[[list], list]:
    """The same for a ``DeviceDecoder``."""
    from pipeline.steps.decode_device import DeviceDecoder  # noqa: PLC0415

    return DeviceDecoder(*args)


def build_scorer(*args: Any) -> Callable[[list], list]:
    """The same for a ``GroupScorer``."""
    from pipeline.steps.scoring import GroupScorer  # noqa: PLC0415

    return GroupScorer(*args)


def _refuse(error: RunError, _: list) -> list:
    raise error


class Pace:
    """How long an operator with one call at a time has nothing to do between two."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.ended: float | None = None
        self.waited = 0.0

    def begin(self) -> None:
        # Before the first call it waits for others to start, which more of them would not shorten.
        self.waited = 0.0 if self.ended is None else time.perf_counter() - self.ended

    def end(self) -> None:
        self.ended = time.perf_counter()

    def note(self, done: list) -> list:
        """``done``, windows or receipts, the first of which bears the wait of the call."""
        for item in done[:1]:
            if isinstance(item, dict):
                next(work for work in item["work"] if work["operator"] == self.operator)["waited_seconds"] = self.waited
            else:
                next(work for work in item.work if work.operator == self.operator).waited_seconds = self.waited
        return done


class Watched(Operator):
    """An operator on windows, which says what it is at work on."""

    def __init__(
        self,
        build: Callable[..., Callable[[list], list]],
        args: tuple,
        options: dict[str, Any],
        name: str,
        watch: Watcher,
    ) -> None:
        super().__init__(build, args, options)
        self.name, self.watch, self.pace = name, watch, Pace(name)

    def __call__(self, table: pa.Table) -> pa.Table:
        windows = list(zip(table["shard"].to_pylist(), table["window"].to_pylist(), strict=True))
        self.pace.begin()
        self.watch.begin(self.name, windows)
        result = self.process(table)
        self.watch.end(self.name, windows)
        self.pace.end()
        return result

    def work(self, items: list) -> list:
        return self.pace.note(self.operator(items))

    def process(self, table: pa.Table) -> pa.Table:
        raise NotImplementedError


class RefsToWindows(Watched):
    def process(self, table: pa.Table) -> pa.Table:
        return windows_to_table(self.work(table.to_pylist()))


class WindowsToWindows(Watched):
    def process(self, table: pa.Table) -> pa.Table:
        return windows_to_table(self.work(windows_from_table(table)))


class WindowsToReceipts(Watched):
    def process(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.work(windows_from_table(table)), RECEIPT)


class RefsToReceipts:
    """All operators of a scan, one behind the other: each call takes its windows through all of them.

    Calls may overlap, in threads: one fetches, or has its pictures decoded by the child, while another is tested. An
    operator has one call at a time. Windows that an actor has died with are alone in the next one: a further death is
    theirs.
    """

    def __init__(self, steps: list[tuple], watch: Watcher) -> None:
        """``steps``: what a ``Watched`` is made of, by operator."""
        self.steps = [
            (Operator(build, args, options).operator, Pace(name), Lock()) for build, args, options, name in steps
        ]
        self.watch = watch
        self.gate = Gate()

    def __call__(self, table: pa.Table) -> pa.Table:
        windows = list(zip(table["shard"].to_pylist(), table["window"].to_pylist(), strict=True))
        items = table.to_pylist()
        with self.gate.pass_through(alone=self.watch.died_on(windows)):
            for operator, pace, lock in self.steps:
                with lock:
                    pace.begin()
                    self.watch.begin(pace.operator, windows)
                    items = pace.note(operator(items))
                    self.watch.end(pace.operator, windows)
                    pace.end()
        return pa.Table.from_pylist(items, RECEIPT)


class Gate:
    """Lets threads in together, or one of them alone."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.inside, self.alone = 0, False

    @contextmanager
    def pass_through(self, *, alone: bool) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.alone and not (alone and self.inside))
            self.inside, self.alone = self.inside + 1, alone
        try:
            yield
        finally:
            with self.changed:
                self.inside, self.alone = self.inside - 1, False
                self.changed.notify_all()


class UrisToPictures(Operator):
    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.operator(table.to_pylist()), PICTURES)


class GroupsToScores(Operator):
    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.operator(table.to_pylist()), SCORING)
