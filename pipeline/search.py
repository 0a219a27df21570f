"""Which tests in which order, against which thresholds: the cheapest sequence found on the search half.

A sequence is any number of nets that test images alone, or such a screen (or nothing), then groups that nest, then
images alone again. Its thresholds are found by peeling: they begin as high as they can be without losing a positive,
and then, a few positives at a time, the step gives some up whose threshold saves the most by it.

Shapes: A places where an image stands among companions, S steps, K categories, D draws (a positive with the companions
of one block).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

import numpy as np

from pipeline.calibration import Prevalence
from pipeline.layout import SCREENED_WINDOW_IMAGES, WINDOW_IMAGES
from pipeline.padding import holes, padding
from pipeline.scores import Arrangement, Candidate, Cost, Scores, to_logits

MAX_GROUP_STEPS = 3
MAX_SINGLE_STEPS = 3
QUANTA = 12
"""In how many portions peeling gives up the positives it may."""
SLACKS = (4.0, 3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.25)
"""By how many standard deviations a threshold is tried lower where that is nearly free."""
SLACK_COST = 0.01
"""Share of the cost that all such slack together may take."""
SLACK_FPR = 0.1
"""Share of the allowed false-positive rate that it may use up."""
FPR_PRICE = 3.0
"""By how many times the cost rises when the false-positive rate is twice what is allowed."""
FOLDS = 5
"""Of the cross-fitting that foretells what a route will cost."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """A sequence of tests. ``arrangement``: the blocks its groups are looked up in; none when it tests no groups."""

    steps: tuple[Candidate, ...]
    arrangement: Arrangement | None = None

    @property
    def name(self) -> str:
        return " > ".join(step.name for step in self.steps)

    @property
    def screen_logits_K(self) -> np.ndarray | None:
        """Thresholds of the first step when the arrangement was drawn behind it: these are given, and stay."""
        if self.arrangement is None or self.arrangement.screen is None:
            return None
        return self.arrangement.screen_logits_K

    @property
    def screened(self) -> bool:
        return self.screen_logits_K is not None

    @property
    def size(self) -> int:
        return max(step.size for step in self.steps)

    @property
    def window_images(self) -> int:
        """Of the windows that a plan of this route gets: whole groups of every size."""
        images = SCREENED_WINDOW_IMAGES if self.screened else WINDOW_IMAGES
        length = math.lcm(*(step.size for step in self.steps))
        return max(1, images // length) * length

    def begins_kept(self, number: int) -> bool:
        """Whether a step starts from features: only those of a larger test of the same net, just before it."""
        if number == 0 or self.steps[number].gmac_kept is None:
            return False
        before, step = self.steps[number - 1 : number + 1]
        return before.net == step.net and before.size > step.size

    def decodes(self, number: int) -> bool:
        """Whether a step wants pixels of another size than are there."""
        return number == 0 or self.steps[number].input_size != self.steps[number - 1].input_size

    def nets_S(self, unit: Cost) -> np.ndarray:
        """What the nets cost of one image in each step."""
        return np.array(
            [step.cost(unit, kept=self.begins_kept(number)) / step.size for number, step in enumerate(self.steps)]
        )

    def costs_S(self, scores: Scores, unit: Cost) -> np.ndarray:
        """The same; seconds with those of decoding."""
        costs_S = self.nets_S(unit)
        if unit == "seconds":
            for number, step in enumerate(self.steps):
                costs_S[number] += scores.decode_seconds.get(step.input_size, 0.0) * self.decodes(number)
        return costs_S


def routes(scores: Scores, cost: Cost) -> Iterator[Route]:
    """Every sequence of the candidates: ever smaller nested groups, and images alone in nets of rising cost."""

    single = sorted((c for c in scores.candidates.values() if c.size == 1), key=lambda candidate: candidate.cost(cost))
    chains = [chain for length in range(1, MAX_SINGLE_STEPS + 1) for chain in combinations(single, length)]
    for chain in chains:
        yield Route(steps=chain)
    for arrangement in scores.arrangements:
        groups = [scores.candidates[name] for name in arrangement.scores]
        screen = () if arrangement.screen is None else (scores.candidates[arrangement.screen],)
        for nested in _nested(groups):
            for chain in chains:
                if len(chain) < MAX_SINGLE_STEPS and not set(screen) & set(chain):
                    yield Route(steps=(*screen, *nested, *chain), arrangement=arrangement)


def _nested(groups: Sequence[Candidate]) -> Iterator[tuple[Candidate, ...]]:
    ordered = sorted(groups, key=lambda candidate: -candidate.size)
    for length in range(1, MAX_GROUP_STEPS + 1):
        for chain in combinations(ordered, length):
            if all(a.size > b.size and a.size % b.size == 0 for a, b in pairwise(chain)):
                yield chain


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """Thresholds found on the search half, and how far a step of the path moves each of them (logits)."""

    thresholds_SK: np.ndarray
    scale_SK: np.ndarray

    def at(self, offset: float) -> np.ndarray:
        """All thresholds lowered together: the larger ``offset``, the more passes. Those of a screen stay."""
        return self.thresholds_SK - offset * self.scale_SK

    def offsets(self, draws: Draws, category: int) -> np.ndarray:
        """(D,): from which offset on each draw passes the whole cascade; infinity where the screen has cleared it."""
        free_S = self.scale_SK[:, category] > 0
        short_DS = self.thresholds_SK[free_S, category] - draws.logits_DS[:, free_S]
        offset_D = (short_DS / self.scale_SK[free_S, category]).max(axis=1)
        lost_D = (draws.logits_DS[:, ~free_S] < self.thresholds_SK[~free_S, category]).any(axis=1)
        return np.where(lost_D, np.inf, offset_D)


def spread_evenly(field: Field, recall_K: Sequence[float]) -> np.ndarray:
    """Thresholds (S, K) that lose as many positives in every step: no good ones, but found at once."""
    columns = []
    for draws, recall in zip(field.draws, recall_K, strict=True):
        share = (1 - recall) / field.free_S.sum()
        logits_DS = np.where(np.isneginf(draws.logits_DS), np.nan, draws.logits_DS)
        columns.append(np.nanquantile(logits_DS, share, axis=0, method="lower"))
    thresholds_SK = np.stack(columns, axis=1)
    if field.route.screen_logits_K is not None:
        thresholds_SK[0] = field.route.screen_logits_K
    return thresholds_SK


def peel(field: Field, recall_K: Sequence[float], max_fpr: float) -> Shape | None:
    """Thresholds that keep ``recall_K`` of the search half's positives; None when the screen has lost too many."""
    return _Peeling(field, field.draws, recall_K, max_fpr).run()


