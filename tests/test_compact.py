"""Few files for many: the same rows by record at every moment, wherever a compaction ends and whoever comes between."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import compact as job
from pipeline import schema
from pipeline.errors import RunError, StoreError, UsageError
from pipeline.output import commit
from pipeline.past.retry import list_failed, read_parent
from pipeline.review.evidence import read_evidence
from pipeline.review.leases import LEASES
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.storage import s3_client, storage_errors_as_failure
from pipeline.store import Store, digest
from pipeline.tables.clean import find_litter
from pipeline.tables.compact import compact, pack, runs_to_compact
from pipeline.tables.erase import Subject, erase
from tests.conftest import QUICK, small_plan
from tests.faults import Faults, fault_proxy
from tests.outputs import run_here, scan_by_hand
from tests.test_custody import age
from tests.test_jobs import expect

CHANGES = ("write", "publish", "replace", "delete")
"""The ways in which anything in a store changes."""


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> Path:
    """A folder with ``source`` and ``out``: 40 files in three shards, of which three are flagged and two are errors."""
    folder = tmp_path_factory.mktemp("compact")
    (folder / "source").mkdir()
    for number in range(40):
        (folder / "source" / f"{number:02}.jpg").write_bytes(b"a picture" * number)
    plan = small_plan(folder, QUICK, audit={"rate": 1.0, "near_rate": 1.0})
    special = {
        "03.jpg": "flagged",
        "14.jpg": "flagged",
        "25.jpg": "flagged",
        "04.jpg": "truncated",
        "05.jpg": "fetch_timeout",
    }
    scan_by_hand(
        folder / "source", f"{folder}/out", plan, "r", lambda name: special.get(name, "cleared"), shard_size=16
    )
    return folder


@pytest.fixture
def store(scanned, tmp_path) -> Store:
    shutil.copytree(scanned / "out", tmp_path / "out")
    return Store(str(tmp_path / "out"))


def rows(store: Store, run_id: str = "r") -> dict[str, list[dict]]:
    """What a reader by record sees: every file it names is there and is what it says."""
    record = commit.read_json(store, commit.record_key(run_id))
    seen: dict[str, list[dict]] = {}
    for table, order in schema.SORT_KEYS.items():
        files = commit.files_of(table, record["files"])
        tables = [pq.read_table(io.BytesIO(store.read(file["path"], file["sha256"]))) for file in files]
        assert [len(body) for body in tables] == [file["rows"] for file in files]
        seen[table] = pa.concat_tables(tables).sort_by(order).to_pylist()
    return seen


def in_tables(store: Store) -> set[str]:
    return {key for table in schema.TABLES for key in store.sizes(table)}


def named(store: Store) -> set[str]:
    return {file["path"] for file in commit.read_json(store, "runs/r.json")["files"]}


def nothing(number: int) -> None:
    pass


def before_each_change(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[int], None], after: Callable[[int], None] = nothing
) -> None:
    """Calls ``look`` with the number of the change that is about to be made, and ``after`` when it has been."""
    count = iter(range(1000))

    def wrap(change: Callable) -> Callable:
        def changing(self: Store, *args: object) -> object:
            number = next(count)
            look(number)
            result = change(self, *args)
            after(number)
            return result

        return changing

    for name in CHANGES:
        monkeypatch.setattr(Store, name, wrap(getattr(Store, name)))


def test_few_files_hold_the_rows_of_many_in_order_and_form(store):
    before = rows(store)
    shapes = {file["path"].split("/")[0]: file for file in commit.read_json(store, "runs/r.json")["files"]}
    done = compact(store, "r")
    assert (done.files_before, done.files) == (12, 4) and done.bytes < done.bytes_before
    assert rows(store) == before and in_tables(store) == named(store)
    assert {len(before[name]) for name in ("flagged", "errors")} == {3, 2} and len(before["audit"]) == 35
    for key in in_tables(store):
        table = key.split("/")[0]
        file = pq.ParquetFile(io.BytesIO(store.read(key)))
        assert file.schema_arrow.equals(schema.TABLES[table]) and shapes[table]["path"] != key
        assert file.read().to_pylist() == before[table]  # one file: its order is the table's
        column = file.metadata.row_group(0).column(0)
        assert column.compression == "ZSTD" and column.has_column_index and column.has_offset_index
    status, record = (commit.read_json(store, key) for key in (commit.status_key("r"), commit.record_key("r")))
    assert status == record and record["counts"]["listed"] == 40 and record["compactions"] == 1
    assert not store.sizes("_attempts")
    unchanged = {key: store.read(key) for key in store.sizes("")}
    assert compact(store, "r").files == 4 and {key: store.read(key) for key in store.sizes("")} == unchanged


@pytest.mark.parametrize("how", ["killed before", "unheard after"])
def test_a_compaction_that_ends_anywhere_leaves_every_row_once_and_is_finished_by_the_next(scanned, tmp_path, how):
    """At each change: killed before it, or by a store that made it and whose answer was lost."""
    expected = rows(Store(str(scanned / "out")))
    ends = 0
    while True:
        output = tmp_path / str(ends)
        shutil.copytree(scanned / "out", output)
        store = Store(str(output))

        def end(number: int, store: Store = store, last: int = ends) -> None:
            assert rows(store) == expected
            if number == last:
                raise StoreError("the answer was lost") if how == "unheard after" else KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            before_each_change(patch, *((nothing, end) if how == "unheard after" else (end,)))
            try:
                compact(store, "r")
                break
            except (KeyboardInterrupt, StoreError):
                ends += 1
        assert rows(store) == expected
        assert compact(store, "r").files == 4
        assert rows(store) == expected and in_tables(store) == named(store) and not store.sizes("_attempts")
    assert ends == 4 + 4 + 2 + 1 + 2  # merged files written and published, two records, the copy, two removals


def test_what_an_interrupted_compaction_left_is_litter(store, monkeypatch):
    expected = rows(store)

    def end(number: int) -> None:
        if number == 8:  # one record, four files written, three published
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        before_each_change(patch, end)
        compact(store, "r")
    left = in_tables(store) - named(store)
    assert len(left) == 3 and all("-compact-00001-" in key for key in left)
    (young,) = find_litter(store, timedelta(hours=1))
    assert young.keys == ()
    age(store)
    (litter,) = find_litter(store, timedelta(hours=1))
    assert set(litter.keys) == left | set(store.sizes("_attempts"))
    store.delete(list(litter.keys))
    assert rows(store) == expected and in_tables(store) == named(store)


def come_between(store: Store, moment: int, job: Callable[[], object], other: Callable[[], object]) -> tuple[bool, str]:
    """Runs a job, and another one whole before its ``moment``-th change.

    Whether the job made so many changes, and how it was refused in the end.
    """
    came: list[object] = []
    refusal = ""
    with pytest.MonkeyPatch.context() as patch:

        def come(number: int) -> None:
            if number == moment:
                patch.undo()
                came.append(other())

        before_each_change(patch, come)
        try:
            job()
        except RunError as error:
            refusal = str(error)
    return bool(came), refusal


def without(seen: dict[str, list[dict]], uri: str) -> dict[str, list[dict]]:
    return {table: [row for row in found if row["source_uri"] != uri] for table, found in seen.items()}


@pytest.mark.parametrize("other", ["compaction", "erasure"])
def test_whoever_comes_between_two_steps_of_a_compaction_loses_no_row_and_revives_none(scanned, tmp_path, other):
    expected = rows(Store(str(scanned / "out")))
    victim = expected["flagged"][0]["source_uri"]
    if other == "erasure":
        expected = without(expected, victim)
    moment, came = 0, True
    while came:
        shutil.copytree(scanned / "out", tmp_path / str(moment))
        store = Store(str(tmp_path / str(moment)))

        def interrupt(store: Store = store) -> object:
            if other == "erasure":
                return erase(store, Subject(uris=(victim,)), dry_run=False)
            return compact(store, "r", 3000)

        came, refusal = come_between(store, moment, lambda store=store: compact(store, "r"), interrupt)
        assert re.search("^$|compact again$|is not what its run record says", refusal)
        if came:
            assert rows(store) == expected
            if other == "erasure":
                assert erase(store, Subject(uris=(victim,)), dry_run=False) == []
            compact(store, "r")
            assert rows(store) == expected and in_tables(store) == named(store)
        moment += 1
    assert moment - 1 == 4 + 4 + 2 + 1 + 2  # as many changes as in the test above


def test_an_erasure_in_whose_steps_a_compaction_comes_says_so_and_is_repeated(scanned, tmp_path):
    everything = rows(Store(str(scanned / "out")))
    victim = everything["flagged"][0]["source_uri"]
    expected = without(everything, victim)
    refused, moment, came = 0, 0, True
    while came:
        shutil.copytree(scanned / "out", tmp_path / str(moment))
        store = Store(str(tmp_path / str(moment)))

        def interrupt(store: Store = store) -> bool:
            with suppress(RunError):
                compact(store, "r")
            return True

        def erasing(store: Store = store) -> None:
            erase(store, Subject(uris=(victim,)), dry_run=False)

        came, refusal = come_between(store, moment, erasing, interrupt)
        assert re.search("^$|erase again$", refusal)
        if refusal:
            refused += 1
            erasing()
        assert rows(store) == expected
        compact(store, "r")
        assert rows(store) == expected and in_tables(store) == named(store)
        for key in store.sizes(""):
            body = store.read(key)
            names = str(pq.read_table(io.BytesIO(body)).to_pydict()) if key.endswith(".parquet") else body.decode()
            assert victim not in names, key
        moment += 1
    assert 0 < refused < moment


@pytest.mark.parametrize("slept", [False, True])
def test_of_two_erasures_at_once_neither_brings_back_what_the_other_took_out(scanned, tmp_path, slept):
    """``slept``: whether the first one's lease has run out when the other comes."""
    victims = [row["source_uri"] for row in rows(Store(str(scanned / "out")))["flagged"][:2]]
    refused, moment, came = 0, 0, True
    while came:
        shutil.copytree(scanned / "out", tmp_path / str(moment))
        store = Store(str(tmp_path / str(moment)))

        def erasing(place: int, store: Store = store) -> None:
            with storage_errors_as_failure():
                erase(store, Subject(uris=(victims[place],)), dry_run=False)

        def interrupt(store: Store = store, erasing: Callable[[int], None] = erasing) -> bool:
            if slept:
                store.delete(list(store.sizes(LEASES)))
                erasing(1)
            else:
                with pytest.raises(RunError, match="being merged or erased by another job at this moment"):
                    erasing(1)
            return True

        came, refusal = come_between(store, moment, lambda erasing=erasing: erasing(0), interrupt)
        assert re.search("^$|erase again$|start it again until it ends with 0$", refusal)
        refused += bool(refusal)
        for place in (0, 1):  # who was refused begins again, and whoever was not finds nothing
            erasing(place)
        found = rows(store)
        assert not {row["source_uri"] for table in found.values() for row in table} & set(victims), moment
        for key in store.sizes("_state"):
            if key.endswith(".parquet"):
                assert not set(pq.read_table(io.BytesIO(store.read(key)))["uri"].to_pylist()) & set(victims), key
        moment += 1
    assert moment > 8 and (refused > 3) == slept


