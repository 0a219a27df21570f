"""Histograms of scores, by stage and round, in the units that the report's template draws in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.plan import StageSpec

# Bins are even in log-odds: on the plain scale nearly every score would fall into the first or last.
LOGIT_LIMIT = 10.0
SCORE_TICKS = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
# The size of a chart's plot, in the units that the template draws in.
PLOT_WIDTH, PLOT_HEIGHT = 400.0, 110.0
BIN_WIDTH = 8.0


class Scores:
    """How many cleared and how many flagged images had which score, by stage and round."""

    def __init__(self, stages: tuple[StageSpec, ...]) -> None:
        self.rounds = [(stage, number) for stage in stages for number in range(len(stage.rounds))]
        # Thresholds are edges, so that no bar holds scores of both sides of one.
        self.edges = [_edges([values[number] for values in stage.thresholds.values()]) for stage, number in self.rounds]
        self.counts = [
            {kind: np.zeros(len(edges) - 1, np.int64) for kind in ("cleared", "flagged")} for edges in self.edges
        ]

    def add(self, kind: str, table: pa.Table) -> None:
        """``table``: columns of stage, round and score, in this order."""
        stage, number, _ = (pc.field(name) for name in table.column_names)
        for (spec, index), edges, counts in zip(self.rounds, self.edges, self.counts, strict=True):
            mine = table.filter((stage == spec.name) & (number == index))
            counts[kind] += np.histogram(axis_position(mine[2].to_numpy()), edges)[0]

    def charts(self) -> Iterator[dict[str, Any]]:
        """One chart a round, all with the same axis of counts."""
        most = max(int(bins.max()) for counts in self.counts for bins in counts.values())
        decades = max(1, math.ceil(math.log10(max(1, most))))
        for (stage, number), edges, counts in zip(self.rounds, self.edges, self.counts, strict=True):
            limits = {category: values[number] for category, values in stage.thresholds.items()}
            yield {
                "stage": stage.name,
                "round": number,
                "group_size": stage.rounds[number],
                "totals": {kind: int(bins.sum()) for kind, bins in counts.items()},
                "bars": {kind: list(_columns(bins, edges, decades)) for kind, bins in counts.items()},
                "count_ticks": [(10**power, _height(10**power, decades)) for power in range(decades + 1)],
                "thresholds": [(category, limit, float(axis_position(limit))) for category, limit in limits.items()],
            }


def axis_position(score: Any) -> Any:
    """Where scores stand on the axis, in plot units; those beyond its ends stand at them."""
    inside = np.clip(np.asarray(score, np.float64), 1e-9, 1 - 1e-9)
    return ((np.log(inside / (1 - inside)) / LOGIT_LIMIT).clip(-1, 1) + 1) / 2 * PLOT_WIDTH


def _edges(thresholds: list[float]) -> np.ndarray:
    """Bins of one width from the first threshold outwards; those of other categories part the bins that they fall into,
    and the first and the last end with the axis."""
    first, *others = axis_position(thresholds)
    reach = math.ceil(PLOT_WIDTH / BIN_WIDTH)
    inner = first + BIN_WIDTH * np.arange(-reach, reach + 1)  # so that the threshold itself is exactly an edge
    inner = inner[(inner > BIN_WIDTH / 2) & (inner < PLOT_WIDTH - BIN_WIDTH / 2)]
    return np.unique([0.0, *inner, *others, PLOT_WIDTH])


def _height(count: int, decades: int) -> float:
    """Log scale from a half, so that a single image has a bar, to the decade above the highest count."""
    return PLOT_HEIGHT * math.log(2 * count) / math.log(2 * 10**decades)


def _columns(bins: np.ndarray, edges: np.ndarray, decades: int) -> Iterator[dict[str, Any]]:
    scores = 1 / (1 + np.exp(LOGIT_LIMIT * (1 - 2 * edges / PLOT_WIDTH)))
    scores[[0, -1]] = 0, 1
    for index in np.flatnonzero(bins).tolist():
        count = int(bins[index])
        yield {
            "x": edges[index],
            "width": edges[index + 1] - edges[index],
            "height": _height(count, decades),
            "count": count,
            "low": scores[index],
            "high": scores[index + 1],
        }
