"""Night after night: what is tested again, what keeps its verdict, and what a run may cost."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from rich.console import Console

from pipeline.errors import RunStopped, UsageError
from pipeline.listing.increment import Earlier, Increment
from pipeline.listing.inventory import scope
from pipeline.listing.manifest import Shard, build_manifest
from pipeline.listing.source import image_id, list_source
from pipeline.output import commit
from pipeline.output.tally import Tally
from pipeline.past.comparable import find_earlier, judged_otherwise, records_of, under_other_policy
from pipeline.past.contents import Contents, write_contents
from pipeline.past.earlier import write_earlier
from pipeline.plan import WindowSpec
from pipeline.reporting import takeover
from pipeline.reporting.metrics import of_run
from pipeline.reporting.progress import closing_table
from pipeline.reporting.runs import read_run
from pipeline.run.limits import Budget, Limits
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.schema import EARLIER, FLAGGED, LEDGER
from pipeline.storage import s3_client
from pipeline.store import Store, digest
from pipeline.tables.sql import open_tables, sql_session
from tests.conftest import QUICK, small_plan

ALONE = {
    "name": "mini", "model": "cifar-mini", "rounds": [1], "thresholds": {"automobile": [0.006]}, "input_size": 32,
    "num_cpus": 0.3,
}  # fmt: skip
WINDOWS = {"window": {"images": 128}, "batch_images": 64}
LISTED, NEW, CHANGED, DELETED = 1000, 50, 20, 10


# Two nights


def draw(folder: Path, names: list[str], seed: int) -> None:
    """Small pictures of coloured patches, of which one in fifteen is flagged at the thresholds here."""
    rng = np.random.default_rng(seed)
    for name in names:
        patches = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Pillow.fromarray(patches).resize((48, 48), Pillow.Resampling.BICUBIC).save(folder / name, quality=90)


@pytest.fixture(scope="module")
def second_night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders: a thousand pictures, and what a day has made of them."""
    root = tmp_path_factory.mktemp("nights")
    first, second = root / "first" / "in", root / "second" / "in"
    first.mkdir(parents=True)
    draw(first, [f"{number:04d}.jpg" for number in range(LISTED)], seed=1)
    second.parent.mkdir()
    shutil.copytree(first, second)  # with the times that stand in for etags
    draw(second, [f"new-{number:02d}.jpg" for number in range(NEW)], seed=2)
    draw(second, [f"{number:04d}.jpg" for number in range(CHANGED)], seed=3)
    for number in range(DELETED):
        (second / f"{LISTED - 1 - number:04d}.jpg").unlink()
    return first, second


class Nights:
    """Scans of one folder whose content changes between them, so that uris stay."""

    def __init__(self, folder: Path, plan: Path) -> None:
        self.source, self.output, self.plan = folder / "source", folder / "out", plan

    def scan(self, content: Path, **config: Any) -> dict[str, Any]:
        if self.source.exists() or self.source.is_symlink():
            self.source.unlink()
        self.source.symlink_to(content)
        defaults = {"source": str(self.source), "output": str(self.output), "plan": str(self.plan), "salt": "s"}
        return run_scan(ScanConfig(**defaults | config))

    def ledger(self, run_id: str, table: str = "ledger") -> dict[str, dict[str, Any]]:
        """Rows by the name of their picture."""
        rows = pq.read_table(sorted(self.output.glob(f"{table}/*/{run_id}-*.parquet")), partitioning=None).to_pylist()
        return {row["source_uri"].rsplit("/", 1)[1]: row for row in rows}


def verdicts(ledger: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["judged_outcome"] or row["outcome"] for name, row in ledger.items()}


def compare_nights(nights: Nights, first: Path, second: Path) -> Counter[str]:
    """Scans two nights, the second one as an increment and in full; how the verdicts of these two differ."""
    before = nights.scan(first, run_id="one", since="last")
    assert before["increment"] is None and before["counts"]["skipped"] == 0, "there is nothing to compare with"
    record = nights.scan(second, run_id="two", since="last", shard_size=300)
    full = nights.scan(second, run_id="full")

    tested = NEW + CHANGED
    unchanged = LISTED - CHANGED - DELETED
    increment = record["increment"]
    assert {name: increment[name] for name in ("run_id", "unchanged", "new", "changed", "unjudged", "deleted")} == {
        "run_id": "one", "unchanged": unchanged, "new": NEW, "changed": CHANGED, "unjudged": 0, "deleted": DELETED,
    }  # fmt: skip
    assert increment["judged_by"] == {"one": unchanged}
    assert record["counts"]["listed"] == full["counts"]["listed"] == LISTED + NEW - DELETED
    assert record["counts"]["skipped"] == record["skips"]["unchanged"] == unchanged
    assert record["stages"][0]["images_in"] == tested
    assert [operator["images_in"] for operator in record["operators"] if operator["operator"] == "fetch"] == [tested]

    mine, theirs, old = (nights.ledger(run_id) for run_id in ("two", "full", "one"))
    assert {row["image_id"] for row in mine.values()} == {row["image_id"] for row in theirs.values()}
    for name, row in mine.items():
        if row["outcome"] == "skipped":
            assert (row["skip_reason"], row["judged_run_id"]) == ("unchanged", "one")
            assert (row["judged_outcome"], row["sha256"]) == (old[name]["outcome"], old[name]["sha256"])
            assert row["image_id"] == old[name]["image_id"] and row["decided_stage"] is None
        else:
            assert row["judged_run_id"] is None and row["judged_outcome"] is None and row["decided_stage"]
            assert row["sha256"] == hashlib.sha256((second / name).read_bytes()).hexdigest()
    assert sum(row["outcome"] != "skipped" for row in mine.values()) == tested
    assert 20 < Counter(verdicts(theirs).values())["flagged"] < 500
    pairs = ((verdicts(mine)[name], verdicts(theirs)[name]) for name in theirs)
    return Counter(f"{one} instead of {other}" for one, other in pairs if one != other)


