"""Reviewing without a browser: the queue, leases, which decision stands, and what reads the decisions."""

from __future__ import annotations

import io
import itertools
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import audit as audit_job
from jobs import erase as erase_job
from jobs import query as query_job
from pipeline import schema
from pipeline.errors import StoreError, UsageError
from pipeline.labels.examples import read_known
from pipeline.listing.source import image_id
from pipeline.output.sink import table_bytes
from pipeline.plan import Preparation
from pipeline.review.appeals import read_appeals
from pipeline.review.audit import audit
from pipeline.review.decisions import read_standing, review_files, standing
from pipeline.review.desk import Desk
from pipeline.review.evidence import read_evidence
from pipeline.review.leases import LEASE_SECONDS, Leases
from pipeline.review.picture import SIDE, Pictures
from pipeline.review.queue import newest_run, read_queue
from pipeline.review.rules import Refused, check_reviewer
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.training.calibrate import CalibrateConfig
from tests.conftest import QUICK, small_plan
from tests.outputs import run_here, scan_by_hand
from tests.review_pages import (
    MOMENT,
    PICTURES,
    appeal_by,
    desk_of,
    draw,
    drawn_row,
    flagged_row,
    night,
    of_file,
    write_run,
)


def go(desk: Desk, answer: str = "not violating", *violating: str, **options: Any) -> dict[str, Any]:
    """Looks at the next image and decides."""
    (item,) = desk.next([], None, 1)["items"]
    desk.picture(item["id"])
    categories = violating or (tuple(item["categories"]) if answer == "violating" else ())
    desk.decide(item["id"], uuid4().hex, answer, categories, **({"revealed": True} | options))
    return item


def name_of(item: dict[str, Any]) -> str:
    return item["name"].rsplit("/", 1)[1]


def names_to_go(desk: Desk) -> list[str]:
    return [item.uri.rsplit("/", 1)[1] for item in desk.work.items if item.image_id not in desk.work.done]


# Which decision stands


def decided(number: int, kind: str, decision: str, hour: int, **values: Any) -> dict[str, Any]:
    row = dict.fromkeys(schema.DECISIONS.names) | {
        "decision_id": f"{number:032x}", "kind": kind, "reviewer": f"r{number}", "image_id": "a", "category": "gore",
        "source_uri": "s3://b/a", "decided_at": datetime(2026, 1, 1, hour, tzinfo=UTC), "decision": decision,
        "label": {"violating": 1, "not violating": 0}.get(decision), "revealed": True, "run_id": "mon",
    }  # fmt: skip
    return row | values


STANDS = {
    "the newest of a kind": ([("first", "violating", 1), ("first", "not violating", 2)], 0),
    "a second opinion, whatever comes later": ([("second", "violating", 1), ("first", "not violating", 2)], 1),
    "an appeal over all": ([("appeal", "not violating", 1), ("second", "violating", 2), ("first", "violating", 3)], 0),
    "unsure is a decision without a label": ([("first", "violating", 1), ("second", "unsure", 2)], None),
    "what was not seen decides nothing": ([("first", "violating", 1), ("second", "not seen", 2)], 1),
}


@pytest.mark.parametrize("case", STANDS)
def test_the_newest_decision_of_the_highest_kind_stands_in_whatever_order_they_are_read(case):
    said, label = STANDS[case]
    rows = [decided(number, *what) for number, what in enumerate(said)]
    for order in itertools.permutations(rows):
        found = standing(pa.Table.from_pylist(list(order), schema.DECISIONS))
        assert found.labels == ({} if label is None else {("a", "gore"): label})
        assert found.unsure == ({"a": "second"} if label is None else {})


def test_what_was_taken_back_stands_no_more_and_what_it_had_replaced_does():
    rows = [decided(1, "first", "violating", 1), decided(2, "first", "not violating", 2)]
    taken_back = decided(3, "first", "withdrawn", 3, withdraws=f"{2:032x}")
    assert standing(pa.Table.from_pylist(rows, schema.DECISIONS)).labels == {("a", "gore"): 0}
    assert standing(pa.Table.from_pylist([*rows, taken_back], schema.DECISIONS)).labels == {("a", "gore"): 1}


# The queue


def test_flagged_images_come_by_priority_and_each_once(tmp_path):
    source = tmp_path
    about = [of_file(draw(source / f"{number}.jpg", number)) for number in range(4)]
    scores = [("gore", 0.6), ("gore", 0.95), ("gore", 0.7)]
    rows = [flagged_row(row, "mon", *score) for row, score in zip(about, scores, strict=False)]
    rows.append(flagged_row(about[2], "mon", "weapon", 0.99))
    rows.append(flagged_row(about[3], "mon", "gore", None))
    store = Store(str(tmp_path / "out"))
    write_run(store, "mon", rows, categories=("gore", "weapon"))
    queue = read_queue(store, ("mon",))
    assert [item.uri.rsplit("/", 1)[1] for item in queue.items] == ["3.jpg", "2.jpg", "1.jpg", "0.jpg"]
    assert [sorted(item.near) for item in queue.items] == [["gore"], ["gore", "weapon"], ["gore"], ["gore"]]
    assert {item.categories for item in queue.items} == {("gore", "weapon")}
    history = queue.history(queue.items[1])
    assert [(part["category"], part["score"]) for part in history] == [
        ("gore", pytest.approx(0.7)), ("weapon", pytest.approx(0.99))
    ]  # fmt: skip
    assert queue.history(queue.items[0])[0]["match_bank"] == "known"


