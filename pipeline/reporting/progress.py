"""How far a scan is, told while it runs: a live table on a terminal, an event now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.listing.manifest import Shard
from pipeline.output.tally import Tally, spent_by, stage_rows
from pipeline.plan import Plan
from pipeline.reporting.events import Events, told_as_json
from pipeline.reporting.prices import cost_rows
from pipeline.reporting.takeover import ANEW, flagged_before, standing
from pipeline.window import KNOWN_CONTENT

LINE_SECONDS = 15


class Progress:
    """Counts receipts: every number shown has reached the sink."""

    def __init__(
        self, run_id: str, plan: Plan, listed: int, committed_before: int, console: Console | None = None
    ) -> None:
        self.run_id = run_id
        self.plan = plan
        self.listed = listed
        self.before = committed_before
        self.judged_before = 0
        self.events = Events(run_id, console)
        self.tally = Tally()
        self.began = self.last_line = time.perf_counter()
        shown = console or Console()
        live = shown.is_terminal and not told_as_json()
        self.live = Live(console=shown, auto_refresh=False) if live else None

    def __enter__(self) -> Progress:
        before = f" ({self.before:,} of {self.listed:,} were committed before)" if self.before else ""
        self.events.tell(
            "started",
            f"run {self.run_id}: scanning {self.listed - self.before:,} images{before}",
            plan=self.plan.name,
            listed=self.listed,
            committed_before=self.before,
        )
        if self.live:
            self.live.start()
            self.live.update(self._table(), refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def add(self, receipt: dict[str, Any]) -> None:
        self.tally.add_outcomes({entry["outcome"]: entry["images"] for entry in receipt["outcomes"]})
        self.tally.add_work(receipt["work"])
        if self.live:
            self.live.update(self._table(), refresh=True)
        elif time.perf_counter() - self.last_line > LINE_SECONDS:
            self.last_line = time.perf_counter()
            self.events.tell("progress", self._line(), decided=self.decided, images_per_s=round(self._rate(), 1))

    def committed(self, shard: Shard, done: int, shards: int) -> None:
        if shard.judged:
            self.judged_before += shard.images
        if not self.live:
            why = f": {shard.images:,} images judged before" if shard.judged else ""
            text = f"shard {shard.index} committed ({done} of {shards}){why}" if shards > 1 else None
            self.events.tell("shard_committed", text, shard=shard.index, images=shard.images, done=done, shards=shards)

    @property
    def decided(self) -> int:
        """Images whose outcome has reached the sink, those committed before, and those that earlier runs judged."""
        return self.before + self.judged_before + self.tally.listed

    def _line(self) -> str:
        stages = ", ".join(
            f"{row['name']} {row['images_in']:,} -> {row['images_out']:,}" for row in stage_rows(self.tally, self.plan)
        )
        errors = self.tally.outcomes["error"]
        return f"{self.decided:,} of {self.listed:,} images, {self._rate():.0f}/s; {stages}; errors {errors:,}"

    def _rate(self) -> float:
        """Images a second that were looked at."""
        return self.tally.listed / (time.perf_counter() - self.began)

    def _table(self) -> Table:
        table = Table(title=f"{self.decided:,} of {self.listed:,} images, {self._rate():.0f}/s", title_justify="left")
        for column in ("step", "images in", "tests", "positive", "images out"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for operator in ("fetch", "decode"):
            work = self.tally.operators(operator)
            table.add_row(operator, f"{work['images_in']:,.0f}", "", "", f"{work['images_out']:,.0f}")
        for row in stage_rows(self.tally, self.plan):
            for work in row["rounds"]:
                table.add_row(
                    f"{row['name']}, groups of {work['group_size']}",
                    f"{work['images_in']:,.0f}",
                    f"{work['tests']:,.0f}",
                    f"{work['positive_tests']:,.0f}",
                    f"{work['images_out']:,.0f}",
                )
        return table


def closing_table(record: dict[str, Any]) -> Table:
    """What the run came to, from its record."""
    table = Table(title=f"run {record['run_id']}: {record['status']}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, images in record["counts"].items():
        for label, value in _flagged_rows(record) if name == "flagged" else [(name, images)]:
            table.add_row(label, f"{value:,}")
        for code, number in sorted(record["errors"].items()) if name == "error" else ():
            table.add_row(f"  {code}", f"{number:,}")
    for label, value in _taken_rows(record):
        table.add_row(label, value)
    canaries = record.get("canaries", {})  # of older records there are none
    if any(canaries.values()):
        table.add_row("canaries", ", ".join(f"{images:,} {how}" for how, images in canaries.items()))
    table.add_section()
    for stage in record["stages"]:
        for work in stage["rounds"]:
            label = f"{stage['name']}, groups of {work['group_size']}"
            table.add_row(
                label, f"{work['images_in']:,.0f} images, {work['tests']:,.0f} tests, {work['gmac']:,.1f} GMAC"
            )
        if stage["bursts"] is not None:
            table.add_row(f"{stage['name']}, windows that fell back", f"{stage['bursts']:,} of {record['windows']:,}")
    cost = record["relative_cost"]
    table.add_row(
        "cost relative to testing every image alone", "no image was tested" if cost is None else f"{cost:.3f}"
    )
    for row in cost_rows(record):
        table.add_row(*row)
    table.add_section()
    if record["quality"]:
        for row in _quality_rows(record["quality"], anew=bool(record.get("increment"))):
            table.add_row(*row)
        table.add_section()
    for row in time_rows(record):
        table.add_row(*row)
    table.add_row("seconds", f"{record['seconds']:.1f}, of them {record['startup_seconds']:.1f} to the first result")
    table.add_row("images/s", f"{record['images_per_s']:.0f}")
    return table


def time_rows(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Where actors spent their time, and which of them hardly wait: more of those help."""
    times = spent_by(record["operators"])
    total = sum(spent.seconds for spent in times)
    for spent in times:
        transfer = f", {spent.transfer_seconds:,.1f} s of it transfer" if spent.transfer_seconds else ""
        waited = f"; waited {spent.waited_seconds:,.1f} s" if spent.waited_seconds else ""
        yield (
            f"{spent.operator}, time at work",
            f"{spent.seconds:,.1f} s, {spent.seconds / total:.0%}{transfer}{waited}",
        )
    if any(spent.waited_seconds for spent in times):
        busiest = max(times, key=lambda spent: spent.busy)
        yield "more actors help first", f"{busiest.operator}, at work for {busiest.busy:.0%} of its time"