def test_the_second_night_tests_what_is_new_or_changed(ray_session, second_night, tmp_path):
    """Under a plan that tests images alone the verdicts are those of a full scan."""
    nights = Nights(tmp_path, small_plan(tmp_path, QUICK, stages=[ALONE], **WINDOWS))
    assert compare_nights(nights, *second_night) == Counter()

    # A third night on which nothing has changed needs no Ray; verdicts are still the first night's.
    idle = nights.scan(second_night[1], run_id="three", since="two")
    assert idle["increment"]["run_id"] == "two" and idle["increment"]["unchanged"] == idle["counts"]["listed"]
    assert idle["operators"] == [] and idle["relative_cost"] is None
    assert idle["increment"]["judged_by"] == {"one": LISTED - CHANGED - DELETED, "two": NEW + CHANGED}
    assert verdicts(nights.ledger("three")) == verdicts(nights.ledger("two"))
    page = (nights.output / "runs/three/report.html").read_text()
    assert "unchanged since" in page and "two" in page

    # Another plan is another question: everything is tested, unless the run is named.
    other = small_plan(tmp_path, QUICK, stages=[ALONE | {"thresholds": {"automobile": [0.007]}}], **WINDOWS)
    named = Nights(tmp_path, other).scan(second_night[1], run_id="four", since="three")
    assert named["skips"] == {"unchanged": named["counts"]["listed"]} and named["plan_version"] != idle["plan_version"]


@pytest.mark.slow
def test_under_a_plan_with_groups_other_companions_are_counted(ray_session, second_night, tmp_path):
    """An increment turns no more verdicts than a full scan does whose companions are drawn anew.

    These pictures mean nothing to the net, and a tenth of them lies near a threshold.
    """
    nights = Nights(tmp_path, small_plan(tmp_path, QUICK, **WINDOWS))
    differences = compare_nights(nights, *second_night)
    nights.scan(second_night[1], run_id="again", salt="another")
    one, other = verdicts(nights.ledger("full")), verdicts(nights.ledger("again"))
    redrawn = sum(one[name] != other[name] for name in one)
    print(f"\nof {len(one)}: {dict(differences)} in the increment; {redrawn} differ when companions are drawn anew")
    assert 0 < sum(differences.values()) <= 1.3 * redrawn + 10


# What a listing is compared with


MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def listed(names: dict[str, str | None]) -> list[dict[str, Any]]:
    return [
        {"uri": f"s3://b/{name}", "size_bytes": 1, "etag": etag, "modified_at": MOMENT} for name, etag in names.items()
    ]


def earlier_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, EARLIER), folder / "0.parquet")
    return folder


def manifest_rows(store: Store, manifest) -> list[dict[str, Any]]:
    tables = [pq.read_table(pa.BufferReader(store.read(shard.key))) for shard in manifest.shards]
    return pa.concat_tables(tables).to_pylist()


STATES = st.sampled_from(["new", "same", "changed", "error", "untold", "forged", "undated", "deleted"])


