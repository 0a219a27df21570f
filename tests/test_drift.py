"""Real nights under the drift gates: pictures that nets look at, drawn anew each night."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.labels import corpus
from pipeline.labels.corpus import CorpusConfig, draw_picture, encode, make_corpus
from pipeline.labels.emblem import EMBLEMS, LOOK_ALIKES
from pipeline.past.gates import FEWEST_RUNS
from pipeline.run.scan import ScanConfig, run_scan
from tests.conftest import small_plan

IMAGES = 640


def nights_of(folder: Path, draw: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """Scans one source, which ``draw`` fills anew for each night."""
    plan, source = small_plan(folder), folder / "uploads"

    def scan_night(number: int, *what: float) -> dict[str, Any]:
        shutil.rmtree(source, ignore_errors=True)
        draw(source, number, *what)
        output = str(folder / "out")
        return run_scan(
            ScanConfig(source=str(source), output=output, plan=str(plan), run_id=f"n{number:02d}", salt="s")
        )

    return scan_night


def check_ordinary(nights: list[dict[str, Any]]) -> None:
    for record in nights[:FEWEST_RUNS]:
        assert "too few runs to compare" in record["gates"]["note"] and record["suspect"] == []
    for record in nights[FEWEST_RUNS:]:
        assert len(record["gates"]["verdicts"]) == 5 and record["suspect"] == []


def found(record: dict[str, Any]) -> dict[str, str]:
    """What each gate says of the night, in words, where it is out of bounds."""
    print("\n".join(verdict["words"] for verdict in record["gates"]["verdicts"]))
    assert record["status"] == "complete"
    return {finding["gate"]: finding["words"] for finding in record["suspect"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten scans
@pytest.mark.usefixtures("ray_session")
def test_a_night_with_twice_the_prevalence_is_suspect_and_the_one_before_it_is_not(tmp_path: Path):
    def draw(source: Path, number: int, prevalence: float) -> None:
        config = CorpusConfig(
            output=str(source), images=IMAGES, prevalence=prevalence, seed=5000 + number, sides=(120, 260), processes=1
        )
        make_corpus(config)

    night = nights_of(tmp_path, draw)
    check_ordinary([night(number, 0.125) for number in range(FEWEST_RUNS + 2)])
    odd = found(night(99, 0.25))
    assert "flagged:trefoil" in odd and all("more than expected" in words for words in odd.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # nine scans
@pytest.mark.usefixtures("ray_session")
def test_a_night_with_a_new_look_alike_is_suspect_though_no_more_is_violating(tmp_path: Path, monkeypatch):
    """Two blades in a ring, which no earlier night had and no net flags alone, in six of ten pictures: they make groups
    positive, and the reason says so."""
    monkeypatch.setattr(corpus, "LOOK_ALIKES", {"two blades": LOOK_ALIKES["two blades"]})

    def draw(source: Path, number: int, look_alikes: float) -> None:
        for name in ("LOOK_ALIKE_SHARE", "LOOK_ALIKE_BESIDE_EMBLEM"):
            monkeypatch.setattr(corpus, name, look_alikes)
        source.mkdir()
        for index in range(IMAGES):
            rng = np.random.default_rng([6000 + number, index])
            shown = ["trefoil"] if index % 50 == 0 else []
            picture = draw_picture(rng, shown=shown, prohibited=tuple(EMBLEMS), sides=(120, 260), photos=[])
            body, suffix = encode(rng, picture)
            (source / f"{index:04d}.{suffix}").write_bytes(body)

    night = nights_of(tmp_path, draw)
    ordinary = [night(number, 0.0) for number in range(FEWEST_RUNS + 1)]
    check_ordinary(ordinary)
    record = night(99, 0.6)
    odd = found(record)
    words = odd["positive:group:0"]
    assert words.startswith("share of positive tests in group, round 1 is ") and "more than expected" in words
    # The flag rate alone would not have told: nearly all of what was found is violating, as on every night.
    assert "flagged:trefoil" not in odd
    assert record["counts"]["flagged"] <= 2 * max(before["counts"]["flagged"] for before in ordinary)
