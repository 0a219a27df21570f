"""What a plan finds and costs at a prevalence, without a scan of millions of pictures.

At a prevalence of 0.1 % the nine thousand negatives of a test set would be scanned with nine positives:
recall would be luck. So the plan's first stage runs twice, on groups without a positive and on groups
that hold one, and both are mixed as often as they would occur.

For groups of M at prevalence p a group holds a positive in 1 - (1 - p)^M of all cases, and a negative
shares its group with one in 1 - (1 - p)^(M - 1). A group with several counts as one with one: at 1 % and
M = 8 that is one in thirty of those that hold any.

Shapes: N pictures, W of them in a window; A appearances of pictures in the first stage's groups (each
picture appears several times, with other companions); J groupings, the groups of one size an image sits in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from models.intervals import interval
from pipeline.plan import Plan, StageSpec
from pipeline.steps.groups import form_groups
from pipeline.steps.stages import GroupStage
from pipeline.window import Image, Window


class Effort(NamedTuple):
    """What testing takes, per image. ``seconds`` are those of the stage's calls on this machine."""

    tests: float
    gmac: float
    seconds: float

    def plus(self, other: Effort, share: float) -> Effort:
        return Effort(*(mine + share * more for mine, more in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Rates and costs per image at one prevalence. Intervals are Clopper and Pearson's at 95 %, over unique
    pictures: drawing other companions for the same ones makes no new ones."""

    recall: float
    recall_interval: tuple[float, float]
    false_positive_rate: float
    false_positive_rate_interval: tuple[float, float]
    effort: Effort


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage on groups without a positive (clean) and on groups with one (hosted)."""

    size: int
    groupings: int
    negative_A: np.ndarray
    """Which picture appeared."""
    companions_A: np.ndarray
    """How many of its groups held a positive."""
    negative_passed_A: np.ndarray
    positive_A: np.ndarray
    positive_passed_A: np.ndarray
    clean: Effort
    hosted: Effort

    def effort(self, prevalence: float) -> Effort:
        share = 1 - (1 - prevalence) ** self.size
        return Effort(0, 0, 0).plus(self.clean, 1 - share).plus(self.hosted, share)

    def negative_weights(self, prevalence: float) -> np.ndarray:
        """(A,), adding up to 1: how much each appearance of a negative stands for."""
        share = 1 - (1 - prevalence) ** (self.size - 1)
        weights = np.zeros(len(self.companions_A))
        for hosted, chance in enumerate(binom.pmf(np.arange(self.groupings + 1), self.groupings, share)):
            seen = self.companions_A == hosted
            if chance > 0 and not seen.any():
                raise ValueError(
                    f"no negative was seen with a positive in {hosted} of its {self.groupings} groups: "
                    "judge on more pictures"
                )
            weights[seen] = chance / max(1, seen.sum())
        return weights

    def positive_weights(self) -> np.ndarray:
        """(A,), adding up to 1: each unique positive counts the same, however often it was hosted."""
        _, rows, times = np.unique(self.positive_A, return_inverse=True, return_counts=True)
        return 1 / times[rows] / len(times)

    def passed(self) -> dict[int, bool]:
        """By picture, for a stage that tests single images: a verdict without companions."""
        assert self.size == 1
        pictures = np.concatenate([self.negative_A, self.positive_A])
        passed = np.concatenate([self.negative_passed_A, self.positive_passed_A])
        return dict(zip(pictures.tolist(), passed.tolist(), strict=True))


class Judge:
    """Judges plans on labelled pictures: ``pixels_NSS3`` uint8, ``positive_N`` bool.

    ``passes``: how often the negatives are shuffled into clean groups. ``redraws``: how many groups of
    re-drawn negatives host each positive. A stage that several plans share runs once.
    """

    def __init__(
        self,
        pixels_NSS3: np.ndarray,
        positive_N: np.ndarray,
        *,
        passes: int,
        redraws: int,
        seed: int,
        threads: int,
        gpu: bool = False,
    ) -> None:
        self.pixels_NSS3 = pixels_NSS3
        self.positives = np.flatnonzero(positive_N)
        self.negatives = np.flatnonzero(~positive_N)
        self.passes, self.redraws, self.seed, self.threads, self.gpu = passes, redraws, seed, threads, gpu
        self.runs: dict[tuple[str, int], StageRun] = {}

    def judge(self, plan: Plan, prevalence: float) -> Judged:
        """Raises ValueError for plans that group behind another stage: who is left there to share a group
        depends on the groups before, which are not kept."""
        for stage in plan.stages[1:]:
            if stage.rounds != (1,):
                raise ValueError(
                    f"plan {plan.name!r}: stage {stage.name!r} has rounds {stage.rounds}; behind the first stage "
                    "only single images can be judged"
                )
        first = self.run(plan, plan.stages[0])
        negative_A, positive_A = first.negative_weights(prevalence), first.positive_weights()
        negative_A, positive_A = negative_A * first.negative_passed_A, positive_A * first.positive_passed_A
        effort = first.effort(prevalence)
        for stage in plan.stages[1:]:
            single = self.run(plan, stage)
            effort = effort.plus(single.clean, (1 - prevalence) * float(negative_A.sum()))
            effort = effort.plus(single.hosted, prevalence * float(positive_A.sum()))
            passed = single.passed()
            negative_A = negative_A * [passed[picture] for picture in first.negative_A.tolist()]
            positive_A = positive_A * [passed[picture] for picture in first.positive_A.tolist()]
        recall, false_positive_rate = float(positive_A.sum()), float(negative_A.sum())
        positives, negatives = len(self.positives), len(self.negatives)
        return Judged(
            recall=recall,
            recall_interval=interval(recall * positives, positives),
            false_positive_rate=false_positive_rate,
            false_positive_rate_interval=interval(false_positive_rate * negatives, negatives),
            effort=effort,
        )

    def run(self, plan: Plan, spec: StageSpec) -> StageRun:
        # The hosted windows hold far more positives than any prevalence would put there: no rule must see a burst.
        spec = spec.model_copy(update={"burst": None})
        # Neither its name nor what only decides how fast it is makes it another stage.
        content = spec.model_dump_json(exclude={"name", "actors", "num_cpus", "windows_per_call"})
        key = (content, plan.window.images)
        if key not in self.runs:
            place = {"num_cpus": self.threads, "num_gpus": float(self.gpu)}
            stage = GroupStage(spec.model_copy(update=place), plan.categories, final=False)
            self.runs[key] = self._run(stage, plan.window.images)
        return self.runs[key]

    def _run(self, stage: GroupStage, images: int) -> StageRun:
        size, groupings = stage.spec.rounds[0], stage.spec.groupings
        # Whole groups only: the holes of a run's last group are not the plan's.
        width = min(images, len(self.negatives)) // size * size
        if not width:
            raise ValueError(f"{len(self.negatives)} negatives do not fill a group of {size}: judge on more pictures")
        rng = np.random.default_rng(self.seed)
        scan = _Scan(stage, self.pixels_NSS3, width)
        scan.run(self.negatives[:width])  # the first call pays for what later ones find ready
        if size == 1:
            clean, hosted = scan.run(self.negatives), scan.run(self.positives)
        else:
            orders = [rng.permutation(self.negatives) for _ in range(self.passes)]
            clean = scan.run(np.concatenate([order[: len(order) // width * width] for order in orders]))
            hosts = max(1, width // size // groupings)
            hosted = scan.run(np.concatenate(list(self._host(scan.groups_WJ, hosts, rng))))
        positive_A = np.isin(hosted.picture_A, self.positives)
        holds = np.zeros(hosted.groups_AJ.max() + 1, dtype=bool)
        holds[hosted.groups_AJ[positive_A]] = True
        companions_A = holds[hosted.groups_AJ].sum(axis=1)
        return StageRun(
            size=size,
            groupings=groupings,
            negative_A=np.concatenate([clean.picture_A, hosted.picture_A[~positive_A]]),
            companions_A=np.concatenate([np.zeros(len(clean.picture_A), int), companions_A[~positive_A]]),
            negative_passed_A=np.concatenate([clean.passed_A, hosted.passed_A[~positive_A]]),
            positive_A=hosted.picture_A[positive_A],
            positive_passed_A=hosted.passed_A[positive_A],
            clean=clean.effort,
            hosted=hosted.effort,
        )

    def _host(self, groups_WJ: np.ndarray, hosts: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Windows (W,) of negatives and ``hosts`` positives, no two in one group, until each was hosted often
        enough. With several groupings half of the groups stay clean: of a negative's groups none, some or all
        hold a positive then."""
        wanted = self.redraws * len(self.positives)
        # The last window is filled up with more draws of some.
        spare = math.ceil(hosts / len(self.positives))
        queue = np.concatenate([rng.permutation(self.positives) for _ in range(self.redraws + spare)])
        taken = 0
        while taken < wanted:
            window_W = rng.choice(self.negatives, len(groups_WJ), replace=len(self.negatives) < len(groups_WJ))
            places = _places(groups_WJ, hosts, rng)
            window_W[places] = queue[taken : taken + len(places)]
            taken += len(places)
            yield window_W


def _places(groups_WJ: np.ndarray, hosts: int, rng: np.random.Generator) -> list[int]:
    """At most ``hosts`` positions of a window, drawn at random, no two of them in one group."""
    places: list[int] = []
    used: set[int] = set()
    for place in rng.permutation(len(groups_WJ)).tolist():
        mine = set(groups_WJ[place].tolist())
        if len(places) < hosts and not mine & used:
            places.append(place)
            used |= mine
    return places


@dataclass(frozen=True, kw_only=True)
class _Scanned:
    """``groups_AJ``: numbers of the first round's groups each appearance sat in."""

    picture_A: np.ndarray
    passed_A: np.ndarray
    groups_AJ: np.ndarray
    effort: Effort


class _Scan:
    """Runs a stage over pictures in a given order, in windows of ``width``, as many a call as its plan says."""

    def __init__(self, stage: GroupStage, pixels_NSS3: np.ndarray, width: int) -> None:
        self.stage, self.pixels_NSS3, self.width = stage, pixels_NSS3, width
        window = self._window(0, np.zeros(width, dtype=int))
        groups = [form_groups(window, stage.spec, across=across) for across in (False, True)[: stage.spec.groupings]]
        self.groups_WJ = np.empty((width, len(groups)), dtype=int)
        """Which groups of a window each of its positions sits in."""
        for grouping, formed in enumerate(groups):
            for number, group in enumerate(formed):
                self.groups_WJ[[place for place in group.members if place is not None], grouping] = (
                    grouping * len(formed) + number
                )

    def run(self, picture_A: np.ndarray) -> _Scanned:
        """Raises ValueError when a score is not finite."""
        passed = []
        total = np.zeros(len(Effort._fields))
        windows = [picture_A[start : start + self.width] for start in range(0, len(picture_A), self.width)]
        per_call = self.stage.spec.windows_per_call
        for first in range(0, len(windows), per_call):
            called = [
                self._window(first + number, part) for number, part in enumerate(windows[first : first + per_call])
            ]
            for window in self.stage(called):
                total += [sum(getattr(work, name) for work in window.work) for name in Effort._fields]
                for image in window.images:
                    if image.outcome == "error":
                        raise ValueError(f"model {self.stage.spec.model!r}: {image.error_detail}")
                    passed.append(image.outcome is None)
        # Groups of one window are numbered apart from those of the next.
        place_A = np.arange(len(picture_A))
        offsets = place_A // self.width * self.groups_WJ.size
        return _Scanned(
            picture_A=picture_A,
            passed_A=np.array(passed, dtype=bool),
            groups_AJ=self.groups_WJ[place_A % self.width] + offsets[:, None],
            effort=Effort(*(total / len(picture_A)).tolist()),
        )

    def _window(self, number: int, pictures_W: np.ndarray) -> Window:
        images = [Image(image_id=str(picture), uri=str(picture)) for picture in pictures_W.tolist()]
        return Window(
            shard=0,
            window=number,
            first_ordinal=number * self.width,
            images=images,
            pixels=self.pixels_NSS3[pictures_W],
        )
