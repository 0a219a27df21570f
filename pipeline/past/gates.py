"""Drift gates: is this night like those before it, by its flag rates, group-positive rates and error rate?

A rate is compared on the scale of Anscombe's arcsine, asin(sqrt((y + 3/8) / (n + 3/4))), on which y of n has the
variance 1 / (4n + 2) whatever the rate is (Anscombe 1948, Biometrika 35, 246-254). Nights differ by more than chance:
the variance between them is DerSimonian and Laird's (1986, Controlled Clinical Trials 7, 177-188), and tonight's rate
is expected inside the prediction interval of Higgins, Thompson and Spiegelhalter (2009, JRSS A 172, 137-159), with
tonight's own noise added and k - 1 degrees of freedom for k nights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

FEWEST_RUNS, MOST_RUNS = 7, 14
"""Earlier runs that a night is compared with: of fewer nobody knows how much nights differ, more are another season."""
FALSE_ALARMS = 0.005
"""Share of nights without drift that any gate may mark, shared out over the gates. The arcsine straightens rates that
differ by factors only in part, so a night in a hundred is promised and half of that is asked for."""
LEAST_SPREAD = 0.05
"""Relative. However alike earlier nights were, a twentieth more is no drift."""


@dataclass(frozen=True)
class Rate:
    """``events`` of ``trials``, of what ``gate`` names."""

    gate: str
    events: float
    trials: float
    what: str
    """In words."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One gate tonight. ``low`` and ``high``: between which the rate was expected, from ``runs`` earlier ones."""

    gate: str
    value: float
    low: float
    high: float
    runs: int
    events: int
    trials: int
    words: str

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high


def rates(record: Mapping[str, Any]) -> Iterator[Rate]:
    """What the gates look at, of one run. Skipped images are in none of it: nobody looked at them."""
    tested = record["stages"][0]["images_in"]
    found = record.get("categories")
    if found is not None:  # records of a version without gates do not tell
        for category in record["plan"]["categories"]:
            yield Rate(f"flagged:{category}", found.get(category, 0), tested, f"share of images flagged as {category}")
    for stage in record["stages"]:
        for number, work in enumerate(stage["rounds"]):
            what = f"share of positive tests in {stage['name']}, round {number + 1}"
            yield Rate(f"positive:{stage['name']}:{number}", work["positive_tests"], work["tests"], what)
    counts = record["counts"]
    yield Rate("errors", counts["error"], counts["listed"] - counts["skipped"], "share of images in error")


def judge(tonight: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], alarms: float) -> dict[str, Any]:
    """Fields of the run record: ``gates``, what was compared with what, and ``suspect``, what was out of bounds."""
    runs = [record["run_id"] for record in earlier]
    mine = {rate.gate: rate for rate in rates(tonight)}
    past = [{rate.gate: rate for rate in rates(record) if rate.trials > 0} for record in earlier]
    usable = {gate: [each[gate] for each in past if gate in each] for gate, rate in mine.items() if rate.trials > 0}
    usable = {gate: nights for gate, nights in usable.items() if len(nights) >= FEWEST_RUNS}
    verdicts = [_verdict(mine[gate], nights, alarms / len(usable)) for gate, nights in usable.items()]
    note = None
    if not verdicts:
        alike = " that took over verdicts, as tonight's does," if tonight.get("increment") else ""
        note = (
            f"too few runs to compare: {len(runs)} complete ones{alike} over this source with the same plan, nets and "
            f"banks, and {FEWEST_RUNS} are needed"
        )
        if len(runs) >= FEWEST_RUNS:
            note = "nothing to compare: too little was tested, tonight or in the runs before"
    shown = [asdict(verdict) for verdict in verdicts]
    failed = [asdict(verdict) for verdict in verdicts if not verdict.passed]
    return {"gates": {"runs": runs, "alarms": alarms, "verdicts": shown, "note": note}, "suspect": failed}


def _verdict(rate: Rate, nights: Sequence[Rate], alarms: float) -> Verdict:
    events, trials = (np.array([getattr(night, name) for night in nights], float) for name in ("events", "trials"))
    low, high = interval(events, trials, rate.trials, alarms)
    value = rate.events / rate.trials
    how = "as" if low <= value <= high else "more than" if value > high else "less than"
    words = (
        f"{rate.what} is {value:.3g} ({rate.events:,.0f} of {rate.trials:,.0f}), {how} expected: {low:.3g} to "
        f"{high:.3g} after {len(nights)} runs"
    )
    return Verdict(
        gate=rate.gate, value=value, low=low, high=high, runs=len(nights), events=round(rate.events),
        trials=round(rate.trials), words=words,
    )  # fmt: skip


def interval(events: np.ndarray, trials: np.ndarray, trials_tonight: float, alarms: float) -> tuple[float, float]:
    """Bounds of tonight's rate, which a night of the same kind leaves with the probability ``alarms``.

    ``events`` of ``trials``: of each earlier night.
    """
    low, high = (
        (np.sin(np.clip(bound, 0, math.pi / 2)) ** 2 * (trials_tonight + 0.75) - 0.375) / trials_tonight
        for bound in scaled_interval(events, trials, trials_tonight, alarms)
    )
    return max(0.0, float(low)), min(1.0, float(high))


def scaled_interval(
    events: np.ndarray, trials: np.ndarray, trials_tonight: np.ndarray | float, alarms: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same on the arcsine scale (``scaled``), for any number of worlds at once: nights are the last axis."""
    nights = events.shape[-1]
    x, noise = scaled(events, trials), 1 / (4 * trials + 2)
    mean, _ = _weighted(x, noise)
    weights = 1 / noise
    total = weights.sum(-1)
    q = (weights * (x - mean[..., None]) ** 2).sum(-1)
    between = (q - (nights - 1)) / (total - (weights**2).sum(-1) / total)
    # d asin(sqrt(p)) = dp / (2 sqrt(p (1 - p))), so a relative spread s of p is s tan(x) / 2 here.
    between = np.maximum(between, (LEAST_SPREAD * np.tan(np.minimum(mean, 1.5)) / 2) ** 2)
    mean, variance = _weighted(x, noise + between[..., None])
    reach = stdtrit(nights - 1, 1 - alarms / 2) * np.sqrt(between + variance + 1 / (4 * trials_tonight + 2))
    return mean - reach, mean + reach


def scaled(events: Any, trials: Any) -> Any:
    """Anscombe's arcsine of a rate."""
    return np.arcsin(np.sqrt((events + 0.375) / (trials + 0.75)))


def _weighted(x: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean with the least variance, and that variance."""
    weights = 1 / variance
    total = weights.sum(-1)
    return (weights * x).sum(-1) / total, 1 / total