def test_labels_of_copies_may_stand_in_a_file_of_reviews_and_count_nowhere(tmp_path):
    """Somebody labels all of ``flagged/`` of a night that knew content which an earlier one had flagged."""
    about = [of_file(draw(tmp_path / f"{number}.jpg", number)) for number in range(4)]
    store = Store(str(tmp_path / "out"))
    rows = [flagged_row(about[0], "tue", "gore", 0.6), flagged_row(about[1], "tue", "gore", 0.9)]
    rows[1] |= {"judged_run_id": "mon"}
    write_run(store, "tue", rows, [drawn_row(about[2], "tue", [0.1])])
    labels = {(row["image_id"], "gore"): 1 for row in rows}
    evidence = read_evidence(store, ("tue",), labels)
    assert [row["image_id"] for row in evidence.flagged] == [rows[0]["image_id"]]
    assert evidence.labels == {(rows[0]["image_id"], "gore"): 1} and evidence.of_all().flagged_F.tolist() == [1]
    stranger = flagged_row(about[3], "tue", "gore", 0.9)["image_id"]
    with pytest.raises(UsageError, match="name 1 images that are in no flagged or audit table of tue"):
        read_evidence(store, ("tue",), labels | {(stranger, "gore"): 1})


def test_an_image_of_two_runs_comes_once_and_what_was_flagged_anywhere_is_flagged(tmp_path):
    about = [of_file(draw(tmp_path / f"{number}.jpg", number)) for number in range(2)]
    store = Store(str(tmp_path / "out"))
    write_run(store, "mon", [flagged_row(about[0], "mon", "gore", 0.6)], [drawn_row(about[1], "mon", [0.1])])
    later = MOMENT + timedelta(days=1)
    rows = [flagged_row(about[0], "tue", "gore", 0.8), flagged_row(about[1], "tue", "gore", 0.9)]
    write_run(store, "tue", rows, started_at=later)
    queue = read_queue(store, ("mon", "tue"))
    assert [(item.run_id, item.flagged) for item in queue.items] == [("tue", True), ("tue", True)]
    assert newest_run(store) == "tue"
    with pytest.raises(UsageError, match="there is no complete run 'wed'"):
        read_queue(store, ("wed",))


def test_neither_place_nor_words_nor_pictures_tell_drawn_images_from_flagged_ones(tmp_path):
    """By lot: of 300 drawn among 300 flagged, the mean place is that of all, and the sent objects have equal keys."""
    store = night(tmp_path, flagged=300, drawn=300, categories=("gore", "weapon"))
    desk = desk_of(store)
    places = [place for place, item in enumerate(desk.work.items) if not item.flagged]
    # The mean of 300 uniform places of 600 has a standard deviation of ten.
    assert abs(np.mean(places) - 300) < 50
    assert np.histogram(places, bins=6, range=(0, 600))[0].min() > 20
    sent = {item.flagged: desk._to_page(item) for item in desk.work.items}
    assert sent[True].keys() == sent[False].keys() == {"id", "name", "categories"}
    assert sent[True]["categories"] == sent[False]["categories"] == ["gore", "weapon"]
    answered = {}
    for flagged in (True, False):
        item = next(item for item in desk.work.items if item.flagged == flagged)
        desk.held[item.id] = item
        shown = desk.picture(item.id)
        assert shown.jpeg
        answered[flagged] = desk.decide(item.id, uuid4().hex, "not violating", (), revealed=True)
    assert answered[True] == answered[False]
    assert "score" not in json.dumps(desk.next([], None, 4)) and "near" not in json.dumps(desk.about())
    # Ids are of one session: two reviewers cannot compare notes by them, and the tables have none of them.
    assert not {item.id for item in desk.work.items} & {item.id for item in desk_of(store, reviewer="bob").work.items}


def test_a_filter_keeps_drawn_images_of_the_category_they_came_nearest_to(tmp_path):
    store = night(tmp_path, flagged=4, drawn=3, categories=("gore", "weapon"))
    desk = desk_of(store)
    # Two flagged as each; the drawn ones of this night have their highest score as weapon.
    assert [desk.progress(name)["total"] for name in (None, "gore", "weapon")] == [7, 2, 5]
    found = desk.next([], "gore", 4)["items"]
    assert {name_of(item) for item in found} == {"mon-0.jpg", "mon-2.jpg"}
    assert desk.next([], "nothing", 1)["items"] == []


# Leases