@settings(max_examples=40, deadline=None)
@given(
    states=st.lists(STATES, min_size=1, max_size=80), images=st.integers(1, 9), shard_size=st.integers(1, 30),
    repeated=st.booleans(),
)  # fmt: skip
def test_every_object_is_counted_as_what_it_is(tmp_path_factory, states, images, shard_size, repeated):
    """A model of the join: each object in one of eight states, in any mixture.

    ``forged``: another picture under the same uri and etag, written after the earlier run had begun to list.
    ``undated``: the source tells no time, and is taken at its word. These had been flagged, to be counted apart.
    """
    folder = tmp_path_factory.mktemp("m")
    store = Store(str(folder / "out"))
    now = {f"{n}": None if state == "untold" else "e" for n, state in enumerate(states) if state != "deleted"}
    then = {f"{n}": ("old" if s == "changed" else now.get(f"{n}", "e"), s) for n, s in enumerate(states) if s != "new"}
    rows = [
        {
            "image_id": image_id(f"s3://b/{name}", etag),
            "uri": f"s3://b/{name}",
            "judged_run_id": None if state == "error" else "r1",
            "judged_outcome": {"error": None, "undated": "flagged"}.get(state, "cleared"),
            "sha256": None,
        }
        for name, (etag, state) in then.items()
    ]
    listing = listed(now)
    for row in listing:
        state = states[int(row["uri"].rsplit("/", 1)[1])]
        late, unknown = MOMENT + timedelta(seconds=1), None
        row["modified_at"] = {"forged": late, "new": late, "undated": unknown}.get(state, MOMENT - timedelta(days=1))
    listing += listing[:1] if repeated else []
    manifest = build_manifest(
        listing, store, "m", salt="s", window=WindowSpec(images=images), shard_size=shard_size,
        earlier=Earlier(folder=earlier_folder(folder / "earlier", rows), listed_at=MOMENT),
    )  # fmt: skip
    count = Counter(states)
    if not now:
        assert manifest.images == 0
        return
    assert manifest.increment == Increment(
        unchanged=count["same"] + count["undated"],
        new=count["new"],
        changed=count["changed"]
        + count["forged"]
        + count["untold"]
        - sum(1 for n, s in enumerate(states) if s == "untold" and f"{n}" not in then),
        unjudged=count["error"],
        deleted=count["deleted"],
        judged_by={"r1": count["same"] + count["undated"]} if count["same"] + count["undated"] else {},
        flagged_by={"r1": count["undated"]} if count["undated"] else {},
    )
    assert manifest.duplicates == int(repeated)
    found = manifest_rows(store, manifest)
    assert sorted(row["uri"] for row in found) == sorted(f"s3://b/{name}" for name in now)
    assert [row["ordinal"] for row in found] == list(range(len(now)))
    judged = [row["judged_run_id"] is not None for row in found]
    assert judged == sorted(judged) and sum(judged) == count["same"] + count["undated"], "what is tested comes first"
    for shard in manifest.shards:
        assert {row["judged_run_id"] is not None for row in found if row["shard"] == shard.index} == {shard.judged}
    # What is tested fills windows as if nothing else were listed.
    tested = [row for row in found if row["judged_run_id"] is None]
    old = {f"s3://b/{number}" for number, state in enumerate(states) if state in ("same", "undated")}
    alone = build_manifest(
        [row for row in listing if row["uri"] not in old],
        store, "alone", salt="s", window=WindowSpec(images=images), shard_size=shard_size,
    )  # fmt: skip
    if tested:
        assert [(r["image_id"], r["window"]) for r in tested] == [
            (r["image_id"], r["window"]) for r in manifest_rows(store, alone)
        ]


def test_an_earlier_ledger_says_who_judged_what(tmp_path):
    """Own verdicts, carried ones, errors and canaries, in files of this version and of the one before."""
    store = Store(str(tmp_path / "out"))
    rows = [
        ("a", "cleared", None, None, None, "11"),
        ("b", "flagged", None, None, None, "22"),
        ("c", "error", None, None, None, None),
        ("d", "skipped", "unchanged", "r0", "flagged", "33"),
        ("e", "skipped", "known content", "lost", "cleared", "44"),
        ("f", "skipped", "canary found", None, None, "55"),
        ("g", "flagged", None, "r0", "flagged", "66"),
        ("h", "cleared", None, None, None, "77"),
    ]
    names = ("image_id", "outcome", "skip_reason", "judged_run_id", "judged_outcome", "sha256")
    dicts = [dict(zip(names, row, strict=True)) | {"source_uri": row[0]} for row in rows]
    dicts[-1]["match_ignored"] = True
    table = pa.Table.from_pylist(dicts, LEDGER)
    record = finished(store, "r1", {"ledger": table, "flagged": FLAGGED.empty_table()})
    finished(store, "r0", {"ledger": LEDGER.empty_table(), "flagged": FLAGGED.empty_table()})
    (tmp_path / "earlier").mkdir()
    assert write_earlier(store, record, tmp_path / "earlier") == ["lost"]
    found = {row["uri"]: row for row in pq.read_table(tmp_path / "earlier").to_pylist()}
    assert {uri: (row["judged_run_id"], row["judged_outcome"]) for uri, row in found.items()} == {
        "a": ("r1", "cleared"),
        "b": ("r1", "flagged"),
        "c": (None, None),
        "d": ("r0", "flagged"),
        "e": (None, None),  # the record of that run is gone, and its verdict with it
        "g": ("r1", "flagged"),  # the rows of this object are in r1, whoever judged its content first
        "h": (None, None),  # it matched a bank, and is asked again
    }
    assert found["d"]["sha256"] == "33"

    version_1 = table.drop_columns(["judged_run_id", "judged_outcome", "sha256", "match_ignored"]).slice(0, 3)
    old = finished(store, "r2", {"ledger": version_1, "flagged": FLAGGED.empty_table()})
    shutil.rmtree(tmp_path / "earlier")
    (tmp_path / "earlier").mkdir()
    write_earlier(store, old, tmp_path / "earlier")
    found = {row["uri"]: row for row in pq.read_table(tmp_path / "earlier").to_pylist()}
    assert [found[uri]["judged_outcome"] for uri in "abc"] == ["cleared", "flagged", None]

    (tmp_path / "out" / old["files"][0]["path"]).unlink()
    with pytest.raises(UsageError, match=r"--since r2: ledger/.* is gone.*scan without --since"):
        write_earlier(store, old, tmp_path / "earlier")


def finished(store: Store, run_id: str, tables: dict[str, pa.Table], **changes: Any) -> dict[str, Any]:
    """A complete run with these tables."""
    files = []
    for name, table in tables.items():
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        path = f"{name}/scan_date=2026-01-01/{run_id}-shard-00000.parquet"
        store.write(path, buffer.getvalue())
        files.append({"path": path, "rows": table.num_rows, "sha256": digest(buffer.getvalue())})
    record = {
        "run_id": run_id, "parent_run_id": None, "source": "s3://b/in/", "started_at": f"2026-01-0{len(run_id)}",
        "plan_version": "p", "weights_sha256": {"s": "w"}, "files": files,
    } | changes  # fmt: skip
    commit.write_json(store, commit.record_key(run_id), record)
    return record