def cross_fitted(field: Field, recall_K: Sequence[float], max_fpr: float) -> list[np.ndarray] | None:
    """Per category the offset (D,) that each draw needs when the shape was found without its picture.

    They say what a path will have to give up on positives it has not seen, which the shape's own positives cannot.
    """
    offsets = [np.empty(len(draws.cluster_D)) for draws in field.draws]
    folds = [np.unique(draws.cluster_D, return_inverse=True)[1] % FOLDS for draws in field.draws]
    for fold in range(FOLDS):
        rest = [draws.part(mine != fold) for draws, mine in zip(field.draws, folds, strict=True)]
        shape = _Peeling(field, rest, recall_K, max_fpr).run()
        if shape is None:
            return None
        for category, (draws, mine) in enumerate(zip(field.draws, folds, strict=True)):
            offsets[category][mine == fold] = shape.offsets(draws.part(mine == fold), category)
    return offsets


class _Peeling:
    def __init__(self, field: Field, draws: Sequence[Draws], recall_K: Sequence[float], max_fpr: float) -> None:
        self.field, self.draws, self.max_fpr = field, draws, max_fpr
        self.kept: list[np.ndarray] = [np.isfinite(mine.logits_DS).all(axis=1) for mine in draws]
        self.left_K = [
            1 - recall - mine.weight_D[~kept].sum()
            for recall, mine, kept in zip(recall_K, draws, self.kept, strict=True)
        ]
        self.quantum_K = [left / QUANTA for left in self.left_K]

    def run(self) -> Shape | None:
        if min(self.left_K) < -1e-9 or not all(kept.any() for kept in self.kept):
            return None
        lowest_SK = self._tight(self.kept)
        objective = self._objective(lowest_SK)
        while True:
            best = None
            for category, kept, lost in self._moves():
                trial_SK = lowest_SK.copy()
                trial_SK[:, category] = self._tight_of(category, kept)
                gain = (objective - self._objective(trial_SK)) / lost
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, category, kept, lost, trial_SK)
            if best is None:
                break
            _, category, self.kept[category], lost, lowest_SK = best
            self.left_K[category] -= lost
            objective = self._objective(lowest_SK)
        scale_SK = self._scale()
        return Shape(thresholds_SK=self._slackened(lowest_SK, scale_SK), scale_SK=scale_SK)

    def _slackened(self, thresholds_SK: np.ndarray, scale_SK: np.ndarray) -> np.ndarray:
        """Lower where that costs nearly nothing, the last steps first.

        All thresholds of a path come down together: a positive that one test hardly sees would take the others with
        it, although that test, near the end, decides over a few images only.
        """
        before = self.field.spend(thresholds_SK)
        for step in reversed(np.flatnonzero(self.field.free_S)):
            for slack in SLACKS:
                trial_SK = thresholds_SK.copy()
                trial_SK[step] -= slack * scale_SK[step]
                spent = self.field.spend(trial_SK)
                rate = max(before.false_positive_rate, SLACK_FPR * self.max_fpr)
                if spent.cost <= (1 + SLACK_COST) * before.cost and spent.false_positive_rate <= rate:
                    thresholds_SK = trial_SK
                    break
        return thresholds_SK

    def _moves(self) -> Iterator[tuple[int, np.ndarray, float]]:
        """Giving up the lowest draws of one step: (category, draws kept then, weight lost)."""
        for category, draws in enumerate(self.draws):
            rows = np.flatnonzero(self.kept[category])
            for step in np.flatnonzero(self.field.free_S):
                order = rows[np.argsort(draws.logits_DS[rows, step], kind="stable")]
                lost_D = np.cumsum(draws.weight_D[order])
                count = max(1, int(np.searchsorted(lost_D, self.quantum_K[category] + 1e-9)))
                if count >= len(order) or lost_D[count - 1] > self.left_K[category] + 1e-9:
                    continue
                kept = self.kept[category].copy()
                kept[order[:count]] = False
                yield category, kept, float(lost_D[count - 1])

    def _tight(self, kept: list[np.ndarray]) -> np.ndarray:
        return np.stack([self._tight_of(k, mask) for k, mask in enumerate(kept)], axis=1)

    def _tight_of(self, category: int, kept: np.ndarray) -> np.ndarray:
        """The highest thresholds that lose none of these; a screen's are given."""
        thresholds_S = self.draws[category].logits_DS[kept].min(axis=0)
        screen_K = self.field.route.screen_logits_K
        if screen_K is not None:
            thresholds_S[0] = screen_K[category]
        return thresholds_S

    def _scale(self) -> np.ndarray:
        """How widely the positives' logits are spread: what one step of the path means at each test."""
        scale_SK = np.stack(
            [np.std(draws.logits_DS[np.isfinite(draws.logits_DS).all(axis=1)], axis=0) for draws in self.draws],
            axis=1,
        )
        return np.where(self.field.free_S[:, None], np.maximum(scale_SK, 0.1), 0.0)

    def _objective(self, thresholds_SK: np.ndarray) -> float:
        spent = self.field.spend(thresholds_SK)
        return priced(spent.cost, spent.false_positive_rate, self.max_fpr)
