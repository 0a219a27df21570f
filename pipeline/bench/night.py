"""A night of so many images on paper and played, as tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.table import Table

from pipeline.bench.capacity import CapacityConfig, Limit, Night, limits, plan_night
from pipeline.bench.measure import Report, Say, write_result
from pipeline.bench.simulation import Play, Played


def bench_capacity(config: CapacityConfig, say: Say) -> dict[str, Any]:
    """``nights`` on paper, the ``limits`` of all, and what became of each night when it was ``played``."""
    nights = [plan_night(config, images) for images in config.images]
    played = []
    for night in nights:
        say(f"playing a night of {night.images:,} images")
        played.append(Play(config, night).run())
    found = limits(config)
    inputs = asdict(config) | {"json": None}
    named: dict[str, list[Any]] = {"nights": nights, "limits": found, "played": played}
    content = {name: [asdict(row) for row in rows] for name, rows in named.items()}
    write_result(config.json, {"benchmark": "capacity", "inputs": inputs, **content})
    return named


def capacity_report(result: dict[str, Any]) -> Report:
    return [
        _by_field("on paper", result["nights"], Night),
        _limits_table(result["limits"]),
        _by_field("played, with nodes that vanish", result["played"], Played),
    ]


def _by_field(title: str, rows: Sequence[Night] | Sequence[Played], kind: type[Night] | type[Played]) -> Table:
    """A column for each night."""
    table = Table(title=title, title_justify="left")
    for number, field in enumerate(fields(kind)):
        cells = [shown(getattr(row, field.name)) for row in rows]
        if number:
            table.add_row(field.name.replace("_", " "), *cells)
        else:
            table.add_column(field.name)
            for cell in cells:
                table.add_column(cell, justify="right")
    return table


def _limits_table(found: Sequence[Limit]) -> Table:
    table = Table(title="what breaks, the first one first", title_justify="left")
    for column in ("limit", "images a night", "remedy"):
        table.add_column(column, justify="right" if column.startswith("images") else "left")
    for limit in found:
        table.add_row(limit.what, f"{limit.images:,.0f}", limit.remedy)
    return table


def shown(value: float) -> str:
    """Whole numbers and large ones in full, else three digits."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"