def test_the_newest_run_that_compares_is_the_last(tmp_path):
    store = Store(str(tmp_path))
    tables = {"ledger": LEDGER.empty_table()}
    for run_id, changes in {
        "old": {"started_at": "2026-01-01"},
        "new": {"started_at": "2026-01-03"},
        "elsewhere": {"started_at": "2026-01-09", "source": "s3://b/other/"},
        "other-plan": {"started_at": "2026-01-09", "plan_version": "q"},
        "other-net": {"started_at": "2026-01-09", "weights_sha256": {"s": "v"}},
        "other-bank": {"started_at": "2026-01-10", "banks_sha256": {"b": "1"}},
        "retry": {"started_at": "2026-01-09", "parent_run_id": "new"},
    }.items():
        finished(store, run_id, tables, **changes)
    commit.write_json(store, commit.status_key("unfinished"), {"started_at": "2026-01-10"})
    decides = {"plan_version": "p", "weights_sha256": {"s": "w"}, "banks_sha256": {}}
    found = find_earlier(store, "last", "s3://b/in/", decides)
    assert found.record is not None and found.record["run_id"] == "new"
    assert found.notes == (
        "the newest run over this source, other-bank, was judged by other banks (to keep its verdicts all the same: "
        "--since other-bank)",
    )
    judged_by = {"new": 5, "other-plan": 7, "other-bank": 2, "gone": 1}
    assert judged_otherwise(records_of(store, judged_by), judged_by, decides) == 10
    (tmp_path / "ledger/scan_date=2026-01-01/new-shard-00000.parquet").unlink()
    found = find_earlier(store, "last", "s3://b/in/", decides)
    assert found.record is not None and found.record["run_id"] == "old", "of the newest the tables are gone"
    for changes, words in (
        ({"plan_version": "r"}, "judged by plan version p, and this is r"),
        ({"weights_sha256": {"s": "z"}}, "judged by other nets"),
    ):
        found = find_earlier(store, "last", "s3://b/in/", decides | changes)
        assert found.record is None and words in found.notes[-1]
    assert find_earlier(store, "last", "s3://b/none/", decides).notes == ("there is no complete run over this source",)
    named = find_earlier(store, "other-plan", "s3://b/in", decides)
    assert named.record is not None and named.record["run_id"] == "other-plan" and named.notes == ()
    with pytest.raises(UsageError, match="--since none: no complete run of that name"):
        find_earlier(store, "none", "s3://b/in", decides)
    with pytest.raises(UsageError, match="took up the errors of new"):
        find_earlier(store, "retry", "s3://b/in", decides)


def test_a_suspect_run_is_passed_over_until_somebody_accepts_it(tmp_path):
    """Or the verdicts of a night that judged wrongly would be kept for ever. Who was built on none of it counts."""
    store, tables = Store(str(tmp_path)), {"ledger": LEDGER.empty_table()}
    finished(store, "good", tables, started_at="2026-01-01")
    finished(store, "odd", tables, started_at="2026-01-02", suspect=[{"gate": "errors"}])
    decides = {"plan_version": "p", "weights_sha256": {"s": "w"}, "banks_sha256": {}}

    def last() -> tuple[str, tuple[str, ...]]:
        found = find_earlier(store, "last", "s3://b/in/", decides)
        assert found.record is not None
        return found.record["run_id"], found.notes

    how = (
        "run over this source, odd, is suspect and nobody has accepted it (to keep its verdicts: python -m jobs.status "
        "--accept odd, or once --since odd)"
    )
    assert last() == ("good", (f"the newest {how}",))
    assert find_earlier(store, "odd", "s3://b/in/", decides).record["run_id"] == "odd", "who names it wants it"
    finished(store, "other", tables, started_at="2026-01-03", plan_version="q")
    run_id, (newest, suspect) = last()
    assert run_id == "good" and "other, was judged by plan version q" in newest and suspect == f"a {how}"
    finished(store, "after", tables, started_at="2026-01-04", increment={"run_id": "good"})
    assert last() == ("after", ()), "it took nothing over from the suspect one"
    commit.write_json(store, commit.record_key("after"), {})
    store.create(commit.accepted_key("odd"), b"{}")
    run_id, notes = last()
    assert run_id == "odd" and not [note for note in notes if "suspect" in note]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"run_id": "spoilt"}', b"\xff", b"[" * 100_000])
