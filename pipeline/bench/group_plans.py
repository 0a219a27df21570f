"""The plans that are compared: every algorithm with every design, and thresholds that were fitted.

Behind a group stage stands the individual net at its own threshold, so what a plan flags the individual
net flags too; the one exception is the one-round algorithm without retests. The nets that test groups are
smaller than it. So a small net that tests every image alone before it stands among the plans too: what it
saves is not the groups' merit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from models.card import ZOO, Card
from models.group_net import GroupNet
from models.training import host, score_groups
from models.weights import load_net
from pipeline.labels.splits import LabelledPixels
from pipeline.plan import Plan, StageSpec, WindowSpec
from pipeline.planning.calibration import highest_keeping


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What is done with the group sizes a net can test. ``retest``: the individual net has the last word."""

    number: int
    name: str
    all_sizes: bool = False
    """Ever smaller groups, down to single images; else the largest groups only."""
    groupings: Literal[1, 2] = 1
    retest: bool = True


ALGORITHMS = (
    Algorithm(number=1, name="two-round"),
    Algorithm(number=2, name="multi-round", all_sizes=True),
    Algorithm(number=3, name="one-round", groupings=2, retest=False),
    Algorithm(number=3, name="one-round, retested", groupings=2),
)
CASCADE = Algorithm(number=0, name="cascade", all_sizes=True)
"""For nets that test no groups: a small one first, for every image."""
DESIGNS = {
    "cifar-pixel": (1, "pixel merge"),
    "cifar-feature": (2, "feature merge"),
    "cifar-tree": (3, "tree merge"),
}
INDIVIDUAL = "cifar-single"
SMALLER = ("cifar-mini",)
"""Other individual nets, when they are there: does a cheap one do as well, alone or before the individual net?"""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How thresholds are set, on pictures that are not judged on."""

    category: str
    target_recall: float
    """Share of the positives that the individual threshold keeps."""
    kept_share: float
    """Share of what the individual net flags of them that each group round keeps."""
    redraws: int
    """Groups of re-drawn negatives that host each positive."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net of the zoo, and the column of its scores that is the rare class."""

    model: str
    net: GroupNet
    card: Card
    column: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One configuration: what it is, and its plan."""

    name: str
    algorithm: int
    algorithm_name: str
    design: int
    design_name: str
    net: str
    plan: Plan


def load_nets(zoo: Path, names: tuple[str, ...], category: str) -> dict[str, Net]:
    """Individual nets and the group testing nets asked for, by name. Raises ValueError."""
    there = [name for name in SMALLER if (zoo / f"{name}.json").is_file()]
    nets = {}
    for name in (INDIVIDUAL, *there, *names):
        model = name if zoo == ZOO else str((zoo / f"{name}.json").resolve())
        net, card = load_net(model)
        if category not in card.categories:
            raise ValueError(f"model {model!r} scores {list(card.categories)}, not {category!r}")
        nets[name] = Net(model=model, net=net, card=card, column=card.categories.index(category))
        if card.input_size != nets[INDIVIDUAL].card.input_size:
            raise ValueError(
                f"model {model!r} sees {card.input_size} px, {INDIVIDUAL} {nets[INDIVIDUAL].card.input_size}: "
                "nets of one size are compared"
            )
        if name in DESIGNS and max(net.group_sizes) == 1:
            raise ValueError(f"model {model!r} tests no groups: it has no merge points")
    return nets


def make_entries(fitting: Fitting, nets: dict[str, Net], held: LabelledPixels) -> list[Entry]:
    """Every configuration with its thresholds, individual testing first."""
    entries = []
    alone = {name: score_alone(nets[name], held.pixels_NSS3) for name in (INDIVIDUAL, *SMALLER) if name in nets}
    for name, scores_N in alone.items():
        plan = make_plan(fitting, name, [single_stage(fitting, nets[name], scores_N[held.positive_N])])
        entries.append(
            Entry(name=name, algorithm=0, algorithm_name="individual", design=0, design_name="", net=name, plan=plan)
        )
    single = entries[0].plan.stages[0]
    # What the individual net misses no group can bring back.
    found_N = held.positive_N & (alone[INDIVIDUAL] >= single.thresholds[fitting.category][0])
    # Several windows a call: their few survivors then fill a device batch.
    retest = single.model_copy(update={"windows_per_call": 8})
    for name, net in nets.items():
        if name == INDIVIDUAL:
            continue
        number, design = DESIGNS.get(name, (0, ""))
        for algorithm in ALGORITHMS if name in DESIGNS else (CASCADE,):
            group = group_stage(fitting, net, held, found_N, algorithm)
            label = "-".join(map(str, group.rounds)) + "x2" * (group.groupings == 2) + "-1" * algorithm.retest
            entries.append(
                Entry(
                    name=f"{name}-{label}",
                    algorithm=algorithm.number,
                    algorithm_name=algorithm.name,
                    design=number,
                    design_name=design,
                    net=name,
                    plan=make_plan(fitting, f"{name}-{label}", [group, retest] if algorithm.retest else [group]),
                )
            )
    return entries


def group_stage(
    fitting: Fitting, net: Net, held: LabelledPixels, found_N: np.ndarray, algorithm: Algorithm
) -> StageSpec:
    """The algorithm's rounds with this net: its largest groups, or all it can test."""
    sizes = sorted(net.net.group_sizes, reverse=True)
    rounds = tuple(sizes) if algorithm.all_sizes else (sizes[0],)
    thresholds = tuple(group_threshold(fitting, net, held, found_N, size, algorithm.groupings) for size in rounds)
    return StageSpec(
        name="group" if rounds[0] > 1 else "screen",
        model=net.model,
        rounds=rounds,
        groupings=algorithm.groupings,
        thresholds={fitting.category: thresholds},
        input_size=net.card.input_size,
        batch_images=max(1, 256 // rounds[0]) * rounds[0],
        windows_per_call=4,
    )


def make_plan(fitting: Fitting, name: str, stages: list[StageSpec]) -> Plan:
    size = stages[0].rounds[0]
    # As many groups as a group has members: then no two images meet in both groupings.
    window = WindowSpec(images=max(size, 256 // size) * size)
    return Plan(name=name, categories=(fitting.category,), window=window, stages=tuple(stages))


def single_stage(fitting: Fitting, net: Net, scores_P: np.ndarray) -> StageSpec:
    """Individual testing, at the highest threshold that keeps the recall asked for.

    ``scores_P`` are those of held-out positives.
    """
    threshold = highest_keeping(scores_P, fitting.target_recall)
    return StageSpec(
        name="single",
        model=net.model,
        rounds=(1,),
        thresholds={fitting.category: (threshold,)},
        input_size=net.card.input_size,
        batch_images=64,
    )


def score_alone(net: Net, pixels_NSS3: np.ndarray) -> np.ndarray:
    """Scores (N,) of single pictures."""
    return score_groups(net.net, pixels_NSS3, np.arange(len(pixels_NSS3))[:, None])[:, net.column]


def group_threshold(
    fitting: Fitting, net: Net, held: LabelledPixels, found_N: np.ndarray, size: int, groupings: int
) -> float:
    """The highest threshold at which groups of ``size`` keep what the individual net has found.

    Each found picture is hosted by re-drawn negatives; with two groupings it must be positive in both groups.
    """
    # Alone, a picture has no companions to draw again.
    redraws = fitting.redraws if size > 1 else 1
    positives = np.tile(np.flatnonzero(found_N), redraws * groupings)
    rng = np.random.default_rng(fitting.seed)
    hosted = host(positives, np.flatnonzero(~held.positive_N), size, rng)
    scores = score_groups(net.net, held.pixels_NSS3, hosted)[:, net.column]
    # All positives stand there once per redraw; each consecutive ``groupings`` redraws are one case.
    return highest_keeping(scores.reshape(redraws, groupings, -1).min(axis=1).ravel(), fitting.kept_share)
