"""Counts that merge: adding them up over windows or shards gives the same in any order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.plan import Plan
from pipeline.window import OUTCOMES

SECONDS = ("seconds", "transfer_seconds", "waited_seconds")
_ADDED = ("images_in", "tests", "positive_tests", "images_out", "gmac", *SECONDS, "bursts")


@dataclass(kw_only=True)
class Tally:
    """Images by outcome, errors by code, skips by reason, flagged ones by what took the place of a test, flagged ones
    by category where nets flagged them, and work by (operator, round)."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    errors: dict[str, int] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    work: dict[tuple[str, int | None], dict[str, float]] = field(default_factory=dict)

    @property
    def listed(self) -> int:
        return sum(self.outcomes.values())

    @property
    def gmac(self) -> float:
        return sum(work["gmac"] for work in self.work.values())

    def add_outcomes(self, outcomes: dict[str, int]) -> None:
        for outcome, images in outcomes.items():
            self.outcomes[outcome] += images

    def add_errors(self, errors: dict[str, int]) -> None:
        _add(self.errors, errors)

    def add_skips(self, skips: dict[str, int]) -> None:
        _add(self.skips, skips)

    def add_taken(self, taken: dict[str, int]) -> None:
        _add(self.taken, taken)

    def add_categories(self, categories: dict[str, int]) -> None:
        _add(self.categories, categories)

    def add_work(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            total = self.work.setdefault((row["operator"], row["round"]), dict.fromkeys(_ADDED, 0))
            for name in _ADDED:
                total[name] += row.get(name, 0)  # markers of older versions have fewer

    def add(self, other: Tally) -> None:
        self.add_outcomes(other.outcomes)
        self.add_errors(other.errors)
        self.add_skips(other.skips)
        self.add_taken(other.taken)
        self.add_categories(other.categories)
        self.add_work(other.work_rows())

    def work_rows(self) -> list[dict[str, Any]]:
        return [{"operator": operator, "round": number} | total for (operator, number), total in self.work.items()]

    def to_json(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("outcomes", "errors", "skips", "taken", "categories")}
        return named | {"work": self.work_rows()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Tally:
        tally = Tally()
        tally.add_outcomes(content["outcomes"])
        tally.add_errors(content["errors"])
        tally.add_skips(content.get("skips", {}))  # markers of runs that knew no canaries have none
        tally.add_taken(content.get("taken", {}))  # nor those of runs that tested every image
        tally.add_categories(content.get("categories", {}))  # nor those of runs without gates
        tally.add_work(content["work"])
        return tally

    def operators(self, prefix: str) -> dict[str, float]:
        """The sum over operators whose name is ``prefix`` or begins with it and a colon."""
        total = dict.fromkeys(_ADDED, 0.0)
        for (operator, _), work in self.work.items():
            if operator == prefix or operator.startswith(f"{prefix}:"):
                for name in _ADDED:
                    total[name] += work[name]
        return total


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for name, images in more.items():
        total[name] = total.get(name, 0) + images


@dataclass(kw_only=True)
class Spent:
    """Seconds of an operator, summed over its actors, and the images that reached it."""

    operator: str
    images_in: int = 0
    seconds: float = 0.0
    """At work."""
    transfer_seconds: float = 0.0
    """Of them, on bringing pixels to a device."""
    waited_seconds: float = 0.0
    """Between calls, with nothing to do or while others took what it had done."""

    @property
    def busy(self) -> float:
        """Share of the time at work."""
        return self.seconds / (self.seconds + self.waited_seconds) if self.seconds else 0.0


def spent_by(rows: Iterable[dict[str, Any]]) -> list[Spent]:
    """By operator in the order of the pipeline, those that took time; ``rows``: a record's operators."""
    total: dict[str, Spent] = {}
    for row in rows:
        spent = total.setdefault(row["operator"], Spent(operator=row["operator"]))
        spent.images_in += 0 if row["round"] else int(row["images_in"])  # a later round has what the first one left
        for name in SECONDS:
            setattr(spent, name, getattr(spent, name) + row.get(name, 0.0))  # older records have fewer
    return [spent for spent in total.values() if spent.seconds]


def stage_rows(tally: Tally, plan: Plan) -> list[dict[str, Any]]:
    """Per stage what the run record says of it, with its rounds one by one.

    ``bursts``: the windows that fell back, None for a stage without a burst rule.
    """
    rows = []
    for stage in plan.stages:
        empty = dict.fromkeys(_ADDED, 0)
        rounds = [tally.work.get((stage.name, number), empty) for number in range(len(stage.rounds))]
        detail = [{"group_size": size} | work for size, work in zip(stage.rounds, rounds, strict=True)]
        rows.append(
            {
                "name": stage.name,
                "rounds": detail,
                "images_in": int(rounds[0]["images_in"]),
                "tests": int(sum(work["tests"] for work in rounds)),
                "images_out": int(rounds[-1]["images_out"]),
                "gmac": sum(work["gmac"] for work in rounds),
                **{name: sum(work[name] for work in rounds) for name in SECONDS},
                "bursts": None if stage.burst is None else int(rounds[0]["bursts"]),
            }
        )
    return rows


def relative_cost(tally: Tally, plan: Plan, individual_gmac: float) -> float | None:
    """GMAC of all stages over that of testing every tested image alone with the last stage's net."""
    stages = stage_rows(tally, plan)
    images = stages[0]["images_in"]
    return sum(stage["gmac"] for stage in stages) / (images * individual_gmac) if images else None
