"""The arithmetic of group testing against published numbers, against a simulation, and on the authors' own scores."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.planning.formulas import PERFECT, Accuracy, hierarchical, split_evenly
from tests.authors import GMAC, GROUPINGS, REUSED
from tests.replay import Scored, Step, replay


def accuracies(row: dict[str, str], stages: int) -> list[Accuracy]:
    """One a stage; a single pair of numbers is of all stages."""
    columns = [list(map(float, row[name].split("|"))) for name in ("Se_by_stage", "Sp_by_stage")]
    return [Accuracy(*pair) for pair in zip(*(column * (stages // len(column)) for column in columns), strict=True)]


def expect(row: dict[str, str]):
    tests = accuracies(row, int(row["algorithm"][-1]))
    levels = [[int(size) for size in level.split(",")] for level in row["config"].split(";")]
    prevalence = [0.012, 0.014, 0.011, 0.012, 0.010, 0.015] if row["p"] == "vec" else float(row["p"])
    return hierarchical(levels, prevalence, tests)


def test_every_published_output_of_bingroup2_to_four_decimals(shared_data):
    rows = list(csv.DictReader((shared_data / "ngt/bingroup2.csv").open()))
    rows = [row for row in rows if not row["algorithm"].startswith("A2")]  # square arrays, which no plan has
    compared = 0
    for row in rows:
        found = expect(row)
        for column, value in (
            ("ET_published", found.tests),
            ("ET_per_ind_published", found.tests_per_image),
            ("PSe", found.sensitivity),
            ("PSp", found.specificity),
        ):
            if row[column]:
                digits = max(4, len(row[column].partition(".")[2]))
                assert round(value, digits) == float(row[column]), (row, column)
                compared += 1
    assert len(rows) == 17 and compared > 60


def test_dorfmans_sizes():
    """The group size with the fewest tests of an image in two stages."""

    def tests(size: int, prevalence: float) -> float:
        return hierarchical([[size]], prevalence, (PERFECT, PERFECT)).tests_per_image

    sizes = {0.0005: 45, 0.001: 32, 0.005: 15, 0.01: 11, 0.02: 8, 0.05: 5, 0.1: 4}
    assert {p: min(range(2, 101), key=lambda size, p=p: tests(size, p)) for p in sizes} == sizes
    assert min(tests(size, 0.4) for size in range(2, 101)) > 1, "groups do not pay"


def test_a_remainder_makes_a_smaller_group():
    assert split_evenly(13, [13, 4]) == [[13], [4, 4, 4, 1]]
    assert split_evenly(13, [13, 4, 3]) == [[13], [4, 4, 4, 1], [3, 1, 3, 1, 3, 1]]
    # The thirteenth image is alone after the second stage, and is not tested a third time.
    perfect = [Accuracy()] * 3
    found = hierarchical(split_evenly(13, [13, 4]), 1.0 - 1e-12, perfect)
    assert found.tests == pytest.approx(1 + 4 + 12)


@pytest.mark.parametrize("levels", [[[13], [4, 4, 4, 1]], [[8], [4, 4], [2, 2, 2, 2]]])
def test_a_simulation_agrees(levels):
    rng = np.random.default_rng(5)
    tests = [Accuracy(0.9, 0.95), Accuracy(0.95, 0.9), Accuracy(0.97, 0.99), Accuracy(0.93, 0.98)][: len(levels) + 1]
    p, runs = 0.1, 20_000
    expected = hierarchical(levels, p, tests)
    truth = rng.random((runs, expected.images)) < p
    counts, positive = simulate(truth, levels, tests, rng)
    assert counts.mean() == pytest.approx(expected.tests, rel=0.02)
    assert positive[truth].mean() == pytest.approx(expected.sensitivity, abs=0.01)
    assert (~positive[~truth]).mean() == pytest.approx(expected.specificity, abs=0.003)


def decide(holds: np.ndarray, test: Accuracy, rng: np.random.Generator) -> np.ndarray:
    return rng.random(holds.shape) < np.where(holds, test.sensitivity, test.false_positive_rate)


def simulate(truth: np.ndarray, levels, tests, rng) -> tuple[np.ndarray, np.ndarray]:
    """Tests a run, and which images (runs, images) end positive."""
    runs, images = truth.shape
    left = np.ones_like(truth)
    alone = np.zeros(images, dtype=bool)
    counts = np.zeros(runs)
    for sizes, test in zip([*levels, None], tests, strict=True):
        members = np.flatnonzero(~alone)
        start = 0
        for size in sizes or [1] * len(members):
            group = members[start : start + size]
            start += size
            tested = left[:, group[0]]
            counts += tested
            left[:, group] &= (decide(truth[:, group].any(axis=1), test, rng) & tested)[:, None]
            alone[group] |= size == 1
    return counts, left


@pytest.mark.parametrize(
    ("levels", "prevalence", "words"),
    [
        ([[8], [3, 3]], 0.1, "leave images out"),
        ([[4], [3, 3]], 0.1, "do not split"),
        ([[4, 4], [3, 3, 2]], 0.1, "do not split"),
        ([[4]], 1.5, "between 0 and 1"),
        ([[4], [2, 2]], 0.1, "2 accuracies are given for 3 stages"),
    ],
)
def test_numbers_that_make_no_algorithm(levels, prevalence, words):
    with pytest.raises(ValueError, match=words):
        hierarchical(levels, prevalence, [Accuracy()] * 2)


@pytest.fixture(scope="module")
def authors(shared_data: Path) -> tuple[dict[str, Scored], np.ndarray]:
    """Their scores, and which images of their first order are violating."""
    scores = pq.read_table(shared_data / "ngt/ngt_scores.parquet").to_pandas()
    ids = pq.read_table(shared_data / "ngt/ngt_image_ids.parquet").to_pandas()
    first, second = (rows.sort_values("position") for _, rows in ids.groupby("seed"))
    position = dict(zip(second["image_id"], second["position"], strict=True))
    moved = np.array([position[image] for image in first["image_id"]])
    scored = {}
    for (test, seed, size), rows in scores.groupby(["test", "seed", "M"], observed=True):
        scores_GK = rows.sort_values("group")["score"].to_numpy()[:, None]
        if seed == 42:
            scored[test] = Scored.consecutive(size, scores_GK)
        else:
            scored[f"{test}_seed43"] = Scored(group_A=moved // size, scores_GK=scores_GK)
    return scored, first["target"].to_numpy() == 1


def steps_of(row: dict[str, str], across_nets: bool) -> list[Step]:
    """``across_nets``: whether features of another net's test are reused, as the published costs have it."""
    first, second = row["test_r1"], row["test_r2"]
    if row["algorithm"] == "A3":
        costs = GROUPINGS[first][0 if across_nets else 1]
        return [Step(tests=(first, second), thresholds=(0.5,), gmac=costs)]
    steps = [Step(tests=(first,), thresholds=(0.5,), gmac=(GMAC[first],))]
    if row["algorithm"] == "A2":
        same_net = first.split("_")[0] == second.split("_")[0]
        cost = REUSED if across_nets or same_net else GMAC[second]
        steps.append(Step(tests=(second,), thresholds=(0.5,), gmac=(cost,)))
    if first != "K0":
        steps.append(Step(tests=("K0",), thresholds=(0.5,), gmac=(GMAC["K0"],)))
    return steps


