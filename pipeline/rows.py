"""Operators as Ray actors hold them: tables in, tables out.

A module of its own with few imports: an actor that fetches must not load torch to unpickle its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipeline.schema import PICTURES, RECEIPT
from pipeline.window import windows_from_table, windows_to_table


class Operator:
    """Builds its operator once, in the actor."""

    def __init__(self, build: Callable[..., Callable[[list], list]], args: tuple, options: dict[str, Any]) -> None:
        self.operator = build(*args, **options)


class RefsToWindows(Operator):
    def __call__(self, table: pa.Table) -> pa.Table:
        return windows_to_table(self.operator(table.to_pylist()))


class WindowsToWindows(Operator):
    def __call__(self, table: pa.Table) -> pa.Table:
        return windows_to_table(self.operator(windows_from_table(table)))


class WindowsToReceipts(Operator):
    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.operator(windows_from_table(table)), RECEIPT)


class UrisToPictures(Operator):
    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.operator(table.to_pylist()), PICTURES)