def _flagged_rows(record: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """What an incremental run flagged is not all that stands."""
    tonight, before, all_of_it = record["counts"]["flagged"], flagged_before(record), standing(record)
    yield "flagged tonight" if record.get("increment") else "flagged", tonight
    if record.get("increment") and before is not None and all_of_it is not None:
        yield "  flagged before and unchanged", before
        yield "  flagged, standing in the source", all_of_it


def _taken_rows(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was not tested because it had been judged before, or because a hash said enough."""
    increment = record.get("increment")  # older records have none of this
    if increment:
        yield f"since {increment['run_id']}, unchanged", f"{increment['unchanged']:,}"
        yield "  tested", ", ".join(f"{increment[name]:,} {why}" for name, why in ANEW.items())
        yield "  gone", f"{increment['deleted']:,}"
        if increment["judged_otherwise"]:
            yield "  judged by another plan, net or bank", f"{increment['judged_otherwise']:,}"
        if increment.get("under_other_policy"):
            yield "  flagged, with the action of another policy", f"{increment['under_other_policy']:,}"
    known = record.get("skips", {}).get(KNOWN_CONTENT, 0)
    if known:
        yield "known content, cleared before", f"{known:,}"
    for what, images in sorted(record.get("taken", {}).items()):
        yield f"{what}, flagged without a test", f"{images:,}"
    for bank, entries in record.get("ignored_entries", {}).items():
        yield f"entries of bank {bank} that match too much", f"{len(entries):,}, not obeyed"


def _quality_rows(quality: dict[str, Any], *, anew: bool) -> list[tuple[str, str]]:
    """``anew``: of a night that judged only what is new or changed, of which labels may know little."""
    judged = " that were judged this time" if anew else ""
    rows = []
    for name, label, count in (
        ("recall", "recall", f"{quality['positives']:,} violating images{judged}"),
        ("false_positive_rate", "false-positive rate", f"{quality['negatives']:,} others{judged}"),
    ):
        if quality[name] is None:
            rows.append((label, f"unknown: {count}"))
            continue
        low, high = quality[f"{name}_interval"]
        rows.append((label, f"{quality[name]:.4f} [{low:.4f}, {high:.4f}] of {count}"))
    return rows
