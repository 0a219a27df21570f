"""Decisions of a day in one file: nothing is lost or doubled, wherever a merge ends and whoever reads or erases."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs import compact as job
from pipeline.errors import RunError, StoreError
from pipeline.review import decisions, leases
from pipeline.review.decisions import file_key, read_all, read_standing, review_files, write_decision
from pipeline.review.leases import LEASE_SECONDS, alone
from pipeline.review.log import ReviewLog, rows_of
from pipeline.store import Store
from pipeline.tables.compact_reviews import compact_reviews
from pipeline.tables.erase import Subject, erase
from pipeline.tables.sql import open_tables, sql_session
from tests.outputs import run_here
from tests.review_pages import flagged_row, write_run
from tests.test_jobs import expect

IMAGES = [f"{number:032x}" for number in range(6)]


def decided(image: str, at: datetime, answer: str = "violating", **values: Any) -> list[dict[str, Any]]:
    """Rows of a decision in two categories."""
    rows = rows_of(
        decision_id=hashlib.md5(f"{image}{at}".encode()).hexdigest(), kind="first", reviewer="ann",
        item_rows={"run_id": "mon", "image_id": image, "source_uri": f"s3://b/{image}"}, categories=("gore", "weapon"),
        answer=answer, violating=("gore",) if answer == "violating" else (), revealed=True, sha256="0" * 64,
    )  # fmt: skip
    return [row | {"decided_at": at} | values for row in rows]


def days_ago(days: int, minute: int) -> datetime:
    return datetime.now(UTC).replace(hour=12, minute=minute, microsecond=0) - timedelta(days=days)


@pytest.fixture
def store(tmp_path) -> Store:
    """A run over six images; a day with four decisions, one of them taken back; another with two; and yesterday."""
    store = Store(str(tmp_path / "out"))
    about = [{"image_id": image, "source_uri": f"s3://b/{image}", "etag": "1", "size_bytes": 1} for image in IMAGES]
    write_run(store, "mon", [flagged_row(row, "mon", "gore", 0.9) for row in about], categories=("gore", "weapon"))
    for place, (days, image) in enumerate(zip((9, 9, 9, 5, 5, 1), IMAGES, strict=True)):
        write_decision(store, decided(image, days_ago(days, place), "violating" if place % 2 else "not violating"))
    taken_back = decided(IMAGES[0], days_ago(9, 0))[0]["decision_id"]
    withdrawn = {"withdraws": taken_back, "decision": "withdrawn", "label": None}
    write_decision(store, decided(IMAGES[0], days_ago(9, 30), **withdrawn))
    return store


def seen(store: Store) -> tuple[Any, ...]:
    """What each reader makes of the decisions: audits, the page, queries."""
    log = ReviewLog(store)
    with sql_session(open_tables(store)) as session:
        rows = session.sql("FROM reviews ORDER BY ALL").to_arrow_table().to_pylist()
    table, _ = read_all(store)
    in_words = sorted(map(str, table.to_pylist()))
    return read_standing(store), {image: log.on(image) for image in IMAGES}, rows, in_words


def files_by_day(store: Store) -> list[int]:
    days = [key.split("/")[1] for key in review_files(store)]
    return [days.count(day) for day in sorted(set(days))]


def test_each_old_day_becomes_one_file_with_the_same_rows(store, tmp_path):
    before = seen(store)
    assert len(before[0].labels) == 10 and len(before[2]) == 14 and files_by_day(store) == [4, 2, 1]
    done = run_here(job, "--output", store.name)
    assert done.returncode == 0, done.stderr
    assert "reviews: 6 files with 6 decisions, now 2, one a day" in done.stdout
    assert seen(store) == before and files_by_day(store) == [1, 1, 1]
    files = review_files(store)
    again = run_here(job, "--output", store.name)
    assert again.returncode == 0 and "reviews" not in again.stdout and review_files(store) == files
    assert store.sizes("reviews/_leases") == {}
    # A decision that comes late to such a day, by a clock that is wrong, is merged too.
    write_decision(store, decided(IMAGES[1], days_ago(9, 50), "unsure"))
    late = seen(store)
    (merged,) = compact_reviews(store)
    assert (merged.files_before, merged.decisions) == (2, 5) and seen(store) == late != before


def cut(patch: pytest.MonkeyPatch, after: int, *, heard: bool) -> Iterator[None]:
    """Lets that many changes of the store through; the next one fails, done or not."""
    left = [after]

    def counted(name: str) -> Any:
        real = getattr(Store, name)

        def change(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0 and heard:
                raise StoreError("cut off")
            answer = real(*arguments)
            if left[0] < 0:
                raise StoreError("cut off")
            return answer

        return change

    for name in ("create", "write", "delete"):
        patch.setattr(Store, name, counted(name))
    return left


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("after", range(6))
def test_wherever_a_merge_ends_every_reader_sees_each_decision_once(store, monkeypatch, after, heard):
    before = seen(store)
    with monkeypatch.context() as patch:
        left = cut(patch, after, heard=heard)
        with suppress(StoreError):
            compact_reviews(store)
    assert left[0] < 0, "this is cut off after its end"
    assert seen(store) == before
    store.delete(list(store.sizes("reviews/_leases")))  # runs out by itself
    compact_reviews(store)
    assert seen(store) == before and files_by_day(store) == [1, 1, 1]


def test_who_listed_files_before_they_were_merged_finds_their_rows(store, monkeypatch):
    before = seen(store)
    listed = decisions.review_files
    merges = [lambda: compact_reviews(store)]

    def list_then_merge(*arguments: Any) -> list[str]:
        keys = listed(*arguments)
        if merges:
            merges.pop()()
        return keys

    with monkeypatch.context() as patch:
        patch.setattr(decisions, "review_files", list_then_merge)
        table, keys = read_all(store)
    assert merges == [] and sorted(map(str, table.to_pylist())) == before[3]
    assert keys > set(review_files(store))


def test_a_file_that_is_gone_for_good_is_no_reason_to_look_for_ever(store, monkeypatch):
    (lost, *_) = review_files(store)
    monkeypatch.setattr(decisions, "review_files", lambda _: [lost, *review_files(store)])
    store.delete([lost])
    assert len(read_all(store)[0]) == 12


def test_an_erasure_and_a_merge_keep_each_other_out(store):
    subject = Subject(image_ids=(IMAGES[1],))
    store.delete([key for key in store.sizes("") if not key.startswith("reviews/")])  # runs need more than rows
    before = review_files(store)
    words = "decisions are being merged or erased by another job at this moment: run this again"
    with alone(store, "decisions"):
        with pytest.raises(RunError, match=words):
            erase(store, subject, dry_run=False)
        assert review_files(store) == before and not store.sizes("erasures")
        assert erase(store, subject, dry_run=True)  # changes nothing, so it waits for nobody
        expect(run_here(job, "--output", store.name), 1, words)
    compact_reviews(store)
    erase(store, subject, dry_run=False)
    table, _ = read_all(store)
    assert IMAGES[1] not in table["image_id"].to_pylist() and len(table) == 12


def test_who_was_killed_is_in_nobodys_way_for_long_and_who_slept_stops(store):
    clock = [leases.now()]
    with alone(store, "decisions", lambda: clock[0]) as hold:
        clock[0] += timedelta(seconds=LEASE_SECONDS - 1)
        hold()  # and so for as long again
        clock[0] += timedelta(seconds=LEASE_SECONDS - 1)
        with pytest.raises(RunError), alone(store, "decisions", lambda: clock[0]):
            pass
        clock[0] += timedelta(seconds=2)
        with alone(store, "decisions", lambda: clock[0]), pytest.raises(RunError, match="at this moment"):
            hold()


def test_a_decision_that_was_sent_twice_counts_once(store):
    (first, *_) = review_files(store)
    rows = decided(IMAGES[5], days_ago(1, 5))
    write_decision(store, [row | {"decided_at": days_ago(1, 6)} for row in rows])
    assert first and file_key(rows[0]["decision_id"], days_ago(1, 6)) in review_files(store)
    assert len(read_all(store)[0]) == 14
    assert [decision.categories for decision in ReviewLog(store).on(IMAGES[5])] == [("gore",)]