def test_a_record_that_is_none_any_more_is_passed_over_and_named(tmp_path, body):
    store = Store(str(tmp_path / "out"))
    tables = {"ledger": LEDGER.empty_table(), "flagged": FLAGGED.empty_table()}
    finished(store, "old", tables)
    finished(store, "spoilt", tables)
    store.write(commit.record_key("spoilt"), body)
    decides = {"plan_version": "p", "weights_sha256": {"s": "w"}, "banks_sha256": {}}
    found = find_earlier(store, "last", "s3://b/in/", decides)
    assert found.record is not None and found.record["run_id"] == "old"
    (note,) = found.notes
    assert note.startswith("runs/spoilt.json is no run record") and "put it back from a copy" in note
    with pytest.raises(UsageError, match=r"--since spoilt: runs/spoilt\.json is no run record; put it back"):
        find_earlier(store, "spoilt", "s3://b/in/", decides)
    # What it had judged and another run has taken over is made anew, as if that run were gone.
    row = {"image_id": "a", "source_uri": "a", "outcome": "skipped", "skip_reason": "unchanged",
           "judged_run_id": "spoilt", "judged_outcome": "flagged"}  # fmt: skip
    record = finished(store, "new", {"ledger": pa.Table.from_pylist([row], LEDGER)})
    (tmp_path / "earlier").mkdir()
    assert write_earlier(store, record, tmp_path / "earlier") == ["spoilt"]
    (kept,) = pq.read_table(tmp_path / "earlier").to_pylist()
    assert kept["judged_run_id"] is None and kept["judged_outcome"] is None


