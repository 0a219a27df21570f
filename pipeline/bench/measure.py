"""What all benchmarks share: rivals that take turns, medians with their spread, the form of results, table and plot."""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from pipeline.errors import UsageError
from pipeline.training.machine import describe_machine, describe_versions

Say = Callable[[str], None]
Report = list[Table | str]
"""What a benchmark prints at its end."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One turn of one rival. ``facts``: what else it found out, as recall; of the last turn they go into the row."""

    count: int
    seconds: float
    cpu_seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.count / self.seconds


@dataclass(frozen=True, kw_only=True)
class Rival:
    name: str
    run: Callable[[], Sample]
    note: str = ""
    """What it is, for those who read the table."""


class Clock:
    """Seconds and processor seconds of what happens within ``with``.

    Those of this process and of children that it has waited for; ``machine``: of everything that ran on this
    machine, for what is spread over processes of Ray. Nothing else must run then.
    """

    def __init__(self, *, machine: bool = False) -> None:
        self.machine = machine
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Clock:
        self.began, self.cpu_began = time.perf_counter(), self._cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self.began, self._cpu() - self.cpu_began

    def sample(self, count: int, **facts: Any) -> Sample:
        return Sample(count=count, seconds=self.seconds, cpu_seconds=self.cpu_seconds, facts=facts)

    def _cpu(self) -> float:
        if self.machine:
            return machine_seconds()
        return sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )


def machine_seconds() -> float:
    """For how long the processors of this machine have been busy, together, since it was started."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    with open("/proc/stat") as stat:
        ticks = dict(zip(names, map(int, stat.readline().split()[1:]), strict=False))
    busy = sum(ticks.get(name, 0) for name in ("user", "nice", "system", "irq", "softirq"))
    return busy / os.sysconf("SC_CLK_TCK")


def take_turns(rivals: Sequence[Rival], repeats: int, say: Say, *, warm_up: bool = True) -> list[dict[str, Any]]:
    """A row per rival: all of them once, then again, so that a slow minute is nobody's alone; a first turn is dropped.

    ``rate``: count per second, the median of the turns, with the least and the most.
    """
    samples: dict[str, list[Sample]] = {rival.name: [] for rival in rivals}
    for turn in range(-int(warm_up), repeats):
        for rival in rivals:
            sample = rival.run()
            said = "warm-up" if turn < 0 else f"turn {turn + 1}"
            say(f"{said}, {rival.name}: {sample.rate:,.1f}/s, {sample.seconds:.2f} s")
            if turn >= 0:
                samples[rival.name].append(sample)
    return [_row(rival, samples[rival.name]) for rival in rivals]


def _row(rival: Rival, samples: Sequence[Sample]) -> dict[str, Any]:
    rates = [sample.rate for sample in samples]
    return {
        "name": rival.name,
        "note": rival.note,
        "rate": statistics.median(rates),
        "rate_range": [min(rates), max(rates)],
        "seconds": [sample.seconds for sample in samples],
        "cpu_s_per_1k": 1000 * statistics.median(sample.cpu_seconds / sample.count for sample in samples),
        **samples[-1].facts,
    }


def named(rows: Sequence[dict[str, Any]], rate: str) -> list[dict[str, Any]]:
    """The rows with their rate under the name that it has in this benchmark, as ``images_per_s``."""
    return [
        {"name": row["name"], rate: row["rate"], f"{rate}_range": row["rate_range"]}
        | {key: value for key, value in row.items() if key not in ("name", "rate", "rate_range")}
        for row in rows
    ]


def result_of(benchmark: str, rows: Sequence[dict[str, Any]], *packages: str, **facts: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "machine": describe_machine(),
        "versions": describe_versions("dorfman", *packages),
        **facts,
        "rows": list(rows),
    }


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Raises UsageError."""
    if path is None:
        return
    with writing(path):
        path.write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the folder of ``path``. Raises UsageError for what cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(f"cannot write to {error.filename}: {error.strerror}") from error


def rate_table(title: str, rows: Sequence[dict[str, Any]], rate: str, *, against: str, **more: str) -> Table:
    """``against``: the name of the row that others are a multiple of. ``more``: facts, by their columns' headings."""
    table = Table(title=title, title_justify="left")
    for column in ("name", rate.replace("_per_", "/"), "(least to most)", f"x {against}", "CPU s per 1,000", *more):
        table.add_column(column, justify="left" if column == "name" else "right")
    base = next(row[rate] for row in rows if row["name"] == against)
    for row in rows:
        low, high = row[f"{rate}_range"]
        facts = [_shown(row.get(key)) for key in more.values()]
        table.add_row(
            row["name"],
            f"{row[rate]:,.1f}",
            f"{low:,.1f} to {high:,.1f}",
            f"{row[rate] / base:.2f}",
            f"{row['cpu_s_per_1k']:.2f}",
            *facts,
        )
    return table


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,.4f}" if isinstance(value, float) else str(value)


def plot_rates(path: Path | None, title: str, rows: Sequence[dict[str, Any]], rate: str) -> None:
    """Bars with their spread, as SVG or PNG by the name's ending. Raises UsageError."""
    if path is None:
        return
    rows = rows[::-1]  # the first on top
    figure = Figure(figsize=(8, 0.6 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    rates = [row[rate] for row in rows]
    spread = [[abs(row[rate] - row[f"{rate}_range"][end]) for row in rows] for end in (0, 1)]
    bars = axes.barh([row["name"] for row in rows], rates, xerr=spread, color="#4c72b0", ecolor="#222222", capsize=3)
    axes.bar_label(bars, [f"{value:,.0f}" for value in rates], padding=6)
    axes.set_xlabel(rate.replace("_per_", " per ").replace("_", " "))
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    with writing(path):
        figure.savefig(path)
