"""What labels prove: the arithmetic, and a thousand calibrations of a world whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom

from pipeline.errors import UsageError
from pipeline.planning.calibration import Prevalence, certified_offset, misses_allowed, positives_needed, recall_bound
from pipeline.planning.field import Field
from pipeline.planning.proposal import Request, propose, search
from tests.simulated import PREVALENCE, Truth, World, calibrate, one_thread_each

RECALL = 0.95


def test_how_many_positives_prove_a_recall():
    assert [positives_needed(recall, 0.95) for recall in (0.9, 0.95, 0.99)] == [29, 59, 299]
    # One miss: the published sample sizes of acceptance sampling.
    assert [positives_needed(recall, 0.95, misses=1) for recall in (0.9, 0.95, 0.99)] == [46, 93, 473]
    assert recall_bound(50, 0, 0.95) == pytest.approx(0.05 ** (1 / 50)) == pytest.approx(0.9418, abs=1e-4)
    assert recall_bound(3, 3, 0.95) == 0


@pytest.mark.parametrize("recall", [0.8, 0.95, 0.99])
def test_what_may_be_missed_certifies_and_one_more_does_not(recall):
    for positives in (1, 20, 58, 59, 93, 200, 1000):
        misses = misses_allowed(positives, recall, 0.95)
        assert misses == -1 or recall_bound(positives, misses, 0.95) >= recall - 1e-12
        assert recall_bound(positives, misses + 1, 0.95) < recall
        assert (misses >= 0) == (positives >= positives_needed(recall, 0.95))


def test_the_certified_offset_is_where_walking_down_the_path_stops():
    rng = np.random.default_rng(3)
    offsets = [rng.normal(size=200), rng.normal(size=120) + 0.5]
    found = certified_offset(offsets, (0.9, 0.95), 0.95)
    path = np.sort(np.concatenate(offsets))[::-1]
    # Fixed-sequence testing, hypothesis by hypothesis, from the most permissive offset on.
    last = math.inf
    for offset in path:
        misses = [int((offset_P > offset).sum()) for offset_P in offsets]
        p_values = [
            binom.cdf(m, len(o), 1 - r) for m, o, r in zip(misses, offsets, (0.9, 0.95), strict=True)
        ]  # chance of so few misses if recall were too low
        if max(p_values) > 0.05:
            break
        last = offset
    assert found == last


def test_no_offset_brings_back_whom_a_screen_has_cleared():
    lost = np.array([0.0] * 90 + [np.inf] * 10)
    assert certified_offset([lost], (0.95,), 0.95) is None
    assert certified_offset([lost], (0.8,), 0.95) == 0.0
    assert certified_offset([np.zeros(58)], (0.95,), 0.95) is None, "58 positives prove less than 0.95"


def test_an_uncertain_prevalence_has_its_mean_and_its_spread():
    prevalence = Prevalence(mean_K=(0.001, 0.002), images=10_000)
    nodes = prevalence.nodes()
    assert nodes.mean() == pytest.approx(0.003, rel=0.01)
    assert nodes.std() == pytest.approx(math.sqrt(0.003 * 0.997 / 10_001), rel=0.05)
    assert prevalence.shares_K.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert prevalence.quantile(0.05) < 0.003 < prevalence.quantile(0.95)
    with pytest.raises(ValueError, match="each must be above 0"):
        Prevalence(mean_K=(0.001, 0.0), images=100)


def request(**changes) -> Request:
    return Request(**{"recall_K": (RECALL,), "confidence": 0.95, "prevalence": PREVALENCE, "max_fpr": 0.01} | changes)


def true_outcome(seed: int, clusters: int, negatives: int = 6000) -> tuple[float, float]:
    """True recall and expected cost of the plan that one calibration gives; no numbers when it gives none."""
    scores = calibrate(World(seed), clusters, negatives)
    try:
        chosen = propose(scores, request()).chosen
    except UsageError:
        return math.nan, math.nan
    (recall,) = Truth(World(10_000_000 + seed)).recalls(chosen.route, chosen.thresholds_SK)
    return recall, chosen.spent.cost


def oracle_cost() -> float:
    """Of the cheapest plan whose true recall is what is asked for: the same search on 16,000 positives, uncertified."""
    scores = calibrate(World(1), 40_000, 20_000, redraws=1, screen_recalls=(0.955, 0.96, 0.97, 0.98, 0.99, 0.995))
    (positives,) = scores.unique_positives("certify")
    ranked = search(scores, request(), [round((1 - RECALL) * positives)], [positives])
    return min(
        Field(scores, found.route, "certify", PREVALENCE).spend(found.shape.thresholds_SK).cost for found in ranked[:5]
    )


def run_all(function: Callable[[int], tuple[float, float]], seeds: range) -> np.ndarray:
    with one_thread_each(2) as pool:
        return np.array(list(pool.map(function, seeds, chunksize=4)))


def test_certified_plans_keep_their_recall():
    """A few calibrations: what a thousand of them must show stands below."""
    recalls, costs = np.array([true_outcome(seed, clusters=500) for seed in range(4)]).T
    # Five of a hundred may fail: two of four would be one chance in seventy.
    assert (recalls >= RECALL).sum() >= 3
    assert recalls.mean() < 0.995, "nothing is saved by plans that miss nobody"
    assert costs.max() < 0.3


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_certificates_hold():
    clusters = 1000
    found = run_all(partial(true_outcome, clusters=clusters), range(1000))
    recalls, costs = found[~np.isnan(found[:, 0])].T
    held, ratio = (recalls >= RECALL).mean(), costs / oracle_cost()
    print(
        f"\n{clusters} unique positives, 60 % of them certify: {100 * held:.1f} % of {len(recalls)} certificates hold, "
        f"{1000 - len(recalls)} calibrations found no plan; recall {recalls.mean():.4f} ({recalls.std():.4f}); cost "
        f"over the oracle's {ratio.mean():.3f} ({ratio.std():.3f})"
    )
    assert len(recalls) >= 995, "a plan is refused where its finalists let too many false positives through"
    assert held >= 0.936
    assert ratio.mean() <= 1.3


def test_three_categories_keep_a_recall_each():
    world = World(5, fainter=(0.0, 0.4, -0.3))
    scores = calibrate(world, 900, 3000, redraws=2)
    wanted = request(
        recall_K=(0.9, 0.85, 0.95), prevalence=Prevalence(mean_K=(0.002, 0.0005, 0.001), images=5000), max_fpr=0.03
    )
    proposal = propose(scores, wanted)
    thresholds_SK = proposal.chosen.thresholds_SK
    assert thresholds_SK.shape == (len(proposal.chosen.route.steps), 3)
    assert len({round(value, 6) for value in thresholds_SK[-1].tolist()}) == 3, "each category has its own"
    truth = Truth(World(77, fainter=(0.0, 0.4, -0.3))).recalls(proposal.chosen.route, thresholds_SK)
    for recall, bound, asked in zip(truth, proposal.bound_K, wanted.recall_K, strict=True):
        assert recall >= bound >= asked


def test_labels_that_cannot_certify_say_what_could():
    scores = calibrate(World(2), 70, 2000)
    with pytest.raises(UsageError) as refused:
        propose(scores, request())
    (positives,) = scores.unique_positives("certify")
    assert f"needs 59 unique positives in the certifying half, none of them missed, but there are {positives}" in str(
        refused.value
    )
    asked = float(str(refused.value).partition("a recall of at most ")[2].partition(",")[0])
    assert asked == pytest.approx(recall_bound(positives, 0, 0.95), abs=1e-4)
    assert min(propose(scores, request(recall_K=(asked,), max_fpr=0.5)).bound_K) >= asked