def test_an_erasure_does_not_vouch_for_a_file_that_somebody_has_written_back(store):
    before = rows(store)
    victim = before["flagged"][0]["source_uri"]
    bodies = {key: store.read(key) for key in store.sizes("flagged")}
    (key,) = (key for key, body in bodies.items() if victim in str(pq.read_table(io.BytesIO(body)).to_pydict()))
    with pytest.MonkeyPatch.context() as patch:

        def write_back(number: int) -> None:
            if not came and store.read(key) != bodies[key]:
                came.append(number)
                Path(store.name, key).write_bytes(bodies[key])

        came: list[int] = []
        before_each_change(patch, nothing, write_back)
        with pytest.raises(RunError, match=r"erase again$"):
            erase(store, Subject(uris=(victim,)), dry_run=False)
    assert came
    erase(store, Subject(uris=(victim,)), dry_run=False)
    assert rows(store) == without(before, victim)


def test_a_run_that_is_half_erased_is_not_compacted(store):
    victim = rows(store)["flagged"][0]["source_uri"]
    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):

        def end(number: int) -> None:
            if number == 3:  # the log, two tables
                raise KeyboardInterrupt

        before_each_change(patch, end)
        erase(store, Subject(uris=(victim,)), dry_run=False)
    before = in_tables(store)
    with pytest.raises(RunError, match=r"is not what its run record says .*: finish the erasure"):
        compact(store, "r")
    assert in_tables(store) == before
    erase(store, Subject(uris=(victim,)), dry_run=False)
    assert compact(store, "r").files == 4
    assert victim not in {row["source_uri"] for found in rows(store).values() for row in found}


