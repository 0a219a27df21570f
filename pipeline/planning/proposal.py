"""From scores and a request to a plan: search on one half, certify on the other, and say what both found.

1. On the search half every route is given thresholds; the best are peeled, and cross-fitting foretells how far a path
   will have to be lowered on positives it has not seen.
2. The few cheapest at that offset are the finalists. Their number depends on how many positives there are, and not on
   what they scored; each is certified on the other half at its share of the error (Bonferroni).
3. The cheapest certified finalist that keeps the false-positive rate is the plan. Its cost, rates and bounds are those
   of the certifying half, which set nothing but the one offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from pipeline.errors import UsageError
from pipeline.planning.calibration import Prevalence, certified_offset, misses_allowed, positives_needed, recall_bound
from pipeline.planning.field import Field, Spent, priced
from pipeline.planning.peeling import Shape, cross_fitted, peel, spread_evenly
from pipeline.planning.routes import Route, routes
from pipeline.planning.scores import Cost, Scores

PEELED = 40
"""Routes that are worth peeling, of those that even thresholds rank; and as many of each kind as are shown."""
RUNNERS_UP = 8
FINALISTS = 3
FORETOLD = 5
"""Routes whose cross-fitted offsets are asked."""
FPR_RESERVE = 0.5
"""Share of the allowed false-positive rate that the search makes use of: certifying will lower thresholds."""
WORSE = 0.5
"""By how much more the thresholds of a finalist may have to come down, for it to keep the false-positive rate still."""
MUCH_WORSE = 1.0
"""The same of the one finalist that is to be there when the others fail."""
LIKELY = 0.9
"""A screen's thresholds are given, so no offset brings back whom it has cleared: how likely it must be that the
certifying half can bear that."""


@dataclass(frozen=True, kw_only=True)
class Request:
    recall_K: tuple[float, ...]
    confidence: float
    prevalence: Prevalence
    max_fpr: float
    cost: Cost = "gmac"

    def __post_init__(self) -> None:
        for recall in self.recall_K:
            if not 0 < recall < 1:
                raise UsageError(f"recall is {recall:g}, but only a share above 0 and below 1 can be certified")
        if not 0.5 <= self.confidence < 1:
            raise UsageError(f"confidence is {self.confidence:g}: give one of at least 0.5 and below 1")
        if not 0 < self.max_fpr <= 1:
            raise UsageError(f"max fpr is {self.max_fpr:g}, but it is a share above 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """A route with the thresholds that the search half gives it.

    ``feared_rate``: false positives if thresholds have to come down by ``MUCH_WORSE`` more than is foretold. Infinite
    behind a screen: whether the certifying half bears those whom it has cleared is not known before.
    """

    route: Route
    shape: Shape
    feared_rate: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """A route with its thresholds, and what the certifying half says of it."""

    route: Route
    shape: Shape
    offset: float
    spent: Spent
    recall_K: tuple[float, ...]
    """Over all draws: an estimate, of positives that have set the offset."""

    @property
    def thresholds_SK(self) -> np.ndarray:
        return self.shape.at(self.offset)

    @property
    def kind(self) -> str:
        if self.route.size > 1:
            return "groups"
        return "cascade" if len(self.route.steps) > 1 else "individual"


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    request: Request
    chosen: Judged
    bound_K: tuple[float, ...]
    """What recall is certified: at least what was asked for."""
    positives_K: tuple[int, ...]
    """Unique ones of the certifying half."""
    finalists: int
    negatives: int
    runners_up: tuple[Judged, ...]
    individual: Judged
    """The largest net on every image: what costs are relative to."""

    @property
    def relative_cost(self) -> float:
        return self.chosen.spent.cost / self.individual.spent.cost


def propose(scores: Scores, request: Request) -> Proposal:
    """Raises UsageError when the labels cannot certify what is asked, or no route keeps the false-positive rate."""
    positives_K = tuple(scores.unique_positives("certify"))
    negatives = int((~scores.labels_NK.any(axis=1) & scores.half("certify")).sum())
    if negatives * request.max_fpr < 1:
        raise UsageError(
            f"a false-positive rate of at most {request.max_fpr:g} is not seen in {negatives} negatives of the "
            f"certifying half: label at least {math.ceil(1 / request.max_fpr):,} pictures there that show no category, "
            "as a random sample, or allow more with --max-fpr"
        )
    finalists = _finalists(positives_K, request)
    _check_certifiable(scores, positives_K, request)
    confidence = 1 - (1 - request.confidence) / finalists
    misses_K = [
        misses_allowed(count, recall, confidence) for count, recall in zip(positives_K, request.recall_K, strict=True)
    ]
    ranked = _with_a_safe_one(search(scores, request, misses_K, positives_K), finalists, request.max_fpr)
    certified = _judge(scores, request, ranked[:finalists], confidence)
    others = _judge(scores, request, ranked[finalists:], request.confidence)
    allowed = [found for found in certified if found.spent.false_positive_rate <= request.max_fpr]
    if not allowed:
        raise UsageError(_no_route(certified, request))
    chosen = min(allowed, key=lambda found: found.spent.cost)
    return Proposal(
        request=request,
        chosen=chosen,
        bound_K=tuple(
            recall_bound(count, misses, confidence) for count, misses in zip(positives_K, misses_K, strict=True)
        ),
        positives_K=positives_K,
        finalists=finalists,
        negatives=negatives,
        runners_up=tuple(found for found in certified + others if found is not chosen),
        individual=_individual(scores, request),
    )


def _finalists(positives_K: Sequence[int], request: Request) -> int:
    """Several, where their correction costs no more than a miss or two."""
    strict = 1 - (1 - request.confidence) / FINALISTS
    enough = all(
        count >= positives_needed(recall, strict, misses=2)
        for count, recall in zip(positives_K, request.recall_K, strict=True)
    )
    return FINALISTS if enough else 1


def _check_certifiable(scores: Scores, positives_K: Sequence[int], request: Request) -> None:
    for category, count, recall in zip(scores.categories, positives_K, request.recall_K, strict=True):
        needed = positives_needed(recall, request.confidence)
        if count < needed:
            both = count + scores.unique_positives("search")[scores.categories.index(category)]
            raise UsageError(
                f"recall {recall:g} of {category} at confidence {request.confidence:g} needs {needed} unique positives "
                f"in the certifying half, none of them missed, but there are {count}: label about "
                f"{int(np.ceil((needed - count) * both / count))} more (every miss takes about "
                f"{positives_needed(recall, request.confidence, 1) - needed} further ones), or ask for a recall of at "
                f"most {np.floor(1e4 * recall_bound(count, 0, request.confidence)) / 1e4:g}, which these can certify"
            )


def _with_a_safe_one(ranked: list[Ranked], finalists: int, max_fpr: float) -> list[Ranked]:
    """The cheap ones may all let too many false positives through where they are certified: one finalist hardly can."""
    safe = next((found for found in ranked if found.feared_rate <= max_fpr), None)
    safe = safe or min(ranked, key=lambda found: found.feared_rate)
    if safe in ranked[:finalists]:
        return ranked
    rest = [found for found in ranked if found is not safe]
    return [*rest[: finalists - 1], safe, *rest[finalists - 1 :]]


def search(scores: Scores, request: Request, misses_K: Sequence[int], positives_K: Sequence[int]) -> list[Ranked]:
    """Routes with the shapes of their thresholds, the cheapest on unseen positives first: what the search half says.

    ``misses_K``: of ``positives_K`` in the certifying half, how many may be missed.
    """
    aim_K = [1 - misses / count for misses, count in zip(misses_K, positives_K, strict=True)]
    max_fpr = FPR_RESERVE * request.max_fpr

    def price(field: Field, thresholds_SK: np.ndarray) -> float:
        spent = field.spend(thresholds_SK)
        return priced(spent.cost, spent.false_positive_rate, max_fpr)

    def bearable(field: Field) -> bool:
        return all(
            binom.cdf(misses, count, draws.lost) >= LIKELY
            for draws, misses, count in zip(field.draws, misses_K, positives_K, strict=True)
        )

    def field(route: Route) -> Field:
        return Field(scores, route, "search", request.prevalence, request.cost)

    def quick_price(route: Route) -> float:
        # Not kept: there may be a thousand routes, and each looks at every place.
        mine = field(route)
        return price(mine, spread_evenly(mine, aim_K)) if bearable(mine) else np.inf

    quick = sorted(routes(scores, request.cost), key=quick_price)
    # Of each kind some: the reader wants to see what the others would have cost.
    worthy = quick[:PEELED]
    for grouped in (False, True):
        worthy += [route for route in quick if (route.size > 1) == grouped and route not in worthy][:RUNNERS_UP]
    peeled = [
        (mine, shape)
        for mine in map(field, worthy)
        if bearable(mine) and (shape := peel(mine, aim_K, max_fpr)) is not None
    ]
    if not peeled:
        raise UsageError(
            "no sequence of the candidates keeps the recall on the search half: calibrate with better nets, or with "
            "screens that keep more"
        )
    peeled.sort(key=lambda found: price(found[0], found[1].thresholds_SK))
    margin = _foretold_offset(peeled[:FORETOLD], aim_K, max_fpr)

    def foretold_price(field: Field, shape: Shape) -> float:
        cost = field.spend(shape.at(margin)).cost
        rate = field.spend(shape.at(margin + WORSE)).false_positive_rate
        return priced(cost, rate, request.max_fpr)

    def feared_rate(field: Field, shape: Shape) -> float:
        return np.inf if field.route.screened else field.spend(shape.at(margin + MUCH_WORSE)).false_positive_rate

    peeled.sort(key=lambda found: foretold_price(*found))
    return [Ranked(route=mine.route, shape=shape, feared_rate=feared_rate(mine, shape)) for mine, shape in peeled]


def _foretold_offset(peeled: Sequence[tuple[Field, Shape]], aim_K: Sequence[float], max_fpr: float) -> float:
    """How far a path has to be lowered on positives it was not fitted to: the median over some routes."""
    needed = []
    for field, _ in peeled:
        offsets = cross_fitted(field, aim_K, max_fpr)
        if offsets is not None:
            needed.append(
                max(
                    float(np.quantile(offset_D, aim, method="higher"))
                    for offset_D, aim in zip(offsets, aim_K, strict=True)
                )
            )
    finite = [offset for offset in needed if np.isfinite(offset)]
    return max(0.0, float(np.median(finite))) if finite else 0.0


def _judge(scores: Scores, request: Request, ranked: Sequence[Ranked], confidence: float) -> list[Judged]:
    """On the certifying half; without those that its positives do not certify at any offset."""
    judged = []
    for found in ranked:
        field = Field(scores, found.route, "certify", request.prevalence, request.cost)
        offsets = [found.shape.offsets(draws, k)[draws.first_P] for k, draws in enumerate(field.draws)]
        offset = certified_offset(offsets, request.recall_K, confidence)
        if offset is not None:
            judged.append(_judged(field, found.shape, offset))
    return judged


def _judged(field: Field, shape: Shape, offset: float) -> Judged:
    thresholds_SK = shape.at(offset)
    return Judged(
        route=field.route,
        shape=shape,
        offset=offset,
        spent=field.spend(thresholds_SK),
        recall_K=tuple(field.recalls(thresholds_SK)),
    )


def _individual(scores: Scores, request: Request) -> Judged:
    """The candidate of single images with the most GMAC, at what the search half's positives allow it.

    Of a net and the one in int8 that was made of it, which have as many, the faster one where both were timed.
    """
    alone = [route for route in routes(scores, request.cost) if len(route.steps) == 1]
    route = max(alone, key=lambda route: (route.steps[0].gmac, -(route.steps[0].seconds or 0.0)))
    shape = peel(Field(scores, route, "search", request.prevalence, request.cost), request.recall_K, request.max_fpr)
    assert shape is not None, "a net that tests every image has no screen"
    return _judged(Field(scores, route, "certify", request.prevalence, request.cost), shape, 0.0)


def _no_route(certified: Sequence[Judged], request: Request) -> str:
    if not certified:
        return (
            "none of the sequences found keeps the recall on the certifying half at any threshold: calibrate with "
            "screens that keep more, or with more positives"
        )
    best = min(certified, key=lambda found: found.spent.false_positive_rate)
    return (
        f"no certified plan keeps the false-positive rate at {request.max_fpr:g}: the best of them, {best.route.name}, "
        f"has {best.spent.false_positive_rate:.4g}; allow more with --max-fpr, ask for less recall, or calibrate with "
        "better nets"
    )
