"""The policy: which action a finding gets, which files are refused, and that a run keeps its own."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs import scan as job
from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.output.policy import REVIEW_ALL, Policy, frozen_policy, read_policy
from pipeline.output.sink import Rows
from pipeline.plan import Plan, load_plan
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.run.submission import scan_job
from pipeline.store import Store, digest
from pipeline.window import GroupTest, Image, Window
from tests.conftest import QUICK, small_plan
from tests.outputs import run_here, scan_by_hand

ROOT = Path(__file__).parents[1]
BANDS = [
    {"from": 0.2, "to": 0.4, "action": "watch"},
    {"from": 0.5, "action": "restrict"},
    {"from": 0.9, "action": "remove"},
]
CONTENT: dict[str, Any] = {
    "name": "house",
    "version": 7,
    "default": "ask",
    "categories": {"gore": {"bands": BANDS, "hash_match": "remove"}, "weapon": {}},
}


def write(folder: Path, content: Any) -> str:
    path = folder / "policy.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def with_bands(*bands: dict[str, Any]) -> dict[str, Any]:
    return CONTENT | {"categories": {"gore": {"bands": list(bands)}, "weapon": {}}}


@pytest.mark.parametrize(
    ("category", "score", "action"),
    [
        ("gore", 0.1999, "ask"), ("gore", 0.2, "watch"), ("gore", 0.3999, "watch"),
        # Behind the end of a band, before the next.
        ("gore", 0.4, "ask"), ("gore", 0.5, "restrict"), ("gore", 0.8999, "restrict"), ("gore", 0.9, "remove"),
        ("gore", 1.0, "remove"), ("gore", None, "remove"), ("weapon", 0.99, "ask"), ("weapon", None, "ask"),
        # Known content that an earlier plan had looked for.
        ("spam", 0.99, "ask"),
    ],
)  # fmt: skip
def test_bands_hold_their_lower_end_and_what_is_in_none_takes_the_default(category, score, action):
    assert Policy.model_validate(CONTENT).action(category, score) == action


def test_a_score_of_one_is_in_the_last_band_even_when_that_begins_there():
    policy = Policy.model_validate(with_bands({"from": 0.5, "action": "low"}, {"from": 1, "action": "sure"}))
    assert [policy.action("gore", score) for score in (0.999, 1.0)] == ["low", "sure"]
    assert REVIEW_ALL.action("gore", 1.0) == REVIEW_ALL.action("gore", None) == "review"


def test_a_policy_is_read_with_the_digest_of_its_file_and_comes_back_from_a_frozen_run(tmp_path):
    frozen = read_policy(write(tmp_path, CONTENT), ("weapon", "gore"), None)
    assert (frozen["name"], frozen["version"]) == ("house", "7")
    assert frozen["sha256"] == digest((tmp_path / "policy.yaml").read_bytes())
    assert frozen_policy(frozen) == Policy.model_validate(CONTENT) and frozen_policy(None) is REVIEW_ALL


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            CONTENT | {"categories": {"gore": {}}},
            r"the plan's categories \['weapon'\] are not in it; give each its band",
        ),
        (
            CONTENT | {"categories": CONTENT["categories"] | {"spam": {}}},
            r"categories \['spam'\] are not among the plan's, \['gore', 'weapon'\]; take them out",
        ),
        (
            with_bands({"from": 0.2, "to": 0.6, "action": "a"}, {"from": 0.5, "action": "b"}),
            r"band from 0.2 to 0.6 overlaps the one from 0.5; let it end at 0.5",
        ),
        (
            with_bands({"from": 0.5, "action": "a"}, {"from": 0.2, "action": "b"}),
            r"band from 0.2 stands behind one from 0.5; put bands in order",
        ),
        (
            with_bands({"from": 0.5, "action": "a"}, {"from": 0.5, "action": "b"}),
            r"from 0.5 stands behind one from 0.5",
        ),
        (with_bands({"from": 0.5, "to": 0.5, "action": "a"}), r"from 0.5 to 0.5 holds no score; give a 'to' above 0.5"),
        (with_bands({"from": -0.1, "action": "a"}), r"categories.gore.bands.0.from is -0.1, but at least 0 is wanted"),
        (
            with_bands({"from": 0.1, "to": 1.5, "action": "a"}),
            r"categories.gore.bands.0.to is 1.5, but at most 1 is wanted",
        ),
        (
            with_bands({"from": float("nan"), "action": "a"}),
            r"categories.gore.bands.0.from is nan, but at least 0 is wanted",
        ),
        (
            with_bands({"from": 0.5, "action": "<b>"}),
            r"categories.gore.bands.0.action: '<b>' is not an action: a letter a-z, then",
        ),
        (with_bands({"from": 0.5}), r"categories.gore.bands.0.action is missing; give it"),
        (
            CONTENT | {"version": 1.1},
            r"version: 1.1 is a number, of which 1.1 and 1.10 are the same one; put it in quotes",
        ),
        (CONTENT | {"version": True}, r"version is True, but text is wanted"),
        (CONTENT | {"defualt": "remove"}, r"defualt is no field; known there: name, version, default, categories"),
        (CONTENT | {"name": "two words"}, r"name: 'two words' is not a letter or digit, then"),
        ("categories: {gore: {}, gore: {}}", r"not YAML: line 1, column 24: 'gore' stands there twice; keep one"),
        ("[1, 2]", r"must hold fields with values, as 'name: value', not a list"),
        ("a: [", r"is not YAML: line 1, column 5: expected the node content"),
        ("# nothing yet", r"is empty, but it must hold fields with values"),
        (
            with_bands({"from": 0.1, "action": "a", "min": 1}),
            r"categories.gore.bands.0.min is no field; known there: from, to",
        ),
        (
            with_bands({"from": "high", "action": "a"}),
            r"bands.0.from is 'high', but a number is wanted, written as 0.5",
        ),
        (with_bands({"from": True, "action": "a"}), r"bands.0.from: yes is a switch, but a number is wanted"),
        (with_bands([0.5, "remove"]), r"bands.0 is a list, but fields with values are wanted: from, to, action"),
        (
            CONTENT | {"categories": {"gore": {"bands": {"from": 0.5}}}},
            r"gore.bands is a mapping, but a list is wanted",
        ),
        (
            CONTENT | {"categories": {"gore": None}},
            r"categories.gore is nothing, but fields .* wanted: bands, hash_match",
        ),
        (CONTENT | {"categories": ["gore"]}, r"categories is a list, but fields with values are wanted"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_in_one_line(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(UsageError, match=words) as caught:
        read_policy(path, ("gore", "weapon"), None)
    assert str(caught.value).startswith(f"policy {path}") and "\n" not in str(caught.value)


def test_the_example_is_a_policy_for_the_shipped_plan_and_the_clusters_plan():
    for plan in (load_plan("emblem"), load_plan(str(ROOT / "docs/deploy/plan.yaml"))):
        frozen = read_policy(str(ROOT / "docs/deploy/policy.yaml"), plan.categories, None)
        actions = [frozen_policy(frozen).action("trefoil", score) for score in (0.5, 0.95, 0.995, None)]
        assert actions == ["review", "restrict", "remove", "remove"]


# What the sink writes

PLAN = Plan.model_validate(
    {
        "name": "two",
        "categories": ["gore", "weapon"],
        "stages": [
            {
                "name": "one",
                "model": "net",
                "rounds": [1],
                "thresholds": {"gore": [0.3], "weapon": [0.3]},
                "input_size": 32,
            }
        ],
    }
)


def flagged_rows(policy: Policy, *images: Image) -> dict[tuple[str, str], str]:
    rows = Rows("r", PLAN, {"one": ("m@1", "d")}, "s", policy)
    window = Window(shard=0, window=0, first_ordinal=0, images=list(images))
    found = rows.of_windows([window], datetime.now(UTC))["flagged"]
    return {(row["image_id"], row["category"]): row["recommended_action"] for row in found}


def test_a_finding_takes_the_action_of_its_own_category_and_score():
    image = Image(image_id="a", uri="u")
    image.tests.append(GroupTest(stage="one", round=0, group_id="g", group_size=1, scores=[0.95, 0.96]))
    image.decide("flagged")
    assert flagged_rows(Policy.model_validate(CONTENT), image) == {("a", "gore"): "remove", ("a", "weapon"): "ask"}
    assert set(flagged_rows(REVIEW_ALL, image).values()) == {"review"}


def test_a_hash_match_and_known_content_take_the_action_of_the_present_policy():
    def known(name: str, score: float | None, **values: Any) -> Image:
        finding = {"category": "gore", "score": score, "decided_stage": "match" if score is None else "one"}
        image = Image(image_id=name, uri=name, findings=[finding], **values)
        image.decide("flagged")
        return image

    images = [known("match", None), known("copy", 0.6, judged_run_id="earlier")]
    expected = {("match", "gore"): "remove", ("copy", "gore"): "restrict"}
    assert flagged_rows(Policy.model_validate(CONTENT), *images) == expected


# With a run


@pytest.fixture
def night(tmp_path) -> dict[str, Any]:
    """A folder of twenty files, the third of which a scan by hand flags with the threshold's own score."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.jpg").write_bytes(b"picture" * number)
    plan = small_plan(tmp_path, QUICK)
    policy = {
        "name": "house",
        "version": 1,
        "categories": {"automobile": {"bands": [{"from": 0.001, "to": 0.5, "action": "restrict"}]}},
    }
    return {"source": source, "output": str(tmp_path / "out"), "plan": plan, "policy": write(tmp_path, policy)}