def test_two_reviewers_never_have_one_image_at_one_time(tmp_path):
    store = night(tmp_path, flagged=6, drawn=4)
    ann, bob = desk_of(store), desk_of(store, reviewer="bob")
    first = [item["name"] for item in ann.next([], None, 3)["items"]]
    second = bob.next([], None, 3)
    assert not set(first) & {item["name"] for item in second["items"]} and second["elsewhere"] == 3
    while ann.progress()["done"] < 10:
        for desk in (ann, bob):
            if desk.next([], None, 1)["items"]:
                go(desk)
            desk.refresh()
    rows = pq.read_table(tmp_path / "out" / "reviews").to_pylist()
    assert len(rows) == len({row["image_id"] for row in rows}) == 10
    assert {row["reviewer"] for row in rows} == {"ann", "bob"}


def test_of_many_who_take_a_lease_at_once_one_gets_it(tmp_path):
    store = Store(str(tmp_path))
    start = threading.Barrier(8)
    took: list[bool] = []

    def take(holder: str, clock: Any) -> None:
        leases = Leases(store, "first", holder, clock)
        start.wait()
        took.append(leases.take("a" * 32))

    for clock in (lambda: MOMENT, lambda: MOMENT + timedelta(seconds=LEASE_SECONDS + 1)):  # new, and run out
        took.clear()
        threads = [threading.Thread(target=take, args=(f"{number}{clock()}", clock)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(took) == [False] * 7 + [True]


def test_what_a_session_lets_go_of_or_leaves_is_given_to_another(tmp_path):
    store = night(tmp_path, flagged=1, drawn=0)
    now = [datetime.now(UTC)]
    ann, bob = desk_of(store, clock=lambda: now[0]), desk_of(store, reviewer="bob", clock=lambda: now[0])
    (item,) = ann.next([], None, 1)["items"]
    assert bob.next([], None, 1) | {"progress": None} == {"items": [], "elsewhere": 1, "progress": None}
    # Ann goes to lunch: the lease runs out, Bob takes the image, and what Ann says then is not recorded.
    now[0] += timedelta(seconds=LEASE_SECONDS + 1)
    ann.picture(item["id"])
    assert len(bob.next([], None, 1)["items"]) == 1
    with pytest.raises(Refused, match="another reviewer has it now; nothing was recorded") as refused:
        ann.decide(item["id"], uuid4().hex, "not violating", (), revealed=True)
    assert refused.value.gone and not review_files(store)
    bob.close()
    ann.refresh()
    assert len(ann.next([], None, 1)["items"]) == 1
    ann.leases.sweep()
    assert len(store.sizes("reviews/_leases")) == 1  # one that runs is kept


def test_after_a_lapsed_lease_a_decision_of_another_is_seen_before_ones_own_is_made(tmp_path):
    store = night(tmp_path, flagged=1, drawn=0)
    now = [datetime.now(UTC)]
    ann, bob = desk_of(store, clock=lambda: now[0]), desk_of(store, reviewer="bob", clock=lambda: now[0])
    (item,) = ann.next([], None, 1)["items"]
    ann.picture(item["id"])
    now[0] += timedelta(seconds=LEASE_SECONDS + 1)
    go(bob)
    now[0] += timedelta(seconds=LEASE_SECONDS + 1)
    with pytest.raises(Refused, match="has decided it meanwhile"):
        ann.decide(item["id"], uuid4().hex, "violating", ("gore",), revealed=True)
    assert len(review_files(store)) == 1


def test_a_decision_that_is_merged_while_a_page_wakes_up_is_learned_from_the_merged_file(tmp_path, monkeypatch):
    store = night(tmp_path, flagged=1, drawn=0)
    ann, bob = desk_of(store), desk_of(store, reviewer="bob")
    go(bob)
    (key,) = review_files(store)
    body, merged = store.read(key), key.rsplit("/", 1)[0] + "/merged-1.parquet"

    def files(store: Store, day: str | None = None) -> list[str]:
        found = review_files(store, day)
        if key in found:
            store.write(merged, body)
            store.delete([key])
        return found

    monkeypatch.setattr("pipeline.review.log.review_files", files)
    for days, known in ((5, 0), (6, 1)):
        monkeypatch.setattr("pipeline.review.log.now", lambda days=days: datetime.now(UTC) + timedelta(days=days))
        ann.refresh()
        assert len([item for item in ann.work.items if ann.log.on(item.image_id)]) == known


def test_a_page_that_slept_over_a_weekend_learns_what_was_decided_meanwhile(tmp_path, monkeypatch):
    store = night(tmp_path, flagged=3, drawn=0)
    ann, bob = desk_of(store), desk_of(store, reviewer="bob")
    friday = datetime.now(UTC)
    listed: list[str | None] = []

    def files(store: Store, day: str | None = None) -> list[str]:
        listed.append(day)
        return review_files(store, day)

    monkeypatch.setattr("pipeline.review.log.review_files", files)
    go(bob)
    for days in (3, 3):
        monkeypatch.setattr("pipeline.review.log.now", lambda days=days: friday + timedelta(days=days))
        ann.refresh()
        assert len([item for item in ann.work.items if ann.log.on(item.image_id)]) == len(review_files(store)) > 0
    # From the day before it was last read, and so of the second time yesterday and today only.
    assert listed == [f"{friday + timedelta(days=day):%Y-%m-%d}" for day in (-1, 0, 1, 2, 3, 2, 3)]
    monkeypatch.setattr("pipeline.review.log.now", lambda: friday)
    ann.refresh()
    assert listed[-2:] == [f"{friday + timedelta(days=day):%Y-%m-%d}" for day in (-1, 0)], "a clock was put back"


# Decisions


def test_a_decision_is_in_the_store_before_it_is_answered_and_once_however_often_it_is_sent(tmp_path, monkeypatch):
    store = night(tmp_path, flagged=2, drawn=0, categories=("gore", "weapon"))
    desk = desk_of(store)
    (item,) = desk.next([], None, 1)["items"]
    desk.picture(item["id"])
    sent = (item["id"], uuid4().hex, "violating", ("weapon",))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", lambda *_: (_ for _ in ()).throw(StoreError("the store is down")))
        with pytest.raises(StoreError, match="the store is down"):
            desk.decide(*sent, revealed=True)
    assert desk.progress()["done"] == 0 and not review_files(store)
    before = datetime.now(UTC)
    assert desk.decide(*sent, revealed=True) == desk.decide(*sent, revealed=True)
    (key,) = review_files(store)
    rows = pq.read_table(io.BytesIO(store.read(key)))
    assert rows.schema.equals(schema.DECISIONS)
    assert [(row["category"], row["decision"], row["label"]) for row in rows.to_pylist()] == [
        ("gore", "not violating", 0), ("weapon", "violating", 1)
    ]  # fmt: skip
    row = rows.to_pylist()[0]
    picture = of_file(tmp_path / "source" / name_of(item))
    assert {name: row[name] for name in ("run_id", "reviewer", "kind", "revealed", "withdraws")} == {
        "run_id": "mon", "reviewer": "ann", "kind": "first", "revealed": True, "withdraws": None
    }  # fmt: skip
    assert (row["image_id"], row["source_uri"]) == (picture["image_id"], picture["source_uri"])
    assert len(row["sha256"]) == 64 and before <= row["decided_at"] <= datetime.now(UTC)
    # A session that begins now knows of it.
    assert desk_of(store, reviewer="bob").progress()["done"] == 1


def test_undo_adds_a_row_and_gives_the_image_out_again(tmp_path):
    store = night(tmp_path, flagged=2, drawn=1)
    desk = desk_of(store)
    names = [name_of(go(desk, "violating")), name_of(go(desk, "unsure"))]
    first = {key: store.read(key) for key in review_files(store)}
    assert name_of(desk.undo(uuid4().hex)["item"]) == names[1]
    assert name_of(desk.undo(uuid4().hex)["item"]) == names[0]
    with pytest.raises(Refused, match="nothing to take back"):
        desk.undo(uuid4().hex)
    assert desk.progress()["done"] == desk.progress()["mine"] == 0
    assert {key: store.read(key) for key in first} == first and len(review_files(store)) == 4
    assert read_standing(store).labels == {}
    again = go(desk, "not violating")
    assert name_of(again) == names[0] and list(read_standing(store).labels.values()) == [0]


def test_whoever_has_seen_what_the_nets_said_cannot_take_the_decision_back(tmp_path):
    desk = desk_of(night(tmp_path, flagged=2, drawn=0))
    with pytest.raises(Refused, match="no decision of yours"):
        desk.history_of_last()
    item = go(desk)
    last = desk.history_of_last()
    assert last["id"] == item["id"] and last["history"]["tests"][0]["score"] == pytest.approx(0.9)
    assert [part["answer"] for part in last["history"]["decisions"]] == ["not violating"]
    assert not desk.progress()["can_undo"]
    with pytest.raises(Refused, match="so your decision stays"):
        desk.undo(uuid4().hex)


def test_what_nobody_has_looked_at_gets_no_label(tmp_path):
    store = night(tmp_path, flagged=3, drawn=0)
    desk = desk_of(store)
    items = desk.next([], None, 3)["items"]
    ready, gone, changed = (item["id"] for item in items)
    source = tmp_path / "source"
    (source / name_of(items[1])).unlink()
    draw(source / name_of(items[2]), 77, (60, 60))
    with pytest.raises(Refused, match="Nobody has looked at this picture"):
        desk.decide(ready, uuid4().hex, "violating", ("gore",), revealed=True)
    shown = {page_id: desk.picture(page_id) for page_id in (ready, gone, changed)}
    assert (shown[ready].problem, shown[gone].jpeg, shown[changed].jpeg) == (None, None, None)
    assert shown[gone].problem == "The picture is gone since the scan." and not shown[gone].may_pass
    assert "another one than was scanned" in (shown[changed].problem or "")
    refused = [
        (ready, "not violating", (), False, "Look at it first"),
        (ready, "violating", (), True, "Say what it violates, of gore"),
        (ready, "violating", ("weapon",), True, "Say what it violates, of gore"),
        (ready, "unsure", ("gore",), True, "Say what it violates"),
        (ready, "not seen", (), True, "The picture can be seen"),
        (ready, "maybe", (), True, "'maybe' is no decision"),
        (gone, "violating", ("gore",), True, "There is no picture to judge"),
        (gone, "unsure", (), True, "There is no picture to judge"),
        ("0" * 24, "unsure", (), True, "not yours to look at"),
    ]
    for page_id, answer, violating, revealed, words in refused:
        with pytest.raises(Refused, match=words):
            desk.decide(page_id, uuid4().hex, answer, violating, revealed=revealed)
    with pytest.raises(Refused, match="32 hexadecimal digits"):
        desk.decide(ready, "../../escaped", "unsure", (), revealed=True)
    assert not review_files(store)
    desk.decide(ready, uuid4().hex, "violating", ("gore",), revealed=False)  # blurred, it can be seen to be bad
    desk.decide(gone, uuid4().hex, "not seen", (), revealed=False)
    desk.skip(changed)
    assert list(read_standing(store).labels.values()) == [1] and read_standing(store).unsure == {}
    assert desk.progress() | {"answers": None} == {
        "done": 2, "total": 3, "skipped": 1, "waiting": 0, "mine": 2, "can_undo": True, "answers": None
    }  # fmt: skip
    assert desk.next([], None, 1)["items"] == []
    assert [name_of(item) for item in desk.next([], None, 1, again=True)["items"]] == [name_of(items[2])]


def test_a_second_opinion_is_of_another_person_and_begins_where_it_is_needed(tmp_path):
    store = night(tmp_path, flagged=4, drawn=1)
    ann = desk_of(store)
    answers = {
        "mon-0.jpg": "violating",
        "mon-1.jpg": "not violating",
        "mon-2.jpg": "unsure",
        "mon-4.jpg": "not violating",
    }
    for _ in range(5):
        go_by_name(ann, answers)
    bob = desk_of(store, reviewer="bob", kind="second")
    # Unsure, then where person and net disagree, then the others; what Ann could not see has no opinion to second.
    assert names_to_go(bob)[:2] == ["mon-2.jpg", "mon-1.jpg"] and set(names_to_go(bob)[2:]) == {
        "mon-0.jpg",
        "mon-4.jpg",
    }
    own = desk_of(store, kind="second")
    assert own.work.items == []
    # What stands in the terminal: whose decisions are left out, and how many.
    assert bob.work.in_words() == ("mon: 4 images to review, 0 decided; left out: 1 that no first review has judged")
    assert own.work.in_words() == (
        "mon: 0 images to review, 0 decided; left out: 4 that ann decided in another kind of review, "
        "1 that no first review has judged"
    )
    (item,) = bob.next([], None, 1)["items"]
    assert item["history"]["tests"][0]["outcome"] == "flagged" and item["history"]["decisions"] == []
    go(bob, "violating")
    last = bob.history_of_last()["history"]["decisions"]
    assert [(part["kind"], part["reviewer"], part["answer"]) for part in last] == [
        ("first", "ann", "unsure"), ("second", "bob", "violating")
    ]  # fmt: skip
    assert bob.progress()["done"] == 1 and bob.progress()["total"] == 4
    image = next(item.image_id for item in bob.work.items if item.uri.endswith("mon-2.jpg"))
    assert read_standing(store).labels[image, "gore"] == 1


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "two\nlines", "turned \u202e around"])
def test_a_reviewer_has_a_name_that_can_be_read(name):
    with pytest.raises(UsageError, match="1 to 64 printable characters"):
        check_reviewer(name)