def test_a_record_that_cannot_be_read_may_be_whole_and_is_not_passed_over(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    finished(store, "old", {"ledger": LEDGER.empty_table()})

    def refuse(*_: Any) -> Any:
        raise PermissionError("runs/old.json: not for you")

    monkeypatch.setattr(commit, "read_json", refuse)
    with pytest.raises(PermissionError, match="not for you"):
        find_earlier(store, "last", "s3://b/in/", {})


def test_findings_with_the_action_of_another_policy_are_counted(tmp_path):
    store, tables = Store(str(tmp_path)), {"ledger": LEDGER.empty_table()}
    finished(store, "none", tables)
    finished(store, "house", tables, policy={"name": "house", "sha256": "1"})
    flagged_by = {"none": 3, "house": 4, "gone": 1}
    records = records_of(store, flagged_by)
    assert under_other_policy(records, flagged_by, None) == 5
    assert under_other_policy(records, flagged_by, {"sha256": "1"}) == 4
    assert under_other_policy(records, flagged_by, {"sha256": "2"}) == 8


# What is taken over, and what is said of it


def house_policy(folder: Path, action: str) -> str:
    path = folder / f"{action}.yaml"
    path.write_text(f"{{name: house, version: 1, default: {action}, categories: {{automobile: {{}}}}}}")
    return str(path)


def test_what_is_taken_over_is_said_and_what_stands_is_counted_apart(ray_session, tmp_path, capsys):
    """Three nights: everything; nothing new under another policy; a new plan."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw(pictures, [f"{number:03d}.jpg" for number in range(150)], seed=1)
    nights = Nights(tmp_path, small_plan(tmp_path, QUICK, stages=[ALONE], **WINDOWS))
    first = nights.scan(pictures, run_id="one", since="last", policy=house_policy(tmp_path, "ask"))
    flagged = first["counts"]["flagged"]
    assert flagged > 0 and takeover.standing(first) == flagged
    assert "all 150 images are to be tested; there is no complete run over this source" in capsys.readouterr().out

    (pictures / "149.jpg").unlink()
    draw(pictures, ["new-1.jpg", "new-2.jpg"], seed=2)
    draw(pictures, ["000.jpg"], seed=3)
    second = nights.scan(pictures, run_id="two", since="last", policy=house_policy(tmp_path, "remove"))
    carried = sum(row["outcome"] == "flagged" for name, row in nights.ledger("one").items()
                  if name not in ("000.jpg", "149.jpg"))  # fmt: skip
    line = takeover.taken_over(second)
    assert line == (
        f"--since last: 148 images are unchanged since run one and keep their verdict, {carried} of them flagged; "
        "3 are to be tested: 2 new, 1 changed, 0 without a verdict, as after an error; 1 are gone; "
        f"{carried} of the flagged keep the action of another policy"
    )
    assert line in capsys.readouterr().out
    mine = nights.ledger("two", "flagged")
    assert {row["recommended_action"] for row in mine.values()} <= {"remove"}
    standing = takeover.standing(second)
    assert standing == carried + second["counts"]["flagged"]
    with sql_session(open_tables(Store(str(nights.output)))) as session:
        latest = "SELECT recommended_action, count(DISTINCT source_uri) FROM flagged_latest GROUP BY 1"
        by_action = dict(session.execute(latest).fetchall())
    assert by_action == {"ask": carried} | ({"remove": len(mine)} if mine else {})
    assert sum(by_action.values()) == standing
    page = (nights.output / "runs/two/report.html").read_text()
    assert "Flagged tonight" in page and line in page
    assert f"<strong>{standing} flagged images in the source</strong>" in page
    shown = Console(file=io.StringIO(), width=120)
    unknown = {"recall": None, "false_positive_rate": None, "positives": 0, "negatives": 0}
    shown.print(closing_table(second | {"quality": unknown}))
    said = " ".join(shown.file.getvalue().split())
    assert f"flagged tonight │ {second['counts']['flagged']} │" in said
    assert f"flagged, standing in the source │ {standing} │" in said
    assert "recall │ unknown: 0 violating images that were judged this time │" in said
    run = read_run(Store(str(nights.output)), "two")
    assert (run.flagged, run.standing) == (second["counts"]["flagged"], standing)
    gauges = {sample.name: sample.value for sample in of_run(second)}
    assert gauges["dorfman_run_flagged_standing"] == standing

    other = Nights(
        tmp_path, small_plan(tmp_path, QUICK, stages=[ALONE | {"thresholds": {"automobile": [0.007]}}], **WINDOWS)
    )
    third = other.scan(pictures, run_id="three", since="last")
    assert third["increment"] is None and third["counts"]["skipped"] == 0
    words = (
        "all 151 images are to be tested; the newest run over this source, two, was judged by plan version "
        f"{first['plan_version']}, and this is {third['plan_version']} (to keep its verdicts all the same: --since two)"
    )
    assert words in capsys.readouterr().out and words in (nights.output / "runs/three/report.html").read_text()


def test_records_of_older_versions_say_what_they_know():
    counts = {"listed": 9, "flagged": 2}
    was = {"unchanged": 5, "new": 4, "changed": 0, "unjudged": 0, "deleted": 0, "judged_otherwise": 0}
    older = {"since": "last", "listed": 9, "counts": counts, "increment": {"run_id": "a"} | was}
    assert takeover.standing(older) is None
    assert takeover.taken_over(older) == (
        "--since last: 5 images are unchanged since run a and keep their verdict; 4 are to be tested: 4 new, "
        "0 changed, 0 without a verdict, as after an error"
    )
    assert takeover.taken_over({"since": None}) is None and takeover.standing({"counts": counts}) == 2
    assert takeover.standing({"counts": counts, "parent_run_id": "a"}) is None


# Content that is known


def test_content_is_found_whatever_it_is_called(tmp_path, monkeypatch):
    """In several parts, against a dictionary; where copies disagree the content counts as flagged."""
    monkeypatch.setattr("pipeline.listing.ordering.RUN_ROWS", 5)
    monkeypatch.setattr("pipeline.listing.ordering.SLICE_ROWS", 6)
    store = Store(str(tmp_path / "out"))
    digests = [hashlib.sha256(bytes([number])).hexdigest() for number in range(20)]
    finding = {"category": "automobile", "score": 0.5, "threshold": 0.25, "decided_stage": "s", "plan_version": "p"}
    flagged = [finding | {"image_id": f"id-{n}", "stages": []} for n in (4, 9)]
    finished(store, "r1", {"flagged": pa.Table.from_pylist(flagged, FLAGGED)})
    rows = [
        {
            "image_id": f"id-{n}",
            "uri": f"u-{n}",
            "judged_run_id": "r1",
            "judged_outcome": "cleared",
            "sha256": digests[n],
        }
        for n in range(12)
    ]
    rows += [row | {"image_id": f"copy-{row['image_id']}"} for row in rows]
    for n in (4, 9, 11):  # of 11 nobody has the finding any more
        rows[n]["judged_outcome"] = "flagged"
    rows += [{"image_id": "x", "uri": "x", "judged_run_id": None, "judged_outcome": None, "sha256": digests[15]}]
    parts = write_contents(earlier_folder(tmp_path / "earlier", rows), store, "m")
    assert len(parts) >= 3 and all(part.key.startswith("m/contents-") for part in parts)
    contents = Contents(store, parts)
    for n, value in enumerate(digests):
        known = contents.find(value)
        if n in (4, 9):
            assert known is not None and known.run_id == "r1"
            (found,) = known.findings
            assert {name: found[name] for name in finding} == finding and found["match_bank"] is None
        elif n < 11:
            assert known is not None and known.findings == ()
        else:
            assert known is None
    assert Contents(store, ()).find(digests[0]) is None


def test_known_content_keeps_its_verdict_under_another_name(ray_session, tmp_path):
    """A flagged and a cleared picture come back under new names; the nets see neither of them."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    draw(first, [f"{number:02d}.jpg" for number in range(60)], seed=1)
    nights = Nights(tmp_path, small_plan(tmp_path, QUICK, stages=[ALONE], **WINDOWS))
    nights.scan(first, run_id="one")
    old = nights.ledger("one")
    by_outcome = {row["outcome"]: name for name, row in sorted(old.items())}
    assert set(by_outcome) == {"flagged", "cleared"}
    shutil.copytree(first, second)
    for outcome, name in by_outcome.items():
        (second / f"again-{outcome}.jpg").write_bytes((first / name).read_bytes())
    draw(second, ["new.jpg"], seed=5)
    record = nights.scan(
        second, run_id="two", since="last", canaries=str(canary_file(tmp_path, first / by_outcome["flagged"]))
    )
    assert record["increment"]["new"] == 3 and record["stages"][0]["images_in"] == 2, "one new one, and the canary"
    assert record["taken"] == {"known content": 1} and record["skips"]["known content"] == 1
    assert record["canaries"] == {"found": 1, "missed": 0, "failed": 0}
    mine = nights.ledger("two")
    cleared, flagged = mine["again-cleared.jpg"], mine["again-flagged.jpg"]
    assert (cleared["outcome"], cleared["skip_reason"], cleared["judged_run_id"]) == ("skipped", "known content", "one")
    assert (flagged["outcome"], flagged["judged_run_id"], flagged["judged_outcome"]) == ("flagged", "one", "flagged")
    row = nights.ledger("two", "flagged")["again-flagged.jpg"]
    original = old[by_outcome["flagged"]]
    assert (row["score"], row["decided_stage"], row["judged_run_id"]) == (original["score"], "mini", "one")
    assert row["image_id"] == flagged["image_id"] != original["image_id"] and row["stages"][0]["stage"] == "mini"
    # Asked not to, the scan tests them all.
    tested = nights.scan(second, run_id="three", since="one", known_content=False)
    assert tested["stages"][0]["images_in"] == 3 and tested["taken"] == {}


def canary_file(folder: Path, picture: Path) -> Path:
    copy = folder / "canary" / "planted.jpg"
    copy.parent.mkdir()
    copy.write_bytes(picture.read_bytes())
    pq.write_table(pa.table({"uri": [str(copy)], "category": ["automobile"]}), folder / "canaries.parquet")
    return folder / "canaries.parquet"


# Inventory


def report(folder: Path, kind: str, rows: list[dict[str, Any]], bucket: str = "uploads") -> Path:
    """An S3 Inventory report as AWS writes one: ``rows`` with the fields of the CSV format."""
    data, dated = folder / "config" / "data", folder / "config" / "2026-11-23T01-00Z"
    data.mkdir(parents=True)
    dated.mkdir()
    names = ["Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size", "LastModifiedDate", "ETag"]
    name = data / f"part.{kind.lower()}"
    if kind == "CSV":
        lines = ",".join
        body = "\n".join(lines(f'"{row.get(column, "")}"' for column in names) for row in rows)
        name = data / "part.csv.gz"
        name.write_bytes(gzip.compress(body.encode()))
        schema = ", ".join(names)
    else:
        typed = [
            {
                "bucket": row["Bucket"], "key": unquote_plus(row["Key"]), "version_id": row.get("VersionId", ""),
                "is_latest": row["IsLatest"] == "true", "is_delete_marker": row["IsDeleteMarker"] == "true",
                "size": int(row["Size"]) if row["Size"] else None, "e_tag": row["ETag"] or None,
                "last_modified_date": datetime.fromisoformat(row["LastModifiedDate"]),
            }
            for row in rows
        ]  # fmt: skip
        table = pa.Table.from_pylist(typed)
        if kind == "ORC":
            pyarrow.orc.write_table(table, name)
        else:
            pq.write_table(table, name)
        schema = "struct<bucket:string,key:string>"
    content = {
        "sourceBucket": bucket, "destinationBucket": "arn:aws:s3:::reports", "version": "2016-11-30",
        "fileFormat": kind.replace("PARQUET", "Parquet"), "fileSchema": schema,
        "files": [{"key": f"x/{name.name}", "MD5checksum": hashlib.md5(name.read_bytes()).hexdigest()}],
    }  # fmt: skip
    (dated / "manifest.json").write_text(json.dumps(content))
    return dated / "manifest.json"


CURRENT = {
    "Bucket": "uploads", "IsLatest": "true", "IsDeleteMarker": "false", "LastModifiedDate": "2026-11-20T10:30:00.000Z",
}  # fmt: skip
INVENTORY = [
    CURRENT | {"Key": "a/plain.jpg", "Size": "10", "ETag": "e1"},
    CURRENT | {"Key": "a/with%20space+plus%2B%C3%BC.jpg", "Size": "20", "ETag": "e2"},
    CURRENT | {"Key": "a/old.jpg", "Size": "30", "ETag": "e3", "IsLatest": "false"},
    CURRENT | {"Key": "a/deleted.jpg", "Size": "", "ETag": "", "IsDeleteMarker": "true"},
    CURRENT | {"Key": "_left-out.jpg", "Size": "5", "ETag": "e5"},
]


@pytest.mark.parametrize("kind", ["CSV", "ORC", "PARQUET"])
def test_an_inventory_report_is_a_source(tmp_path, kind):
    path = report(tmp_path, kind, INVENTORY)
    found = {row["uri"]: row for row in list_source(str(path), ("_*",), None)}
    assert set(found) == {"s3://uploads/a/plain.jpg", "s3://uploads/a/with space plus+ü.jpg"}
    plain = found["s3://uploads/a/plain.jpg"]
    assert (plain["size_bytes"], plain["etag"]) == (10, "e1")
    assert plain["modified_at"] == datetime(2026, 11, 20, 10, 30, tzinfo=UTC)
    store = Store(str(tmp_path / "out"))
    manifest = build_manifest(found.values(), store, "m", salt="s", window=WindowSpec(images=4), shard_size=10)
    assert manifest.images == 2

    (data,) = (tmp_path / "config" / "data").iterdir()
    data.write_bytes(data.read_bytes() + b"x")
    with pytest.raises(UsageError, match="is not what the report says of it"):
        list(list_source(str(path), (), None))
    data.unlink()
    with pytest.raises(UsageError, match=r"its data file .* is gone"):
        list(list_source(str(path), (), None))
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"not the manifest\.json of an S3 Inventory report"):
        list(list_source(str(path), (), None))