def decide(name: str) -> str:
    return "flagged" if name == "3.jpg" else "cleared"


def actions(output: str) -> list[str]:
    (path,) = Path(output).glob("flagged/*/*.parquet")
    return pq.read_table(path, partitioning=None)["recommended_action"].to_pylist()


def by_hand(night: dict[str, Any], run_id: str, **options: Any) -> dict[str, Any]:
    return scan_by_hand(night["source"], night["output"], night["plan"], run_id, decide, **options)


def test_the_policy_stands_in_record_and_report_and_leaves_plan_and_verdicts_alone(night, tmp_path):
    record = by_hand(night, "with", policy=night["policy"])
    kept = commit.read_json(Store(night["output"]), "runs/with.json")["policy"]
    assert (kept["name"], kept["version"]) == ("house", "1")
    assert kept["sha256"] == digest(Path(night["policy"]).read_bytes())
    assert kept["content"]["categories"]["automobile"]["bands"] == [{"from": 0.001, "to": 0.5, "action": "restrict"}]
    assert actions(night["output"]) == ["restrict"]
    page = (Path(night["output"]) / "runs/with/report.html").read_text()
    assert f"<code>{kept['sha256'][:12]}</code>" in page and "<td>restrict</td>" in page

    without = by_hand(night | {"output": str(tmp_path / "other")}, "without")
    assert without["policy"] is None and actions(str(tmp_path / "other")) == ["review"]
    assert (without["plan_version"], without["counts"]) == (record["plan_version"], record["counts"])
    assert "none: everything flagged is to be reviewed" in (tmp_path / "other/runs/without/report.html").read_text()


