"""What a route would cost and let through at given thresholds, on the scores of one half of the pictures.

Shapes: A places where an image stands among companions, S steps, K categories, D draws (a positive with the companions
of one block), N pictures, B blocks of L places, U groups of M, Q quantiles of the prevalence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.planning.calibration import Prevalence
from pipeline.planning.padding import holes, padding
from pipeline.planning.routes import Route
from pipeline.planning.scores import Cost, Scores, to_logits

FPR_PRICE = 3.0
"""By how many times the cost rises when the false-positive rate is twice what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Expected at a prevalence. ``reached_S``: share of all images that each step tests; the last entry of
    ``flagged_S`` is the share of negatives that is flagged."""

    cost: float
    false_positive_rate: float
    reached_S: np.ndarray
    costs_S: np.ndarray
    """By step, adding up to ``cost``: of an image of all, holes in groups and, in seconds, padded batches included."""


def priced(cost: float, rate: float, max_fpr: float) -> float:
    """A cost with a price on false positives beyond what is allowed, so that giving up positives can buy them off."""
    return cost * (1 + FPR_PRICE * max(0.0, rate / max_fpr - 1))


@dataclass(frozen=True, kw_only=True)
class Occurrence:
    """How often images stand in a group with a violating one, at some prevalence."""

    entered: float
    """Share of all images that the screen lets through."""
    hosted: float
    """Of these: in a group with a positive."""
    beside: float
    """Of these, the negatives: in a group with a positive."""
    count: float
    """Positives in such a group. A calibrated group holds one at most; in a burst it would hold several, each with its
    retests."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """The positives of one category: ``logits_DS`` of that category in every test they would meet, minus infinity
    where the screen has cleared them."""

    logits_DS: np.ndarray
    weight_D: np.ndarray
    """Adding up to 1: each unique positive weighs the same, however often it was drawn."""
    cluster_D: np.ndarray
    """Draws of one number are of one picture."""

    @cached_property
    def first_P(self) -> np.ndarray:
        """Of each unique positive the first draw, chosen before anything was looked at: what certifies."""
        return np.unique(self.cluster_D, return_index=True)[1]

    @property
    def lost(self) -> float:
        """Share of the positives that the screen has cleared, with one more in doubt (Laplace)."""
        lost_D = np.isneginf(self.logits_DS).any(axis=1)
        if not lost_D.any() and len(self.logits_DS):
            return 0.0
        count = len(self.first_P)
        return (float(self.weight_D[lost_D].sum()) * count + 1) / (count + 2)

    def part(self, chosen_D: np.ndarray) -> Draws:
        return _draws(self.logits_DS[chosen_D], self.cluster_D[chosen_D])

    def passed_D(self, thresholds_S: np.ndarray) -> np.ndarray:
        return np.all(self.logits_DS >= thresholds_S, axis=1)

    def recall(self, thresholds_S: np.ndarray) -> float:
        return float(self.weight_D[self.passed_D(thresholds_S)].sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Places of one kind: logits of the test that each was in, and what each place stands for."""

    logits_ASK: np.ndarray
    weight_A: np.ndarray
    """Adding up to 1."""
    negative_A: np.ndarray

    def alive_SA(self, thresholds_SK: np.ndarray) -> np.ndarray:
        """Whether each place is tested in each step; the last row, whether it is flagged."""
        steps = thresholds_SK.shape[0]
        alive_SA = np.ones((steps + 1, len(self.logits_ASK)), dtype=bool)
        for step in range(steps):
            positive_A = self.logits_ASK[:, step, 0] >= thresholds_SK[step, 0]
            for category in range(1, thresholds_SK.shape[1]):
                positive_A |= self.logits_ASK[:, step, category] >= thresholds_SK[step, category]
            alive_SA[step + 1] = alive_SA[step] & positive_A
        return alive_SA


