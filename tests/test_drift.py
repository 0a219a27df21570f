"""Real nights under the drift gates: pictures that nets look at, drawn anew each night."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.corpus import CorpusConfig, make_corpus
from pipeline.gates import FEWEST_RUNS
from pipeline.scan import ScanConfig, run_scan
from tests.conftest import small_plan

IMAGES = 640


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten scans
@pytest.mark.usefixtures("ray_session")
def test_a_night_with_twice_the_prevalence_is_suspect_and_the_one_before_it_is_not(tmp_path: Path):
    plan, source = small_plan(tmp_path), tmp_path / "uploads"

    def night(number: int, prevalence: float) -> dict:
        shutil.rmtree(source, ignore_errors=True)
        make_corpus(
            CorpusConfig(
                output=str(source),
                images=IMAGES,
                prevalence=prevalence,
                seed=5000 + number,
                sides=(120, 260),
                processes=1,
            )
        )
        output = str(tmp_path / "out")
        return run_scan(
            ScanConfig(source=str(source), output=output, plan=str(plan), run_id=f"n{number:02d}", salt="s")
        )

    ordinary = [night(number, 0.125) for number in range(FEWEST_RUNS + 2)]
    for record in ordinary[:FEWEST_RUNS]:
        assert "too few runs to compare" in record["gates"]["note"] and record["suspect"] == []
    for record in ordinary[FEWEST_RUNS:]:
        assert len(record["gates"]["verdicts"]) == 5 and record["suspect"] == []
    odd = night(99, 0.25)
    print("\n".join(verdict["words"] for verdict in odd["gates"]["verdicts"]))
    assert odd["status"] == "complete" and "flagged:trefoil" in {finding["gate"] for finding in odd["suspect"]}
    assert all("more than expected" in finding["words"] for finding in odd["suspect"])