def test_everything_that_reads_a_complete_run_reads_a_compacted_one(scanned, store):
    parent = read_parent(store, "r")
    failed, evidence = list(list_failed(store, parent, None)), read_evidence(store, ("r",), {})
    compact(store, "r")
    record = read_parent(store, "r")
    assert list(list_failed(store, record, None)) == failed and len(failed) == 1
    after = read_evidence(store, ("r",), {})
    for table in ("flagged", "audited"):
        assert sorted(map(str, getattr(after, table))) == sorted(map(str, getattr(evidence, table)))
    config = ScanConfig(
        source=str(scanned / "source"), output=store.name, plan=str(scanned / "plan.yaml"), run_id="r", salt="s"
    )
    store.delete(["runs/r/report.html"])
    assert run_scan(config) == record  # its report is made again, from the files that are there now
    assert store.read("runs/r/report.html").count(b"jpg") == 3
    (litter,) = find_litter(store, timedelta(0))
    assert litter.keys == ()
    victim = rows(store)["flagged"][0]["image_id"]
    changed = {
        change.path.split("/")[0]: change.rows for change in erase(store, Subject(image_ids=(victim,)), dry_run=False)
    }
    assert changed == {"ledger": 1, "flagged": 1, "_state": 1, "runs": 0}
    assert len(rows(store)["ledger"]) == 39 and compact(store, "r").files == 4