class Field:
    """One half's places for one route, weighted as they would occur at a prevalence."""

    def __init__(self, scores: Scores, route: Route, half: str, prevalence: Prevalence, cost: Cost = "gmac") -> None:
        self.scores, self.route, self.prevalence, self.unit = scores, route, prevalence, cost
        self.nets_S = route.nets_S(cost)
        self.decoding_S = route.costs_S(scores, cost) - self.nets_S
        self.mine_N = scores.half(half)
        self.positive_N: np.ndarray = np.any(scores.labels_NK, axis=1)
        image_BL, logits_BLSK = self._blocks()
        self.clean, self.hosted = self._kinds(image_BL, logits_BLSK)
        self.draws = [self._draws_of(k, image_BL, logits_BLSK[..., k]) for k in range(len(scores.categories))]
        self.passing_positives, self.passing_negatives = self._passing()
        self.occurrence = self._occurrence(prevalence.nodes())
        self.free_S = np.ones(len(route.steps), dtype=bool)
        if route.screened:
            self.free_S[0] = False

    def _blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Blocks (B, L) of this half, an image each where nothing is grouped, and their logits (B, L, S, K)."""
        arrangement = self.route.arrangement
        image_BL = np.arange(len(self.mine_N))[:, None] if arrangement is None else arrangement.image_BL
        mine_B = self.mine_N[image_BL[:, 0]]
        image_BL = image_BL[mine_B]
        columns = []
        for step in self.route.steps:
            if step.size == 1:
                columns.append(to_logits(self.scores.single[step.name])[image_BL])
            else:
                assert arrangement is not None, f"{step.name} has no groups to look up"
                columns.append(np.repeat(to_logits(arrangement.scores[step.name][mine_B]), step.size, axis=1))
        return image_BL, np.stack(columns, axis=2)

    def _kinds(self, image_BL: np.ndarray, logits_BLSK: np.ndarray) -> tuple[Places, Places]:
        """Places of blocks without a positive, and of groups, of the route's largest size, with one."""
        size = self.route.size
        positive_BL = self.positive_N[image_BL]
        clean_ASK = logits_BLSK[~positive_BL.any(axis=1)].reshape(-1, *logits_BLSK.shape[2:])
        positive_UM = positive_BL.reshape(-1, size)
        hosted_U = positive_UM.any(axis=1)
        hosted_ASK = logits_BLSK.reshape(-1, size, *logits_BLSK.shape[2:])[hosted_U].reshape(-1, *clean_ASK.shape[1:])
        weight_U = self._mix(image_BL.reshape(-1, size)[hosted_U])
        return (
            _places(clean_ASK, np.ones(len(clean_ASK)), negative=True),
            _places(hosted_ASK, np.repeat(weight_U, size), negative=~positive_UM[hosted_U].ravel()),
        )

    def _draws_of(self, category: int, image_BL: np.ndarray, logits_BLS: np.ndarray) -> Draws:
        labels_N = self.scores.labels_NK[:, category]
        own_BL = labels_N[image_BL]
        logits_DS, image_D = logits_BLS[own_BL], image_BL[own_BL]
        screen_K = self.route.screen_logits_K
        if screen_K is not None:
            # Another category may have carried it through the screen: a category answers for itself.
            logits_DS[logits_DS[:, 0] < screen_K[category]] = -np.inf
        # Whom the screen has cleared stands in no block: one draw that passes nothing.
        lost = np.setdiff1d(np.flatnonzero(labels_N & self.mine_N), image_D)
        image_D = np.concatenate([image_D, lost])
        logits_DS = np.concatenate([logits_DS, np.full((len(lost), logits_DS.shape[1]), -np.inf)])
        # By picture: which of a cluster's pictures stands first must not depend on whom the screen has cleared.
        order_D = np.argsort(image_D, kind="stable")
        return _draws(logits_DS[order_D], self.scores.cluster_N[image_D[order_D]])

    def _passing(self) -> tuple[float, float]:
        """Which share of the positives, and of the negatives, the screen lets through."""
        screen_K = self.route.screen_logits_K
        if screen_K is None:
            return 1.0, 1.0
        passed_N = np.any(to_logits(self.scores.single[self.route.steps[0].name]) >= screen_K, axis=1)
        mine_N = self.positive_N & self.mine_N
        weight = self._mix(np.flatnonzero(mine_N))
        return float(weight @ passed_N[mine_N] / weight.sum()), float(passed_N[~self.positive_N & self.mine_N].mean())

    def _occurrence(self, shares_Q: np.ndarray) -> Occurrence:
        """When violating images are these shares of all, each as likely."""
        size = self.route.size
        entered_Q = shares_Q * self.passing_positives + (1 - shares_Q) * self.passing_negatives
        among_Q = np.minimum(shares_Q * self.passing_positives / entered_Q, 1 - 1e-12)
        # log1p: rare images must not vanish in rounding.
        hosted_Q = -np.expm1(size * np.log1p(-among_Q))
        beside_Q = -np.expm1((size - 1) * np.log1p(-among_Q))
        entered = float(entered_Q.mean())
        hosted = float((entered_Q * hosted_Q).mean())
        return Occurrence(
            entered=entered,
            hosted=hosted / entered,
            beside=float((entered_Q * beside_Q).mean()) / entered,
            # A share of 0, as a quantile of a rare one may be, hosts nothing.
            count=float(size * (entered_Q * among_Q).mean()) / hosted if hosted else 1.0,
        )

    def _mix(self, images: np.ndarray) -> np.ndarray:
        """Weights of positives, or of the groups (U, M) that hold them: categories occur as their prevalences say."""
        labels_K = self.scores.labels_NK[images].reshape(len(images), -1, len(self.scores.categories)).sum(axis=1)
        per_category_K = self.prevalence.shares_K / np.maximum(labels_K.sum(axis=0), 1)
        return labels_K @ per_category_K

    def spend(self, thresholds_SK: np.ndarray) -> Spent:
        """What these thresholds cost and let through."""
        return self._spent(thresholds_SK, [self.occurrence])[0]

    def spend_at(self, thresholds_SK: np.ndarray, totals: Sequence[float] | np.ndarray) -> list[Spent]:
        """The same when violating images, of all categories together, are these shares of all for certain."""
        return self._spent(thresholds_SK, [self._occurrence(np.array([total])) for total in totals])

    def _spent(self, thresholds_SK: np.ndarray, occurrences: Sequence[Occurrence]) -> list[Spent]:
        clean_S, clean_flagged = _pass(self.clean, thresholds_SK)
        hosted_S, hosted_flagged = _pass(self.hosted, thresholds_SK)
        found = []
        for at in occurrences:
            several_S = np.append(hosted_S[0], np.minimum(at.count * hosted_S[1:], 1.0))
            reached_S = at.entered * ((1 - at.hosted) * clean_S + at.hosted * several_S)[:-1]
            if self.route.screened:
                reached_S[0] = 1.0
            rate = self.passing_negatives * ((1 - at.beside) * clean_flagged + at.beside * hosted_flagged)
            costs_S = self._charged(reached_S, at.entered) * self.nets_S + reached_S * self.decoding_S
            found.append(
                Spent(cost=float(costs_S.sum()), false_positive_rate=rate, reached_S=reached_S, costs_S=costs_S)
            )
        return found

    def _charged(self, reached_S: np.ndarray, entered: float) -> np.ndarray:
        """What is computed of all images in each step: more than those that reach it."""
        window, charged_S = self.route.window_images, reached_S.copy()
        at_head = 1.0
        for number, step in enumerate(self.route.steps):
            if not self.route.begins_kept(number):
                at_head = float(reached_S[number])
            if self.route.screened and step.size > 1:
                charged_S[number] *= holes(entered, step.size, window)
            if self.unit == "seconds":
                charged_S[number] *= padding(float(reached_S[number]), step.size, window, at_head)
        return charged_S

    def recalls(self, thresholds_SK: np.ndarray) -> list[float]:
        """By category, over all draws."""
        return [draws.recall(thresholds_SK[:, k]) for k, draws in enumerate(self.draws)]


def _pass(places: Places, thresholds_SK: np.ndarray) -> tuple[np.ndarray, float]:
    """Shares (S + 1,) of the places that are tested in each step, then flagged; and of the negatives, flagged."""
    alive_SA = places.alive_SA(thresholds_SK)
    negative_A = places.weight_A * places.negative_A
    flagged = float(negative_A @ alive_SA[-1] / negative_A.sum()) if negative_A.any() else 0.0
    return alive_SA @ places.weight_A, flagged


def _places(logits_ASK: np.ndarray, weight_A: np.ndarray, negative: bool | np.ndarray) -> Places:
    # Peeling walks over these arrays a thousand times, step by step.
    logits_ASK = np.asfortranarray(logits_ASK.astype(np.float32))
    flags = np.broadcast_to(np.asarray(negative), weight_A.shape)
    return Places(logits_ASK=logits_ASK, weight_A=weight_A / weight_A.sum(), negative_A=flags)


def _draws(logits_DS: np.ndarray, cluster_D: np.ndarray) -> Draws:
    _, rows, times = np.unique(cluster_D, return_inverse=True, return_counts=True)
    return Draws(logits_DS=logits_DS, weight_D=1 / times[rows] / len(times), cluster_D=cluster_D)