def go_by_name(desk: Desk, answers: dict[str, str]) -> None:
    """Decides the next image as its name has it; what has no answer goes before it is looked at."""
    (item,) = desk.next([], None, 1)["items"]
    answer = answers.get(name_of(item), "not seen")
    if answer == "not seen":
        Path(item["name"].removeprefix("file://")).unlink()
    desk.picture(item["id"])
    desk.decide(item["id"], uuid4().hex, answer, ("gore",) if answer == "violating" else (), revealed=True)


def test_an_appeal_is_about_what_it_names_and_overrules(tmp_path):
    store = night(tmp_path, flagged=3, drawn=1)
    ann = desk_of(store)
    while ann.next([], None, 1)["items"]:
        go(ann, "violating")
    about = of_file(tmp_path / "source" / "mon-1.jpg")
    named = tmp_path / "appeals.txt"
    named.write_bytes(b"\xef\xbb\xbf" + f"{about['source_uri']}\r\n\r\n {about['image_id']}\r\n".encode())
    queue = read_queue(store, ("mon",))
    appealed = read_appeals(str(named), None, queue)
    assert [name_of(item.to_page()) for item in appealed] == ["mon-1.jpg"]
    assert appeal_by(store, "ann", "mon-1.jpg").work.in_words() == (
        "mon: 0 images to review, 0 decided; left out: 1 that ann decided in another kind of review"
    )
    cat = Desk(store, queue, PICTURES, kind="appeal", reviewer="cat", appealed=appealed)
    (item,) = cat.next([], None, 1)["items"]
    assert [part["reviewer"] for part in item["history"]["decisions"]] == ["ann"]
    go(cat, "not violating")
    assert read_standing(store).labels[about["image_id"], "gore"] == 0
    assert cat.next([], None, 1)["items"] == []


