"""The commit protocol on a local store, without Ray: what is committed once stays, what does not add up is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.flow import window_refs
from pipeline.listing.manifest import build_manifest
from pipeline.output import commit
from pipeline.output.commit import Ledger
from pipeline.output.sink import Sink
from pipeline.output.tally import SECONDS, Tally, stage_rows
from pipeline.plan import Preparation, WindowSpec, parse_plan
from pipeline.steps.fetch import Fetcher
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.window import GroupTest, Image, Window, Work, windows_from_table, windows_to_table
from tests.test_plan import content

PLAN = parse_plan(content(window={"images": 16}), "test")


class Run:
    """A run of ``images`` images in shards of ``shard_size``, whose windows are decided by hand."""

    def __init__(
        self, output, images: int = 80, shard_size: int = 32, salt: str = "s", endpoint: str | None = None
    ) -> None:
        self.output = str(output)
        self.store = Store(self.output, endpoint)
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        rows = [{"uri": f"s3://b/{i}", "size_bytes": 1, "etag": "e", "modified_at": moment} for i in range(images)]
        self.manifest = build_manifest(
            rows, self.store, "_state/r/manifest", salt=salt, window=WindowSpec(images=16), shard_size=shard_size
        )
        self.sink = Sink(self.store, commit.attempts_prefix("r"), "r", PLAN, {"one": ("m@1", "d")}, salt)

    def ledger(self) -> Ledger:
        return Ledger(self.store, "r", "2026-01-01", list(self.manifest.shards))

    def windows(self) -> list[Window]:
        windows = []
        for ref in window_refs(self.store, list(self.manifest.shards)).to_pylist():
            table = pq.read_table(pa.BufferReader(self.store.read(ref["key"]))).slice(ref["first_row"], ref["rows"])
            images = [Image(image_id=row["image_id"], uri=row["uri"]) for row in table.to_pylist()]
            for number, image in enumerate(images):
                image.tests.append(GroupTest(stage="one", round=1, group_id="g", group_size=4, scores=[0.7]))
                if number == 3:
                    image.fail("truncated", "half a file")
                else:
                    image.decide("flagged" if number == 5 else "cleared")
            work = [Work(operator="one", round=0, images_in=len(images), tests=1, gmac=2.0)]
            first = table["ordinal"][0].as_py()
            windows.append(
                Window(shard=ref["shard"], window=ref["window"], first_ordinal=first, images=images, work=work)
            )
        return windows

    def receipts(self, windows: list[Window]) -> list[dict]:
        return self.sink(windows)

    def table(self, name: str) -> pa.Table:
        """What a reader of the whole folder sees."""
        bodies = [self.store.read(key) for key in sorted(self.store.sizes(f"{name}/scan_date=2026-01-01"))]
        return pa.concat_tables([pq.read_table(pa.BufferReader(body)) for body in bodies])


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


@pytest.fixture(params=["folder", "bucket"])
def anywhere(request, tmp_path) -> Run:
    """In a folder, where what is published is never replaced, and in a bucket, where it could be."""
    if request.param == "folder":
        return Run(tmp_path)
    endpoint = request.getfixturevalue("s3_endpoint")
    s3_client(endpoint).create_bucket(Bucket="commits")
    return Run(f"s3://commits/{tmp_path.name}", endpoint=endpoint)


def test_shards_are_committed_as_soon_as_their_windows_are_there(run):
    ledger = run.ledger()
    receipts = [receipt for window in run.windows() for receipt in run.receipts([window])]
    committed = [ledger.add(receipt) for receipt in reversed(receipts)]
    assert [shard.index if shard else None for shard in committed] == [2, None, 1, None, 0]
    assert ledger.pending == [] and ledger.tally.outcomes == {"cleared": 70, "flagged": 5, "error": 5, "skipped": 0}
    assert run.table("ledger").num_rows == 80 and run.table("flagged").num_rows == 5
    assert ledger.tally.errors == {"truncated": 5}
    assert stage_rows(ledger.tally, PLAN)[0]["tests"] == 5


def test_windows_of_several_shards_in_one_call_make_a_receipt_each(run):
    ledger = run.ledger()
    receipts = run.receipts(run.windows())
    assert [(receipt["shard"], len(receipt["windows"])) for receipt in receipts] == [(0, 2), (1, 2), (2, 1)]
    assert all(ledger.add(receipt) for receipt in receipts)


def test_an_attempt_that_comes_twice_counts_once(run):
    ledger = run.ledger()
    windows = run.windows()
    (first,) = run.receipts(windows[:1])
    (again,) = run.receipts(windows[:1])
    (second,) = run.receipts(windows[1:2])
    assert ledger.add(first) is None and ledger.add(again) is None
    assert ledger.add(second).index == 0
    assert ledger.add(again) is None
    assert ledger.tally.listed == 32 == run.table("ledger").num_rows


def test_a_shard_that_lost_a_row_is_not_committed(run):
    ledger = run.ledger()
    windows = run.windows()
    windows[0].images.pop()
    first, second = run.receipts(windows[:1]) + run.receipts(windows[1:2])
    assert ledger.add(first) is None
    with pytest.raises(RunError, match="32 images listed, 31 ledger rows"):
        ledger.add(second)
    assert not list(run.store.sizes("_state/r/markers")) and not list(run.store.sizes("ledger"))


def test_a_shard_with_an_image_of_another_is_not_committed(run):
    ledger = run.ledger()
    windows = run.windows()
    windows[0].images[0].image_id = "f" * 32
    (receipt,) = run.receipts(windows[:2])
    with pytest.raises(RunError, match="does not list"):
        ledger.add(receipt)


def test_an_image_without_an_outcome_never_reaches_a_table(run):
    windows = run.windows()
    windows[0].images[0].outcome = None
    with pytest.raises(AssertionError, match="without an outcome"):
        run.receipts(windows)


def test_a_second_driver_takes_over_and_the_first_stops_at_its_next_commit(run):
    old = run.ledger()
    receipts = run.receipts(run.windows())
    old.add(receipts[0])
    new = run.ledger()
    assert [shard.index for shard in new.pending] == [1, 2] and new.tally.listed == 32
    with pytest.raises(RunError, match="taken over by another driver"):
        old.add(receipts[1])
    for receipt in receipts[1:]:
        new.add(receipt)
    assert new.pending == [] and run.table("ledger").num_rows == 80


def test_a_marker_decides_between_two_drivers_and_the_current_one_goes_on(run, monkeypatch):
    old, new = run.ledger(), run.ledger()
    monkeypatch.setattr(old, "check_epoch", lambda: None)  # it had passed the check when the other took over
    assert old.add(run.receipts(run.windows())[0]).index == 0
    before = {path: run.store.read(path) for path in run.store.sizes("ledger")}
    assert new.add(run.receipts(run.windows())[0]).index == 0
    assert {path: run.store.read(path) for path in run.store.sizes("ledger")} == before
    assert new.files == old.files and new.tally == old.tally
    monkeypatch.undo()
    with pytest.raises(RunError, match="taken over by another driver"):
        old.add(run.receipts(run.windows())[1])


def test_a_put_that_went_through_unheard_is_not_a_rival(run, monkeypatch):
    ledger = run.ledger()
    create = Store.create
    monkeypatch.setattr(Store, "create", lambda self, key, body: create(self, key, body) and create(self, key, body))
    assert ledger.add(run.receipts(run.windows())[0]).index == 0


def test_an_outage_fails_the_run_instead_of_completing_it(run):
    windows = run.windows()[:2]
    for window in windows:
        for image in window.images[:12]:
            image.outcome, image.error_code, image.error_detail = "error", "fetch_denied", "403"
    ledger = Ledger(run.store, "r", "2026-01-01", list(run.manifest.shards), max_outage=0.5)
    (receipt,) = run.receipts(windows)
    with pytest.raises(RunError, match=r"24 fetch_denied of 32 images, over the limit of 0\.5"):
        ledger.add(receipt)
    assert not list(run.store.sizes("_state/r/markers"))


def test_a_driver_that_died_between_marker_and_tables_is_finished_by_the_next(run, monkeypatch):
    ledger = run.ledger()
    receipts = run.receipts(run.windows())
    monkeypatch.setattr(Ledger, "_publish", lambda self, files: None)
    ledger.add(receipts[0])
    monkeypatch.undo()
    assert not list(run.store.sizes("ledger"))
    resumed = run.ledger()
    assert run.table("ledger").num_rows == 32 and run.table("flagged").num_rows == 2
    assert [shard.index for shard in resumed.pending] == [1, 2]
    untouched = {path: run.store.read(path) for path in run.store.sizes("ledger")}
    run.ledger()
    assert {path: run.store.read(path) for path in run.store.sizes("ledger")} == untouched


def test_a_run_is_frozen_once(run):
    commit.freeze(run.store, "r", {"a": 1})
    with pytest.raises(ValueError, match="started by another driver"):
        commit.freeze(run.store, "r", {"a": 2})
    assert commit.read_frozen(run.store, "r") == {"a": 1}


def test_windows_survive_the_way_through_arrow(run):
    for before, after in zip(run.windows(), windows_from_table(windows_to_table(run.windows())), strict=True):
        assert len(before.images) == len(after.images)
        for mine, theirs in zip(before.images, after.images, strict=True):
            assert (mine.image_id, mine.outcome, mine.error_code) == (
                theirs.image_id,
                theirs.outcome,
                theirs.error_code,
            )
            assert [test.scores for test in theirs.tests] == [pytest.approx(test.scores) for test in mine.tests]
        assert after.work == before.work


WORK = st.fixed_dictionaries(
    {
        "operator": st.sampled_from(["one", "fetch"]),
        "round": st.sampled_from([None, 0, 1]),
        **{
            name: st.integers(0, 9)
            for name in ("images_in", "tests", "positive_tests", "images_out", "gmac", *SECONDS, "bursts")
        },
    }
)
TALLY = st.builds(
    lambda outcomes, errors, work: Tally.from_json({"outcomes": outcomes, "errors": errors, "work": work}),
    st.dictionaries(st.sampled_from(["cleared", "flagged", "error", "skipped"]), st.integers(0, 99)),
    st.dictionaries(st.sampled_from(["truncated", "empty"]), st.integers(0, 99)),
    st.lists(WORK, max_size=6),
)


@settings(max_examples=60)
@given(st.lists(TALLY, max_size=6), st.randoms())
def test_counts_merge_in_any_order(tallies, random):
    def total(parts: list[Tally]) -> Tally:
        result = Tally()
        for part in parts:
            result.add(part)
        return result

    shuffled = random.sample(tallies, len(tallies))
    assert total(tallies) == total(shuffled)
    halves = [total(tallies[:2]), total(tallies[2:])]
    assert total(halves) == total(tallies)
    assert Tally.from_json(json.loads(json.dumps(total(tallies).to_json()))) == total(tallies)


@pytest.mark.parametrize("damaged", ["flagged", "errors"])
@pytest.mark.parametrize("damage", ["other ids", "rows twice", "other rows twice"])
def test_tables_of_the_right_length_with_the_wrong_rows_are_never_marked(run, damage, damaged, monkeypatch):
    merge = Ledger._merge

    def merge_wrongly(self: Ledger, name: str, receipts: list[dict]) -> pa.Table:
        table = merge(self, name, receipts)
        if name != damaged:
            return table
        if damage == "other ids":
            ids = pa.array(["f" * 31 + str(place) for place in range(table.num_rows)])
            return table.set_column(table.column_names.index("image_id"), "image_id", ids)
        if damage == "rows twice":
            return pa.concat_tables([table, table])
        return pa.concat_tables([table.slice(1), table.slice(1)])

    monkeypatch.setattr(Ledger, "_merge", merge_wrongly)
    with pytest.raises(RunError, match=r"or others|holds rows twice"):
        run.ledger().add(run.receipts(run.windows())[0])
    assert not run.store.sizes("_state/r/markers")


def test_a_marker_of_another_manifest_is_not_taken_for_this_runs(run, tmp_path):
    run.ledger().add(run.receipts(run.windows())[0])
    other = Run(tmp_path, salt="another")
    with pytest.raises(RunError, match=r"shard-00000.json was made for another manifest: .* give another --run-id"):
        other.ledger()


def test_a_start_whose_answer_was_lost_is_no_rival(run, monkeypatch):
    create = Store.create
    epochs = iter([False])  # the first of them is heard at its second try only

    def create_unheard(self: Store, key: str, body: bytes) -> bool:
        created = create(self, key, body)
        return created and "/epochs/" in key and next(epochs, True)

    monkeypatch.setattr(Store, "create", create_unheard)
    commit.freeze(run.store, "r", {"shards": [1, 2], "scan_date": "x"})
    ledger = run.ledger()
    for receipt in run.receipts(run.windows()):
        ledger.add(receipt)
    assert ledger.complete({"driver": 1}) == {"driver": 1}


def same_rows(ledger: Ledger, run: Run) -> tuple:
    """What a run has published, whoever wrote it and when, and however long that took."""
    tables = [run.table("ledger").sort_by("ordinal")]
    tables += [run.table(name).drop_columns(["scanned_at"]).sort_by("image_id") for name in ("flagged", "errors")]
    ledger.tally.work["write", None]["seconds"] = 0.0
    return *(table.to_pylist() for table in tables), ledger.tally


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_however_windows_arrive_the_tables_are_the_same(tmp_path_factory, data):
    straight, shuffled = Run(tmp_path_factory.mktemp("a")), Run(tmp_path_factory.mktemp("b"))
    expected = straight.ledger()
    for receipt in straight.receipts(straight.windows()):
        expected.add(receipt)

    # Calls of some windows of any shard, in any order, some of them made twice.
    windows = data.draw(st.permutations(shuffled.windows()))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(windows) - 1))))
    calls = [windows[start:end] for start, end in zip([0, *cuts], [*cuts, len(windows)], strict=True)]
    receipts = [receipt for call in calls for receipt in shuffled.receipts(call)]
    again = data.draw(st.lists(st.sampled_from(range(len(calls))), max_size=3))
    receipts += [receipt for index in again for receipt in shuffled.receipts(calls[index])]
    ledger = shuffled.ledger()
    for receipt in data.draw(st.permutations(receipts)):
        ledger.add(receipt)
    assert ledger.pending == []
    assert same_rows(ledger, shuffled) == same_rows(expected, straight)


def _lose(images: list[Image], place: int) -> None:
    del images[place]


def _double(images: list[Image], place: int) -> None:
    images.append(images[place])


def _take_anothers_name(images: list[Image], place: int) -> None:
    images[place].image_id = images[place - 1].image_id


def _invent(images: list[Image], place: int) -> None:
    images[place].image_id = "0" * 32


@settings(max_examples=40, deadline=None)
@given(
    damage=st.sampled_from([_lose, _double, _take_anothers_name, _invent]),
    window=st.integers(0, 4),
    place=st.integers(0, 15),
)
def test_a_shard_that_does_not_add_up_is_never_marked(tmp_path_factory, damage, window, place):
    run = Run(tmp_path_factory.mktemp("damaged"))
    windows = run.windows()
    damage(windows[window].images, place)
    ledger = run.ledger()
    refused = []
    for receipt in run.receipts(windows):
        try:
            ledger.add(receipt)
        except RunError:
            refused.append(receipt["shard"])
    assert refused == [windows[window].shard]
    assert windows[window].shard not in run.ledger().done
    assert len(run.store.sizes("_state/r/markers")) == 2


@pytest.mark.parametrize("table", ["flagged", "errors"])
def test_a_verdict_without_its_row_is_never_marked(run, table, monkeypatch):
    merge = Ledger._merge
    monkeypatch.setattr(
        Ledger, "_merge", lambda self, name, receipts: merge(self, name, receipts).slice(int(name == table))
    )
    with pytest.raises(RunError, match=f"table {table} holds 1"):
        run.ledger().add(run.receipts(run.windows())[0])
    assert not run.store.sizes("_state/r/markers")


def test_an_attempt_that_was_changed_on_its_way_is_not_believed(run):
    ledger = run.ledger()
    (receipt,) = run.receipts(run.windows()[:2])
    path = f"{receipt['attempt']}/ledger.parquet"
    body = bytearray(run.store.read(path))
    body[len(body) // 2] ^= 1
    run.store.write(path, bytes(body))
    with pytest.raises(OSError, match="what came is not what was written"):
        ledger.add(receipt)
    assert not run.store.sizes("_state/r/markers")


def test_a_manifest_that_was_changed_on_its_way_is_not_believed(run):
    ledger, shard = run.ledger(), run.manifest.shards[0]
    receipts = run.receipts(run.windows())
    (ref, *_) = window_refs(run.store, list(run.manifest.shards)).to_pylist()
    body = bytearray(run.store.read(shard.key))
    body[len(body) // 2] ^= 1
    run.store.write(shard.key, bytes(body))
    with pytest.raises(OSError, match="what came is not what was written"):
        ledger.add(receipts[0])
    with pytest.raises(OSError, match="what came is not what was written"):
        Fetcher(run.store, None, Preparation())([ref])
    with pytest.raises(OSError, match="what came is not what was written"):
        window_refs(run.store, [shard])
    assert not run.store.sizes("_state/r/markers")


def test_whoever_goes_on_leaves_committed_tables_alone_even_when_somebody_has_changed_them(anywhere):
    receipts = anywhere.receipts(anywhere.windows())
    anywhere.ledger().add(receipts[0])
    (path,) = anywhere.store.sizes("flagged")
    edited = bytes(reversed(anywhere.store.read(path)))
    anywhere.store.write(path, edited)
    before = anywhere.store.objects("ledger") | anywhere.store.objects("flagged")
    later = anywhere.ledger()
    for receipt in receipts[1:]:
        later.add(receipt)
    after = anywhere.store.objects("ledger") | anywhere.store.objects("flagged")
    assert len(after) == 6 and {key: after[key] for key in before} == before
    assert anywhere.store.read(path) == edited


def test_a_table_that_somebody_has_changed_is_not_written_over(run):
    run.ledger().add(run.receipts(run.windows())[0])
    (path,) = run.store.sizes("flagged")
    run.store.write(path, b"edited")
    with pytest.raises(RunError, match=r"flagged/.* has 6 bytes, its marker says [\d,]+: somebody has changed it"):
        run.ledger()
    assert run.store.read(path) == b"edited"
    run.store.delete([path])
    run.ledger()
    assert run.table("flagged").num_rows == 2


def test_a_run_record_is_created_once(run):
    first, second = run.ledger(), run.ledger()
    for receipt in run.receipts(run.windows()):
        second.add(receipt)
    with pytest.raises(AssertionError):
        first.complete({"driver": 1})  # its shards are not done
    first.done = second.done
    with pytest.raises(RunError, match="taken over"):
        first.complete({"driver": 1})
    assert second.complete({"driver": 2}) == {"driver": 2} == second.complete({"driver": 3})
    assert commit.read_json(run.store, "runs/r.json") == {"driver": 2}