def test_an_inventory_report_in_a_bucket_names_its_files_by_key(tmp_path, s3_endpoint):
    path = report(tmp_path, "CSV", INVENTORY)
    client = s3_client(s3_endpoint)
    client.create_bucket(Bucket="reports")
    client.upload_file(str(tmp_path / "config/data/part.csv.gz"), "reports", "x/part.csv.gz")
    client.upload_file(str(path), "reports", "x/uploads/all/2026-11-23T01-00Z/manifest.json")
    source = "s3://reports/x/uploads/all/2026-11-23T01-00Z/manifest.json"
    assert len(list(list_source(source, ("_*",), s3_endpoint))) == 2
    assert scope(source) == scope(source.replace("-23T", "-24T")) == "s3://reports/x/uploads/all"
    assert scope("s3://b/p/") != scope("s3://b/p"), "the second lists s3://b/p2 as well"


# Limits


def test_a_run_stops_before_the_shard_that_would_pass_a_limit():
    clock = [datetime(2026, 11, 24, 22, 0, tzinfo=UTC)]
    limits = Limits.of(100.0, "06:00", lambda: clock[0])
    assert limits.deadline == datetime(2026, 11, 25, 6, 0, tzinfo=UTC)
    pending = [shard(100), shard(100), shard(40), shard(100), shard(900, judged=True)]
    budget = Budget(limits, spent(1000.0), pending, lambda: clock[0])
    clock[0] += timedelta(hours=1)
    budget.check(spent(1040.0), pending[1:])
    budget.check(spent(1080.0), pending[2:])
    with pytest.raises(RunStopped, match=r"80\.0 GMAC are done, and another shard would pass the limit of 100\.0"):
        budget.check(spent(1080.0), [shard(100), shard(40), shard(900, judged=True)])
    budget.check(spent(1080.0), [shard(900, judged=True)])
    clock[0] += timedelta(hours=4)
    with pytest.raises(RunStopped, match="another shard would not be done by 2026-11-25T06:00 UTC"):
        budget.check(spent(1001.0), pending[1:])
    for text, words in (("25:00", "write HH:MM"), ("2020-01-01", "has passed"), ("soon", "write HH:MM")):
        with pytest.raises(UsageError, match=words):
            Limits.of(None, text)
    with pytest.raises(UsageError, match="limit cost is -1 GMAC"):
        Limits.of(-1, None)


