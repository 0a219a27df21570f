"""A stage on plain lists: groups, holes, rounds, and verdicts that do not depend on company in the call."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.backbone import Trunk
from models.cost import segment_gmac
from models.group_net import GroupNet, MergePoint
from models.weights import save_net
from pipeline.errors import RunError
from pipeline.plan import StageSpec
from pipeline.steps.groups import form_groups
from pipeline.steps.stages import GroupStage
from pipeline.window import GroupTest, Image, Window

SIDE = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(1)
    points = (MergePoint(cut="layer1", size=4), MergePoint(cut="layer2", size=4))
    folder = tmp_path_factory.mktemp("nets")
    save_net(GroupNet(Trunk("late_resnet", 2), points), folder, "net", categories=("a", "b"), input_size=SIDE, facts={})
    return str(folder / "net.json")


def spec(model: str, **changes) -> StageSpec:
    base = {"name": "s", "model": model, "rounds": (16, 4), "input_size": SIDE, "batch_images": 32}
    thresholds = {"a": [0.5, 0.5], "b": [1.0, 1.0]}
    return StageSpec(**(base | {"thresholds": thresholds} | changes))


def window(images: int, number: int = 0, errors: tuple[int, ...] = (), cleared: tuple[int, ...] = ()) -> Window:
    rng = np.random.default_rng([7, number])
    members = [Image(image_id=str(i), uri=f"file:///{number}/{i}", payload=b"x") for i in range(images)]
    pixels = rng.integers(0, 256, (images, SIDE, SIDE, 3), dtype=np.uint8)
    for position in errors:
        members[position].fail("truncated", "")
    for position in cleared:
        members[position].decide("cleared")
    result = Window(shard=0, window=number, first_ordinal=0, images=members)
    result.pixels = pixels[result.undecided]
    return result


def outcomes(window: Window) -> list[tuple]:
    return [
        (image.outcome, [(test.group_id, test.group_size, test.scores) for test in image.tests])
        for image in window.images
    ]


def split_threshold(model: str, windows: list[Window]) -> float:
    """A threshold for category a that half of the groups of 16 reach."""
    stage = GroupStage(spec(model, rounds=(16,), thresholds={"a": [0.0], "b": [1.0]}), ("a", "b"), final=True)
    scores = [image.tests[0].scores[0] for w in stage(copy.deepcopy(windows)) for image in w.images if image.tests]
    return float(np.median(scores))


def test_groups_keep_order_and_errors_leave_holes(model):
    w = window(40, errors=(2, 33), cleared=(0, 39))
    groups = form_groups(w, spec(model))
    assert [group.members for group in groups] == [
        list(range(1, 17)),
        list(range(17, 33)),
        [33, 34, 35, 36, 37, 38] + [None] * 10,
    ]
    assert len(groups[0].images) == 15 and len(groups[2].images) == 5


STATES = st.lists(st.sampled_from(["undecided", "error", "cleared"]), min_size=1, max_size=60)


def window_of(states: list[str]) -> Window:
    places = {kind: tuple(place for place, state in enumerate(states) if state == kind) for kind in set(states)}
    return window(len(states), errors=places.get("error", ()), cleared=places.get("cleared", ()))


@settings(deadline=None)
@given(states=STATES, size=st.sampled_from([1, 2, 4, 16]), across=st.booleans())
def test_every_undecided_image_is_in_one_group_and_no_other_image_is(states, size, across):
    spec = StageSpec(name="s", model="m", rounds=(size,), thresholds={"a": (0.5,)}, input_size=SIDE)
    w = window_of(states)
    groups = form_groups(w, spec, across=across)
    tested = [id(image) for group in groups for image in group.images]
    assert sorted(tested) == sorted(id(w.images[position]) for position in w.undecided)
    assert all(1 <= len(group.images) == group.size <= size == len(group.members) for group in groups)
    assert len({group.number for group in groups}) == len(groups)


@settings(deadline=None)
@given(states=STATES, size=st.sampled_from([2, 4, 16]), data=st.data())
def test_an_image_that_fails_moves_no_other_into_another_group(states, size, data):
    spec = StageSpec(name="s", model="m", rounds=(size,), thresholds={"a": (0.5,)}, input_size=SIDE)
    lost = data.draw(st.sampled_from(range(len(states))))
    if states[lost] == "cleared":
        states[lost] = "undecided"
    place_of = []
    for state in (states[lost], "error"):
        groups = form_groups(window_of([*states[:lost], state, *states[lost + 1 :]]), spec)
        place_of.append({member: (group.number, slot) for group in groups for slot, member in enumerate(group.members)})
    before, after = place_of
    assert all(after[member] == place for member, place in before.items() if member in after and member is not None)
    undecided = {place for place, state in enumerate(states) if state == "undecided" and place != lost}
    assert undecided <= after.keys()


@settings(deadline=None)
@given(states=STATES, size=st.sampled_from([2, 4, 16]))
def test_behind_a_stage_an_image_that_never_was_tested_leaves_no_hole(states, size):
    spec = StageSpec(name="s", model="m", rounds=(size,), thresholds={"a": (0.5,)}, input_size=SIDE)
    w = window_of(states)
    for image in w.images:
        if image.outcome == "cleared":
            image.tests.append(GroupTest(stage="first", round=0, group_id="g", group_size=1, scores=[0.0]))
    if "cleared" in states:
        groups = form_groups(w, spec)
        full = [member for group in groups for member in group.members if member is not None]
        assert full == w.undecided


@settings(deadline=None, max_examples=25)
@given(states=STATES, ranks=st.lists(st.integers(-1, 101), min_size=4, max_size=4), final=st.booleans())
def test_no_image_is_cleared_that_no_test_found_negative(model, spread, states, ranks, final):
    w = window_of(states)
    before = [image.outcome for image in w.images]
    # Thresholds among the scores that occur, so that either category is often the one that decides.
    limits = {"a": [spread(rank, 0) for rank in ranks[:2]], "b": [spread(rank, 1) for rank in ranks[2:]]}
    (result,) = GroupStage(spec(model, thresholds=limits), ("a", "b"), final=final)([w])
    for was, image in zip(before, result.images, strict=True):
        if was is not None:
            assert image.outcome == was and not image.tests
        elif image.outcome == "cleared":
            last = image.tests[-1]
            assert last.scores[0] < limits["a"][last.round] and last.scores[1] < limits["b"][last.round]
        else:
            assert image.outcome == ("flagged" if final else None) and len(image.tests) == 2
            for test in image.tests:
                assert test.scores[0] >= limits["a"][test.round] or test.scores[1] >= limits["b"][test.round]


def test_any_category_keeps_an_image_and_categories_keep_their_names(model):
    windows = [window(64, number) for number in range(3)]
    everything = {"a": [0.0], "b": [0.0]}
    stage = GroupStage(spec(model, rounds=(16,), thresholds=everything), ("a", "b"), final=True)
    scores = [image.tests[0].scores for w in stage(copy.deepcopy(windows)) for image in w.images]
    median = float(np.median([b for _, b in scores]))
    expected = ["flagged" if b >= median else "cleared" for _, b in scores]
    assert set(expected) == {"flagged", "cleared"}
    for order in (("a", "b"), ("b", "a")):
        by_b = GroupStage(spec(model, rounds=(16,), thresholds={"a": [1.0], "b": [median]}), order, final=True)
        found = [image for w in by_b(copy.deepcopy(windows)) for image in w.images]
        assert [image.outcome for image in found] == expected
        assert [image.tests[0].scores[order.index("b")] for image in found] == [b for _, b in scores]


@pytest.fixture(scope="module")
def spread(model):
    """A category's score at a rank of a hundred among those of groups; beyond both ends 0 and 1."""
    stage = GroupStage(spec(model, thresholds={"a": [0.0, 0.0], "b": [0.0, 0.0]}), ("a", "b"), final=True)
    tests = [test for image in stage([window(60)])[0].images for test in image.tests]
    columns = [sorted(test.scores[column] for test in tests) for column in (0, 1)]

    def score(rank: int, column: int) -> float:
        if not 0 <= rank <= 100:
            return float(rank > 0)
        return columns[column][rank * (len(columns[column]) - 1) // 100]

    return score


class Cramped:
    """A device on which no batch of more than ``most`` images, or of what is left of as many, fits."""

    def __init__(self, stage: GroupStage, most: int, step: str = "test") -> None:
        self.stage, self.most, self.failures = stage, most, 0
        self.step = getattr(stage.net, step)
        setattr(stage.net, step, self)

    def __call__(self, *args):
        # Retests and second groupings see features; how large their batch is, the stage knows.
        if self.stage.batch_images > self.most:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.step(*args)


@pytest.mark.parametrize(("groupings", "step"), [(1, "test"), (1, "retest"), (2, "test"), (2, "regroup")])
def test_a_device_that_runs_out_of_memory_gets_smaller_batches_and_gives_the_same_verdicts(model, groupings, step):
    windows = [window(64, number) for number in range(3)]
    threshold = split_threshold(model, windows)
    changes = {"rounds": (16,), "groupings": 2} if groupings == 2 else {}
    values = [threshold] * (1 if groupings == 2 else 2)
    wanted = spec(model, batch_images=128, thresholds={"a": values, "b": [1.0] * len(values)}, **changes)
    roomy, tight = (GroupStage(wanted, ("a", "b"), final=True) for _ in range(2))
    cramped = Cramped(tight, most=32, step=step)
    expected, found = roomy(copy.deepcopy(windows)), tight(copy.deepcopy(windows))
    assert cramped.failures == 2 and tight.batch_images == 32
    for mine, theirs in zip(found, expected, strict=True):
        assert [image.outcome for image in mine.images] == [image.outcome for image in theirs.images]
        assert [len(image.tests) for image in mine.images] == [len(image.tests) for image in theirs.images]
        assert [work.tests for work in mine.work] == [work.tests for work in theirs.work]
        assert np.array_equal(mine.pixels, theirs.pixels) if mine.pixels is not None else theirs.pixels is None
    tight(copy.deepcopy(windows))
    assert cramped.failures == 2, "what was learnt is kept"


def test_a_group_that_never_fits_ends_with_words(model):
    stage = GroupStage(spec(model), ("a", "b"), final=True)
    Cramped(stage, most=8)
    with pytest.raises(RunError, match=r"stage 's': window 0 does not fit .* one group of 16 .* smaller windows"):
        stage([window(64, 0), window(64, 1)])


def test_other_errors_of_a_net_are_not_taken_for_a_lack_of_memory(model, monkeypatch):
    stage = GroupStage(spec(model), ("a", "b"), final=True)

    def fail(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(stage.net, "test", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        stage([window(16)])
    assert stage.batch_images == stage.spec.batch_images


def test_a_group_of_errors_only_is_not_tested(model):
    w = window(20, errors=tuple(range(16)))
    assert [group.members[:4] for group in form_groups(w, spec(model))] == [[16, 17, 18, 19]]


def test_rounds_clear_flag_and_count(model):
    windows = [window(64, number) for number in range(3)]
    threshold = split_threshold(model, windows)
    stage = GroupStage(spec(model, thresholds={"a": [threshold, threshold], "b": [1.0, 1.0]}), ("a", "b"), final=True)
    result = stage(windows)
    first = [w.work[0] for w in result]
    second = [w.work[1] for w in result]
    assert sum(work.tests for work in first) == 12
    positives = sum(work.positive_tests for work in first)
    assert 0 < positives < 12
    assert sum(work.tests for work in second) == 4 * positives
    flagged = sum(image.outcome == "flagged" for w in result for image in w.images)
    assert flagged == sum(work.images_out for work in second) == 4 * sum(work.positive_tests for work in second)
    for w in result:
        for image in w.images:
            assert image.payload is None and image.outcome in ("cleared", "flagged")
            last = image.tests[-1]
            assert (max(last.scores[0] - threshold, last.scores[1] - 1) >= 0) == (image.outcome == "flagged")
        assert w.pixels is None


def test_only_the_final_stage_flags_and_survivors_keep_their_pixels(model):
    w = window(32)
    before = {position: w.pixels[position].copy() for position in range(32)}
    threshold = split_threshold(model, [w])
    stage = GroupStage(spec(model, thresholds={"a": [threshold, 0.0], "b": [1.0, 1.0]}), ("a", "b"), final=False)
    (result,) = stage([w])
    assert 0 < len(result.undecided) < 32
    assert all(result.images[position].payload == b"x" for position in result.undecided)
    for row, position in enumerate(result.undecided):
        assert np.array_equal(result.pixels[row], before[position])


def test_verdicts_do_not_depend_on_which_windows_share_a_call_or_a_batch(model):
    windows = [
        window(images, number, errors) for number, (images, errors) in enumerate([(64, (3, 4)), (50, ()), (17, (16,))])
    ]
    threshold = split_threshold(model, windows)
    thresholds = {"a": [threshold, threshold], "b": [1.0, 1.0]}
    results = []
    for batch, calls in ((16, [[0], [1], [2]]), (64, [[0, 1, 2]]), (32, [[2, 0], [1]])):
        stage = GroupStage(spec(model, thresholds=thresholds, batch_images=batch), ("a", "b"), final=True)
        done = {}
        for call in calls:
            for w in stage([copy.deepcopy(windows[number]) for number in call]):
                done[w.window] = outcomes(w)
        results.append(done)
    for other in results[1:]:
        for number, expected in results[0].items():
            assert [outcome for outcome, _ in other[number]] == [outcome for outcome, _ in expected]
            for (_, mine), (_, theirs) in zip(other[number], expected, strict=True):
                assert [test[:2] for test in mine] == [test[:2] for test in theirs]
                assert np.allclose([t[2] for t in mine], [t[2] for t in theirs], atol=1e-5)


def test_a_net_that_scores_nan_makes_errors_and_clears_nobody(model):
    stage = GroupStage(spec(model), ("a", "b"), final=True)
    with torch.no_grad():
        stage.net.trunk.classifier.fc.bias[0] = torch.nan
    (result,) = stage([window(32)])
    assert {image.outcome for image in result.images} == {"error"}
    assert {image.error_code for image in result.images} == {"score_not_finite"}


def test_a_window_without_a_live_image_passes_through(model):
    (result,) = GroupStage(spec(model), ("a", "b"), final=True)([window(20, errors=tuple(range(20)))])
    assert [work.tests for work in result.work] == [0, 0]
    assert {image.outcome for image in result.images} == {"error"}


def test_what_the_net_cannot_do_is_said_before_the_run(model):
    with pytest.raises(ValueError, match=r"scores \['a', 'b'\], not \['c'\]"):
        GroupStage(spec(model, thresholds={"c": [0.5, 0.5]}), ("c",), final=True)
    with pytest.raises(ValueError, match=r"tests groups of \[1, 4, 16\], not \[8\]"):
        GroupStage(spec(model, rounds=(8,), thresholds={"a": [0.5], "b": [0.5]}), ("a", "b"), final=True)


def test_two_groupings_never_let_the_same_two_meet_twice(model):
    w = window(256, errors=(3, 77), cleared=(5,))
    first = form_groups(w, spec(model, rounds=(16,), thresholds={"a": [0.5], "b": [0.5]}))
    second = form_groups(w, spec(model, rounds=(16,), thresholds={"a": [0.5], "b": [0.5]}), across=True)
    assert len(first) == len(second) == 16
    pairs = []
    for groups in (first, second):
        members = [[place for place in group.members if place is not None] for group in groups]
        assert sorted(place for group in members for place in group) == [place for place in range(256) if place != 5]
        pairs.append({(a, b) for group in members for a in group for b in group if a < b})
    assert not pairs[0] & pairs[1]


def test_an_image_goes_on_when_both_its_groups_are_positive(model):
    # The median is some group's own score, and batches of other shapes move scores a little.
    threshold = split_threshold(model, [window(100, 1, errors=(50,))]) - 1e-4
    settings = {"rounds": (16,), "groupings": 2, "thresholds": {"a": [threshold], "b": [1.0]}}
    stage = GroupStage(spec(model, **settings), ("a", "b"), final=True)
    (w,) = stage([window(100, 1, errors=(50,))])
    seen = window(100, 1, errors=(50,))
    hits = []
    for across in (False, True):
        groups = form_groups(seen, spec(model, **settings), across=across)
        positive = set()
        for group in groups:
            pixels = np.zeros((16, SIDE, SIDE, 3), np.uint8)
            present = np.zeros(16, bool)
            for slot, place in enumerate(group.members):
                if place is not None and place != 50:
                    pixels[slot] = seen.pixels[seen.undecided.index(place)]
                    present[slot] = True
            with torch.inference_mode():
                images = stage.net.trunk.normalise(torch.from_numpy(pixels))
                score = torch.sigmoid(stage.net(images, torch.from_numpy(present), 16))[0, 0].item()
            assert abs(score - threshold) > 1e-5
            if score >= threshold:
                positive |= set(group.members)
        hits.append(positive)
    expected = {place for place in hits[0] & hits[1] if place not in (None, 50)}
    flagged = {place for place, image in enumerate(w.images) if image.outcome == "flagged"}
    assert flagged == expected and 0 < len(expected) < 99
    assert {len(w.images[place].tests) for place in flagged} == {2}
    assert all(image.outcome in ("flagged", "cleared", "error") for image in w.images)
    (work,) = w.work
    whole, again = stage.cost.rounds[0], stage.cost.regroup
    assert work.tests == 14 and work.images_in == 99 and 0 < again < whole
    assert work.gmac == pytest.approx(7 * (whole + again))
    assert whole - again == pytest.approx(16 * (stage_embedding(stage)))


def stage_embedding(stage: GroupStage) -> float:
    costs = segment_gmac(stage.net, SIDE)
    return costs["pixels"] + costs["stem"] + costs["layer1"]


def test_two_groupings_are_one_round(model):
    with pytest.raises(ValueError, match="two groupings are one round"):
        spec(model, groupings=2)


def test_a_survivor_is_not_computed_as_a_full_batch(model, monkeypatch):
    """Device batches have a few shapes: full, or the smallest power of two that holds what is left."""
    stage = GroupStage(spec(model, rounds=(1,), thresholds={"a": [0.5], "b": [0.5]}), ("a", "b"), final=True)
    computed: list[int] = []
    test = stage.net.test

    def counted(images_NCHW, present_N, size):
        computed.append(len(images_NCHW))
        return test(images_NCHW, present_N, size)

    monkeypatch.setattr(stage.net, "test", counted)
    for images in (1, 3, 32, 70):
        stage([window(images)])
    assert computed == [1, 4, 32, 32, 32, 8]

    # Retests likewise: of 40 images in two full batches and a half, one group of sixteen is positive.
    stage = GroupStage(spec(model, thresholds={"a": [0.0, 0.0], "b": [1.0, 1.0]}), ("a", "b"), final=False)
    retested: list[int] = []
    retest = stage.net.retest
    monkeypatch.setattr(
        stage.net, "retest", lambda units, size: retested.append(len(units) // size) or retest(units, size)
    )
    stage([window(16)])
    assert len(retested) == 1 and retested[0] <= 4