def test_every_line_that_names_no_image_is_said_at_once(tmp_path):
    store = night(tmp_path, flagged=2, drawn=0)
    good = of_file(tmp_path / "source" / "mon-1.jpg")["source_uri"].encode()
    named = tmp_path / "appeals.txt"
    named.write_bytes(b"\n".join([good, b"s3://b/x\x1b", b"", b"\xff", good, b"s3://b/y", b"caf\xe9"]))
    with pytest.raises(UsageError) as refused:
        read_appeals(str(named), None, read_queue(store, ("mon",)))
    assert str(refused.value) == (
        f"appeals {named}: 4 of 6 lines name no image to review; about nothing that mon flagged or drew (name the runs "
        "that did with --run-id, or take the lines out): line 2 's3://b/x\\\\x1b', line 6 's3://b/y'; "
        "no text in UTF-8 (save the file as such): line 4, line 7"
    )
    named.write_bytes(b" \n")
    with pytest.raises(UsageError, match="it names nothing"):
        read_appeals(str(named), None, read_queue(store, ("mon",)))


def test_an_appeal_that_was_left_unsure_is_open_for_somebody_else_until_it_has_an_answer(tmp_path):
    store = night(tmp_path, flagged=2, drawn=0)
    ann = desk_of(store)
    go(ann, "violating")
    go(ann, "not violating")
    with pytest.raises(UsageError, match="no appeal about what mon flagged or drew was left unsure: name the images"):
        appeal_by(store, "cat")
    go(appeal_by(store, "cat", "mon-0.jpg"), "unsure")
    image = of_file(tmp_path / "source" / "mon-0.jpg")["image_id"]
    assert read_standing(store).unsure == {image: "appeal"}
    # Not for Cat, who has said what she can. A second opinion would not overrule it, and the audit asks for none.
    assert (
        appeal_by(store, "cat").work.in_words()
        == "mon: 1 images to review, 1 decided, 1 of them unsure, for somebody else"
    )
    note = audit(read_evidence(store, ("mon",), read_standing(store)), 0.5, 0.95).notes[0]
    assert (
        "another appeal review settles 1 of them (jobs.review --run-id mon --kind appeal)" in note
        and "second" not in note
    )
    dan = appeal_by(store, "dan")
    (item,) = dan.next([], None, 1)["items"]
    said = [(part["reviewer"], part["answer"]) for part in item["history"]["decisions"]]
    assert said == [("ann", "violating"), ("cat", "unsure")]
    go(dan, "unsure")
    assert dan.next([], None, 1)["items"] == [] and dan.progress()["waiting"] == 1
    dan.undo(uuid4().hex)
    assert dan.progress()["waiting"] == dan.progress()["done"] == 0
    go(dan, "unsure")
    eve = appeal_by(store, "eve")
    go(eve, "not violating")
    assert eve.progress()["done"] == 1 and eve.progress()["waiting"] == 0
    assert read_standing(store).labels[image, "gore"] == 0 and read_standing(store).unsure == {}
    dan.refresh()
    assert dan.progress()["waiting"] == 0
    with pytest.raises(UsageError, match="was left unsure"):
        appeal_by(store, "fay")


