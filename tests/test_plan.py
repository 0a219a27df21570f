"""Plans: what is refused, and what changes their version."""

from __future__ import annotations

import copy

import pytest
import yaml

from pipeline.errors import UsageError
from pipeline.plan import PLANS, load_plan, parse_plan
from pipeline.steps.nets import check_models


def content(**changes) -> dict:
    stage = {"name": "one", "model": "m", "rounds": [16, 4], "thresholds": {"a": [0.5, 0.6]}, "input_size": 64}
    return {"name": "p", "categories": ["a"], "stages": [stage]} | changes


def changed(path: str, value: object) -> dict:
    plan = copy.deepcopy(content())
    place = plan
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[last] = value
    return plan


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("stages.0.rounds", [16, 5], "a round of 5 cannot follow one of 16"),
        ("stages.0.rounds", [4, 16], "a round of 16 cannot follow one of 4"),
        ("stages.0.rounds", [], "give group sizes"),
        ("stages.0.thresholds", {"a": [0.5]}, "1 thresholds for 2 rounds"),
        ("stages.0.thresholds", {"b": [0.5, 0.5]}, r"thresholds for \['b'\]"),
        ("stages.0.thresholds", {"a": [0.5, 1.5]}, "not all in 0..1"),
        ("stages.0.input_size", 4, "input_size is 4, but at least 16 is wanted"),
        ("stages.0.actors", {"min": 3, "max": 2}, "actors max is 2, below min 3"),
        ("stages.0.num_gpus", 1.5, "num_gpus is 1.5, but an actor has a fraction of one GPU or whole ones"),
        ("stages.0.resources", {"GPU": 1}, "'GPU', which Ray counts itself; set num_cpus or num_gpus"),
        ("preparation.decode", {"resources": {"decode": 0}}, "decode is 0; give more than 0, or leave it out"),
        ("stages.0.dtype", "float16", "'float32' or 'bfloat16'"),
        ("stages", [], "stages has 0 entries, but at least 1 is wanted"),
        ("window.images", 100, "not a multiple of the groups of 16"),
        ("surprise", 1, "surprise is no field; known there: name, "),
    ],
)
def test_a_plan_that_cannot_work_is_refused_with_the_place(path, value, words):
    with pytest.raises(UsageError, match=words):
        parse_plan(changed(path, value), "here")


def test_operators_of_a_plan_with_gpus_are_not_fused():
    plan = changed("stages.0.num_gpus", 0.5) | {"fused": {"num_cpus": 1}}
    with pytest.raises(UsageError, match=r"fused is for plans without GPUs, but .* ask for some: leave out fused"):
        parse_plan(plan, "here")


def test_two_stages_need_two_names():
    plan = content()
    with pytest.raises(UsageError, match="each stage needs a name of its own"):
        parse_plan(plan | {"stages": plan["stages"] * 2}, "here")


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        ("stages.0.num_cpus", 3, True),
        ("stages.0.num_gpus", 0.3, True),
        ("stages.0.resources", {"decode": 1}, True),
        ("preparation.decode", {"resources": {"decode": 1}}, True),
        ("stages.0.batch_images", 16, True),
        ("stages.0.windows_per_call", 9, True),
        ("stages.0.actors", {"min": 1, "max": 8}, True),
        ("preparation.fetch_concurrency", 5, True),
        ("fused", {"num_cpus": 1, "actors": {"min": 2, "max": 2}}, True),
        ("preparation.decode", {"num_cpus": 0.5}, True),
        ("preparation.max_megapixels", 5, False),
        ("stages.0.thresholds", {"a": [0.5, 0.61]}, False),
        ("stages.0.dtype", "bfloat16", False),
        ("stages.0.input_size", 96, False),
        ("window.images", 512, False),
        ("stages.0.burst", {"first_groups": 4, "positive": 2, "group_size": 4}, False),
    ],
)
def test_the_version_changes_with_whatever_can_change_a_verdict(path, value, same):
    assert (parse_plan(changed(path, value), "a").version == parse_plan(content(), "b").version) is same


def test_every_shipped_plan_loads_and_its_nets_can_do_what_it_asks():
    shipped = sorted(PLANS.glob("*.yaml"))
    assert [path.stem for path in shipped]
    for path in shipped:
        models = check_models(load_plan(path.stem))
        assert models.individual_gmac > 0


def test_a_plan_file_is_read_safely(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UsageError, match="is not YAML"):
        load_plan(str(file))
    file.write_text("- a list")
    with pytest.raises(UsageError, match="must hold fields"):
        load_plan(str(file))
    with pytest.raises(UsageError, match="shipped plans are"):
        load_plan("unheard-of")
    file.write_text(yaml.safe_dump(content()))
    assert load_plan(str(file)).stages[0].rounds == (16, 4)


def test_half_of_a_plan_is_not_passed_over_in_silence(tmp_path):
    """YAML takes the last of two equal keys; what "<<" brings from elsewhere may be said anew."""
    file = tmp_path / "plan.yaml"
    text = yaml.safe_dump(content())
    file.write_text(f"{text}name: another\n")
    with pytest.raises(UsageError, match="'name' stands there twice; keep one"):
        load_plan(str(file))
    pool = "fetch: &pool {num_cpus: 0.5, actors: {min: 1, max: 2}}, decode: {<<: *pool, num_cpus: 1}"
    file.write_text(f"{text}preparation: {{{pool}}}\n")
    assert load_plan(str(file)).preparation.decode.num_cpus == 1


def test_a_plan_runs_no_code(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp_path}/ran]]"
    )
    with pytest.raises(UsageError, match=r"is not YAML: line \d+, column \d+: could not determine a constructor"):
        load_plan(str(plan))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["match", "fetch", "decode:one"])
def test_a_stage_is_not_called_like_an_operator(name):
    """Records and tables tell them apart by name."""
    plan = content()
    plan["stages"][0]["name"] = name
    with pytest.raises(UsageError, match="and names with a colon are operators'"):
        parse_plan(plan, "test")