def test_a_run_goes_on_with_its_own_policy(night, tmp_path):
    options = {"source": str(night["source"]), "output": night["output"], "plan": str(night["plan"]), "salt": "s"}
    by_hand(night, "night", policy=night["policy"])
    assert run_scan(ScanConfig(**options, run_id="night", policy=night["policy"]))["status"] == "complete"
    with pytest.raises(
        UsageError,
        match=r"started with policy house 1 of SHA-256 [0-9a-f]{64}, not with no policy; go on with that",
    ):
        run_scan(ScanConfig(**options, run_id="night"))
    Path(night["policy"]).write_text(Path(night["policy"]).read_text().replace("restrict", "remove"))
    with pytest.raises(UsageError, match=r"policy house 1 of SHA-256 [0-9a-f]{64}, not with policy house 1 of SHA-256"):
        run_scan(ScanConfig(**options, run_id="night", policy=night["policy"]))


def test_bad_policies_end_the_job_with_two_and_one_line(night):
    for file in ("no-such.yaml", str(ROOT / "docs/deploy/policy.yaml")):
        arguments = ["--source", str(night["source"]), "--output", night["output"], "--plan", str(night["plan"])]
        done = run_here(job, *arguments, "--policy", file)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"policy {file}" in done.stderr
    assert not list(Path(night["output"]).glob("_state/*/run.json"))


def test_policy_and_prices_travel_to_a_cluster_with_the_scan():
    config = ScanConfig(source="s3://b/", output="s3://o", policy="policy.yaml", prices="s3://ours/prices.yaml")
    assert scan_job(config, (), "r").files == ("policy.yaml",)