def test_a_second_opinion_that_was_left_unsure_is_asked_for_again_and_first(tmp_path):
    store = night(tmp_path, flagged=3, drawn=0)
    ann = desk_of(store)
    for _ in range(3):
        go(ann, "violating")
    go_by_name(desk_of(store, reviewer="bob", kind="second"), {"mon-0.jpg": "unsure"})
    cat = desk_of(store, reviewer="cat", kind="second")
    assert names_to_go(cat)[0] == "mon-0.jpg" and len(names_to_go(cat)) == 3
    note = audit(read_evidence(store, ("mon",), read_standing(store)), 0.5, 0.95).notes[0]
    assert (
        "a second opinion settles 1 of them (jobs.review --run-id mon --kind second), by somebody who has not judged"
        in note
    )


# Pictures


def picture_of(path: Path, **limits: Any) -> Any:
    about = of_file(path)
    return Pictures(Preparation(**limits), None).show(about["source_uri"], about["etag"], about["size_bytes"])


def test_a_picture_has_its_shape_upright_within_bounds_and_without_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where it was taken"
    wide = Image.new("RGB", (3000, 1500), (200, 30, 30))
    wide.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (40, 10), (0, 0, 250, 255)).save(tmp_path / "small.png")
    shown = picture_of(tmp_path / "turned.jpg")
    turned = Image.open(io.BytesIO(shown.jpeg))
    assert (turned.format, turned.size) == ("JPEG", (SIDE // 2, SIDE)) and not turned.getexif()
    assert b"taken" not in shown.jpeg and len(shown.sha256) == 64
    small = Image.open(io.BytesIO(picture_of(tmp_path / "small.png").jpeg))
    assert small.size == (40, 10) and small.getpixel((20, 5))[2] > 240


HOSTILE = {
    "picture.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "page.jpg": b"<!doctype html><script>alert(1)</script>",
    "half.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "empty.png": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_never_leaves_the_server(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    shown = picture_of(tmp_path / name)
    assert shown.jpeg is None and shown.problem.startswith("It cannot be shown. ")


def test_limits_of_the_scan_hold_for_the_page(tmp_path):
    Image.new("RGB", (1200, 1000)).save(tmp_path / "large.png")
    assert picture_of(tmp_path / "large.png", max_megapixels=1).code == "too_many_pixels"


# Who reads the decisions


@pytest.fixture
def reviewed(tmp_path: Path) -> Store:
    """Eight flagged and six drawn images, decided but for one that was left unsure."""
    store = night(tmp_path, flagged=8, drawn=6, categories=("gore", "weapon"))
    desk = desk_of(store)
    for number in range(14):
        if number == 3:
            go(desk, "unsure")
        elif number % 2:
            go(desk, "violating", "gore")
        else:
            go(desk)
    return store


def test_an_audit_of_reviews_is_that_of_the_same_labels_in_a_file(reviewed, tmp_path):
    stands = read_standing(reviewed)
    rows = [{"image_id": image, "category": name, "label": label} for (image, name), label in stands.labels.items()]
    labels = tmp_path / "labels.parquet"
    labels.write_bytes(table_bytes(pa.Table.from_pylist(rows, schema.REVIEWS)))
    assert len(rows) == 26
    of_file_, of_folder = (
        audit(read_evidence(reviewed, ("mon",), found), 0.5, 0.95) for found in (stands.labels, stands)
    )
    assert of_folder.estimates == of_file_.estimates and of_folder.checks == of_file_.checks
    assert (
        of_folder.notes[0].startswith("1 images were reviewed and left unsure")
        and of_file_.notes[0] != of_folder.notes[0]
    )
    options = ("--output", str(tmp_path / "out"), "--run-id", "mon", "--recall-bound", "0.1")
    by_folder = run_here(audit_job, *options, "--labels-output", str(tmp_path / "search.parquet"))
    by_file = run_here(audit_job, *options, "--reviews", str(labels))
    assert (by_folder.returncode, by_file.returncode) == (0, 0), by_folder.stderr
    assert by_folder.stdout.splitlines()[:8] == by_file.stdout.splitlines()[:8]
    searched = pq.read_table(tmp_path / "search.parquet")
    assert searched.num_rows == 26 and searched.schema.equals(schema.LABELS)


def test_decisions_on_images_of_other_runs_and_plans_are_no_part_of_an_audit(reviewed, tmp_path):
    about = of_file(draw(tmp_path / "other.jpg", 5000))
    write_run(reviewed, "tue", [flagged_row(about, "tue", "gore", 0.7)], categories=("gore",))
    go(desk_of(reviewed, "tue"), "violating")
    assert len(read_evidence(reviewed, ("mon",), read_standing(reviewed)).labels) == 26
    assert read_evidence(reviewed, ("tue",), read_standing(reviewed)).labels == {(about["image_id"], "gore"): 1}
    write_run(reviewed, "thu", [flagged_row(about, "thu", "gore", 0.6)], categories=("gore",))
    assert desk_of(reviewed, "thu").progress()["done"] == 1  # decided on Tuesday
    # The same image under a plan that looks for more: half of an answer is none, and it is asked for again.
    rows = [flagged_row(about, "wed", "weapon", 0.7)]
    write_run(reviewed, "wed", rows, categories=("gore", "weapon"))
    assert read_evidence(reviewed, ("wed",), read_standing(reviewed)).labels == {}
    assert desk_of(reviewed, "wed").progress()["done"] == 0
    reviewed.delete(list(reviewed.sizes("reviews/_leases")))  # Tuesday's runs for some minutes still
    go(desk_of(reviewed, "wed"), "violating", "weapon")
    assert read_evidence(reviewed, ("wed",), read_standing(reviewed)).labels == {
        (about["image_id"], "gore"): 0, (about["image_id"], "weapon"): 1
    }  # fmt: skip


def test_calibration_searches_with_reviews_and_never_certifies_with_them(reviewed, tmp_path):
    folder = str(tmp_path / "out" / "reviews")
    uris, known_NK, _ = read_known((folder,), ("gore", "weapon"))
    stands = read_standing(reviewed).labels
    assert len(uris) == 13 and known_NK[:, 0].sum() == sum(
        label for (_, name), label in stands.items() if name == "gore"
    )
    assert read_known((folder + "/",), ("gore",))[1].shape == (13, 1)
    with pytest.raises(UsageError, match="certify nothing; give them as --search-labels"):
        CalibrateConfig(labels=(folder,), models=("emblem",))
    with pytest.raises(UsageError, match=r"no decision in it gives a label of \['hate'\]"):
        read_known((folder,), ("hate",))


def test_queries_see_every_decision_and_which_stands(reviewed, tmp_path):
    bob = desk_of(reviewed, reviewer="bob", kind="second")
    go(bob, "violating", "weapon")  # of what was left unsure
    go(bob, "violating", "weapon")  # where Ann and the nets disagree
    sql = (
        "SELECT count(*) AS rows, count(*) FILTER (stands) AS stand, count(*) FILTER (disputed) AS disputed, "
        "count(DISTINCT decision_id) AS made, count(*) FILTER (stands AND kind = 'second') AS second FROM reviews"
    )
    answer = run_here(query_job, sql, "--output", str(tmp_path / "out"), "--format", "json")
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    assert (said["rows"], said["stand"], said["made"], said["second"]) == (32, 28, 16, 4)
    # Two decisions in two categories: they differ at least in the one that Bob names, for Ann never named it.
    assert said["disputed"] in (2, 4)


def in_words(store: Store, key: str) -> str:
    body = store.read(key)
    return str(pq.read_table(io.BytesIO(body)).to_pylist()) if key.endswith(".parquet") else body.decode()


def test_an_erasure_reaches_decisions_and_leases(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        draw(source / f"{number}.jpg", number)
    plan = small_plan(tmp_path, QUICK, audit={"rate": 1, "near_rate": 1})
    scan_by_hand(source, str(tmp_path / "out"), plan, "mon", lambda name: "flagged" if name < "3" else "cleared")
    store = Store(str(tmp_path / "out"))
    desk = desk_of(store)
    for number in range(6):
        go(desk, "violating" if number % 2 else "not violating")
    gone = of_file(source / "1.jpg")
    before = pq.read_table(tmp_path / "out" / "reviews").to_pylist()
    options = ("--output", str(tmp_path / "out"), "--uri", gone["source_uri"])
    assert [key for key in store.sizes("reviews/_leases") if gone["image_id"] in key]
    dry = run_here(erase_job, *options, "--dry-run")
    assert dry.returncode == 0 and dry.stdout.count("reviews/review_date=") == 1, dry.stderr
    assert len(review_files(store)) == 6
    done = run_here(erase_job, *options)
    assert done.returncode == 0, done.stderr
    after = pq.read_table(tmp_path / "out" / "reviews").to_pylist()
    assert after == [row for row in before if row["image_id"] != gone["image_id"]] and len(after) == 5
    assert [key for key in store.sizes("") if gone["image_id"] in key + in_words(store, key)] == []
    (log,) = store.sizes("erasures")
    assert b"reviews/review_date=" in store.read(log)
    assert desk_of(store).progress()["total"] == 5
    # What is left of a run that is gone is found as well, and a file that somebody merged keeps its other rows.
    store.delete(list(store.sizes("")))
    merged = table_bytes(pa.Table.from_pylist(after, schema.DECISIONS))
    store.write("reviews/review_date=2026-01-01/merged.parquet", merged)
    uri = after[0]["source_uri"]
    assert run_here(erase_job, "--output", str(tmp_path / "out"), "--uri", uri).returncode == 0
    kept = pq.read_table(tmp_path / "out" / "reviews")["decision_id"].to_pylist()
    assert kept == [row["decision_id"] for row in after if row["source_uri"] != uri] and len(kept) == 4


def test_a_file_among_the_reviews_that_is_none_is_named(reviewed):
    reviewed.write("reviews/review_date=2026-01-01/notes.parquet", b"not Parquet")
    with pytest.raises(UsageError, match=r"notes\.parquet is no file of reviews: .*; take it away"):
        desk_of(reviewed)


def test_a_night_in_a_bucket_is_reviewed_by_two(s3_endpoint, tmp_path):
    """Conditional PUTs, listings and pictures as an S3 server has them."""
    client = s3_client(s3_endpoint)
    client.create_bucket(Bucket="reviewed")
    rows = []
    for number in range(4):
        body = draw(tmp_path / f"{number}.jpg", number).read_bytes()
        etag = client.put_object(Bucket="reviewed", Key=f"in//{number}.jpg", Body=body)["ETag"].strip('"')
        uri = f"s3://reviewed/in//{number}.jpg"
        about = {"image_id": image_id(uri, etag), "source_uri": uri, "etag": etag, "size_bytes": len(body)}
        rows.append(flagged_row(about, "mon", "gore", 0.9 - number / 10))
    store = Store("s3://reviewed/out", s3_endpoint)
    write_run(store, "mon", rows)
    queue = read_queue(store, (newest_run(store),))
    pictures = Pictures(queue.limits, s3_endpoint)
    ann, bob = (Desk(store, queue, pictures, kind="first", reviewer=name) for name in ("ann", "bob"))
    for desk in (ann, bob, ann, bob):
        go(desk, "violating")
        ann.refresh()
        bob.refresh()
    assert ann.next([], None, 1)["items"] == bob.next([], None, 1)["items"] == []
    assert {image for image, _ in read_standing(store).labels} == {row["image_id"] for row in rows}
    client.put_object(Bucket="reviewed", Key="in//0.jpg", Body=b"another")
    assert "another one than was scanned" in (pictures.show(rows[0]["source_uri"], rows[0]["etag"], None).problem or "")
    sql = "SELECT reviewer, count(*) AS decisions FROM reviews WHERE stands GROUP BY ALL ORDER BY ALL"
    answer = run_here(query_job, sql, "--output", store.uri, "--endpoint-url", s3_endpoint, "--format", "csv")
    assert answer.stdout.splitlines() == ["reviewer,decisions", "ann,2", "bob,2"], answer.stderr