def test_known_content_counts_on_both_sides_of_a_forecast():
    """After a prefix was renamed nearly all of each shard is known: skipped, and yet what a shard takes."""
    clock = [datetime(2026, 11, 24, 22, 0, tzinfo=UTC)]
    pending = [shard(100) for _ in range(9)]
    budget = Budget(Limits.of(100.0, "06:00", lambda: clock[0]), Tally(), pending, lambda: clock[0])
    clock[0] += timedelta(hours=1)
    budget.check(spent(1.0, tested=1, known=99), pending[1:])
    budget.check(spent(1.0, tested=1, known=199), pending[2:])
    clock[0] += timedelta(hours=6)
    with pytest.raises(RunStopped, match="would not be done by"):
        budget.check(spent(0.0, tested=0, known=300), pending[3:])


def test_a_limit_that_no_shard_border_can_keep_is_told_before_the_start():
    now, late = lambda: datetime(2026, 11, 24, 22, 0, tzinfo=UTC), "06:00"
    one, more = [shard(1_000), shard(900, judged=True)], [shard(1_000), shard(1_000)]

    def warning(gmac: float | None, deadline: str | None, pending: list[Shard]) -> str | None:
        return Limits.of(gmac, deadline, now).warning(pending)

    assert warning(None, late, one) == (
        "--deadline cannot stop this start: it stops between shards, and there is one of 1,000 images to test; a "
        "smaller --shard-size, which a new run takes, makes more of them"
    )
    said = warning(9.0, late, one)
    assert said is not None and said.startswith("--limit-cost and --deadline cannot")
    assert [warning(9.0, late, more), warning(None, None, one), warning(9.0, late, one[1:])] == [None] * 3


def spent(gmac: float, *, tested: int = 100, known: int = 0) -> Tally:
    tally = Tally()
    tally.add_outcomes({"cleared": tested, "skipped": known})
    tally.add_work([{"operator": "s", "round": 0, "gmac": gmac}])
    return tally


def shard(images: int, *, judged: bool = False) -> Shard:
    return Shard(index=0, images=images, windows=1, key="", sha256="", judged=judged)


def test_a_run_that_stopped_goes_on(ray_session, tmp_path):
    """At a shard border, with exit code 4 to come; started again with more, it ends like any other."""
    content = tmp_path / "content"
    content.mkdir()
    draw(content, [f"{number:03d}.jpg" for number in range(160)], seed=1)
    nights = Nights(tmp_path, small_plan(tmp_path, QUICK, stages=[ALONE], window={"images": 32}, batch_images=32))
    with pytest.raises(RunStopped, match=r"run 'r' stopped: .* GMAC are done, .*--run-id r to go on"):
        nights.scan(content, run_id="r", shard_size=32, limit_cost=0.9)
    status = json.loads((nights.output / "runs/r/status.json").read_text())
    assert status["status"] == "stopped" and "another shard would pass" in status["reason"]
    committed = status["counts"]["listed"]
    assert committed in (32, 64, 96) and not (nights.output / "runs/r.json").exists()
    assert sum(work["gmac"] for work in status["operators"]) <= 0.9
    record = nights.scan(content, run_id="r", shard_size=32)
    assert record["status"] == "complete" and record["committed_before"] == committed
    assert record["counts"]["listed"] == 160 and len(nights.ledger("r")) == 160