def test_every_row_of_the_published_table_to_the_last_digit(shared_data, authors):
    scored, violating_A = authors
    rows = list(csv.DictReader((shared_data / "ngt/table1.csv").open()))
    individual = GMAC["K0"] * len(violating_A)
    for row in rows:
        done, honest = (replay(scored, steps_of(row, across_nets)) for across_nets in (True, False))
        hits, false = int(done.flagged_A[violating_A].sum()), int(done.flagged_A[~violating_A].sum())
        found = {
            "tests_total": sum(step.tests for step in done.steps),
            "tmac_total": done.gmac / 1000,
            "relative_cost": done.gmac / individual,
            "relative_cost_no_cross_ckpt_reuse": honest.gmac / individual,
            "TP": hits,
            "FP": false,
            "recall_pct": 100 * hits / violating_A.sum(),
            "fpr_pct": 100 * false / (~violating_A).sum(),
        }
        if row["samples_after_r1"]:
            found["samples_after_r1"] = done.steps[0].images_out
        for column, value in found.items():
            assert round(value, len(row[column].partition(".")[2])) == float(row[column]), (row["config"], column)
    assert len(rows) == 20


def test_a_group_that_has_lost_members_has_no_score():
    scored = {
        "pairs": Scored.consecutive(2, np.array([[1.0], [0.0], [1.0], [0.0]])),
        "fours": Scored.consecutive(4, np.array([[1.0], [1.0]])),
    }
    steps = [Step(tests=(name,), thresholds=(0.5,), gmac=(1.0,)) for name in ("pairs", "fours")]
    assert replay(scored, steps[::-1]).flagged_A.tolist() == [True, True, False, False] * 2
    with pytest.raises(ValueError, match="group 0 has lost 2 of its 4 members before it is tested"):
        replay(scored, steps)
