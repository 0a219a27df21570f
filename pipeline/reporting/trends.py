"""Charts of how runs over one source went, for the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.past.history import History, Night, Value

# The size of a chart's plot, in the units that the template draws in.
WIDTH, HEIGHT = 400.0, 90.0
CHARACTER = 6.0
"""Width of one in a label, at most, in the same units."""
LEAST_STEP = 16
"""Places between the ends of a chart: a few runs are not drawn as if they were a long time."""


def charts(history: History) -> list[dict[str, Any]]:
    """What the template draws, a chart for each figure that at least one run has; none of a single run."""
    nights = history.nights
    if len(nights) < 2:
        return []
    currency = next((night.currency for night in reversed(nights) if night.currency), None)
    cost = [night.cost if night.currency == currency else None for night in nights]
    shown = [
        _chart("Flagged, of what was judged", "percent", {"flagged": [night.flagged for night in nights]}),
        _chart("Item prevalence, from labels or an audit", "percent", {"flagged": [n.prevalence for n in nights]}),
        _chart(
            "Recall",
            "percent",
            {
                "certified": [night.certified for night in nights],
                "audited": [night.audited for night in nights],
                "labelled": [night.labelled for night in nights],
            },
            legend={
                "certified": "the plan's certified bound",
                "audited": "audited",
                "labelled": "against labels",
            },
        ),
        _chart("Relative cost", "number", {"cleared": [night.relative_cost for night in nights]}),
        _chart(f"Cost in {currency}", "number", {"cleared": cost}),
        _chart("Images per second", "number", {"cleared": [night.images_per_s for night in nights]}),
    ]
    common = {"changes": _changes(nights), "moments": _moments(nights), "ends": _ends(nights)}
    return [chart | common for chart in shown if chart is not None]


def _x(number: int, nights: int) -> float:
    """The last run stands at the right end."""
    step = WIDTH / max(LEAST_STEP, nights - 1)
    return WIDTH - step * (nights - 1 - number)


def _moments(nights: Sequence[Night]) -> list[str]:
    """What each run is called below the axis: its day, and its time (UTC) too where the day has had several."""
    runs = Counter(night.scan_date for night in nights)
    return [
        night.scan_date if runs[night.scan_date] == 1 else f"{night.scan_date} {night.started_at:%H:%M}"
        for night in nights
    ]


def _ends(nights: Sequence[Night]) -> list[dict[str, Any]]:
    """Labels of the first and the last run. Where they stand too close for two, one says both."""
    moments, first = _moments(nights), _x(0, len(nights))
    ends = [
        {"label": moments[0], "x": first, "anchor": "start"},
        {"label": moments[-1], "x": WIDTH, "anchor": "end"},
    ]
    if WIDTH - first >= CHARACTER * (len(moments[0]) + len(moments[-1]) + 2):
        return ends
    last = moments[-1]
    if nights[0].scan_date == nights[-1].scan_date:
        last = last.removeprefix(f"{nights[-1].scan_date} ")
    return [ends[-1] | {"label": f"{moments[0]} to {last}"}]


def _changes(nights: Sequence[Night]) -> list[dict[str, Any]]:
    """Where a run has another plan version than the one before, half way between the two."""
    return [
        {
            "x": (_x(number, len(nights)) + _x(number + 1, len(nights))) / 2,
            "before": nights[number].plan_version,
            "after": nights[number + 1].plan_version,
            "run_id": nights[number + 1].run_id,
        }
        for number in range(len(nights) - 1)
        if nights[number].plan_version != nights[number + 1].plan_version
    ]


def _chart(
    title: str, unit: str, series: dict[str, list[Value | None]], *, legend: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """``unit``: the template's filter for a value. None where no run has one.

    Recall, which has the legend, is not drawn from zero: what is to be seen of it lies far above.
    """
    there = [value for values in series.values() for value in values if value is not None]
    if not there:
        return None
    most = max(value.value if value.high is None else value.high for value in there)
    lowest = min(value.value if value.low is None else value.low for value in there)
    least = max(0.0, min(lowest, most - 0.02)) if legend else 0.0  # or one that never moves would have no axis
    ticks = _ticks(least, most)
    low, span = ticks[0], ticks[-1] - ticks[0]

    def up(value: float) -> float:
        return HEIGHT * (1 - (value - low) / span)

    return {
        "title": title,
        "unit": unit,
        "legend": legend,
        "ticks": [(tick, up(tick)) for tick in ticks],
        "series": [
            {"kind": kind, "points": [_point(number, value, len(values), up) for number, value in _known(values)],
             "lines": [" ".join(f"{_x(number, len(values)):.1f},{up(value.value):.1f}" for number, value in part)
                       for part in _unbroken(values)]}
            for kind, values in series.items()
            if any(values)
        ],
    }  # fmt: skip


def _known(values: Sequence[Value | None]) -> Iterator[tuple[int, Value]]:
    return ((number, value) for number, value in enumerate(values) if value is not None)


def _unbroken(values: Sequence[Value | None]) -> list[list[tuple[int, Value]]]:
    """Runs that follow one another and all have the figure: a line over those without it would make one up."""
    parts: list[list[tuple[int, Value]]] = [[]]
    for number, value in enumerate(values):
        if value is None:
            parts.append([])
        else:
            parts[-1].append((number, value))
    return [part for part in parts if len(part) > 1]


def _point(number: int, value: Value, nights: int, up: Any) -> dict[str, Any]:
    interval = None if value.low is None or value.high is None else (up(value.low), up(value.high))
    return {"night": number, "x": _x(number, nights), "y": up(value.value), "value": value, "interval": interval}


def _ticks(least: float, most: float) -> list[float]:
    """Three to five round numbers around all values."""
    span = (most - least) or abs(most) or 1.0
    rough = span / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(step * number, 12) for number in range(first, max(last, first + 1) + 1)]