@pytest.mark.parametrize("knows", [True, False])
def test_a_run_in_a_bucket_is_compacted_and_erased_like_one_in_a_folder(scanned, s3_endpoint, knows):
    """``knows``: whether the store knows PUTs under a condition."""
    bucket = f"compacted-{knows}".lower()
    s3_client(s3_endpoint).create_bucket(Bucket=bucket)
    faults = Faults(refuses_conditions=not knows)
    with fault_proxy(s3_endpoint, faults) as url:
        remote, local = Store(f"s3://{bucket}/out", url), Store(str(scanned / "out"))
        for key in local.sizes(""):
            remote.write(key, local.read(key))
        before = rows(local)
        assert compact(remote, "r").files == 4 and rows(remote) == before and in_tables(remote) == named(remote)
        victim = before["flagged"][0]["source_uri"]
        assert erase(remote, Subject(uris=(victim,)), dry_run=False)
        assert rows(remote) == without(before, victim)
    assert bool(faults.hits["501"]) != knows


def test_files_of_two_versions_become_one(store):
    record = commit.read_json(store, "runs/r.json")
    for file in commit.files_of("ledger", record["files"])[:2]:
        table = pq.read_table(io.BytesIO(store.read(file["path"]))).drop_columns(["sha256", "judged_run_id"])
        body = io.BytesIO()
        pq.write_table(table, body)
        store.write(file["path"], body.getvalue())
        file |= {"bytes": len(body.getvalue()), "sha256": digest(body.getvalue())}
    commit.write_json(store, "runs/r.json", record)
    compact(store, "r")
    (path,) = store.sizes("ledger")
    assert pq.read_schema(io.BytesIO(store.read(path))).equals(schema.LEDGER)


def test_neighbours_are_packed_up_to_the_target_and_large_files_stay():
    def packed(*sizes: int) -> list[list[int]]:
        files = [{"path": f"{place:03}", "bytes": size} for place, size in enumerate(sizes)]
        return [[file["bytes"] for file in pack] for pack in pack(files, 100)]

    assert packed(10, 20, 30, 40) == [[10, 20, 30, 40]]
    assert packed(40, 40, 40, 60, 10) == [[40, 40], [40], [60], [10]]
    assert packed(50, 49, 49, 49) == [[50], [49, 49], [49]] and packed() == []
    assert packed(0, 0, 200) == [[0, 0], [200]]


def test_runs_are_chosen_by_name_or_by_age(store):
    assert runs_to_compact(store, (), timedelta(0)) == ["r"] == runs_to_compact(store, ("r",), timedelta(0))
    assert runs_to_compact(store, (), timedelta(hours=1)) == []
    with pytest.raises(UsageError, match="'r' was completed less than 1 hours ago"):
        runs_to_compact(store, ("r",), timedelta(hours=1))
    with pytest.raises(UsageError, match="there is no complete run 'x'"):
        runs_to_compact(store, ("x",), timedelta(0))


def test_the_command_line(store):
    done = run_here(job, "--output", store.name, "--older-than", "0")
    assert done.returncode == 0 and "run r: 12 files, now 4;" in done.stdout
    assert json.loads(store.read("runs/r.json"))["compactions"] == 1
    expect(run_here(job, "--output", store.name, "--target-megabytes", "0"), 2, "target is 0 megabytes")
    assert "no run is old enough" in run_here(job, "--output", store.name).stdout
