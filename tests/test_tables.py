"""The views of an output: which verdict stands for an object after nights of every kind."""

from __future__ import annotations

import csv
import io
import json
import threading
from datetime import timedelta

import pytest

from jobs import query
from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.past.records import READERS
from pipeline.review.queue import read_queue
from pipeline.schema import ALL
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.tables.compact import compact, runs_to_compact
from pipeline.tables.run_rows import RUNS
from pipeline.tables.sql import open_tables, sql_session, with_scan_date
from tests.conftest import QUICK, small_plan
from tests.outputs import judged, run_here, scan_by_hand, unchanged, write_night
from tests.test_jobs import expect


def ask(store: Store, query: str) -> list[tuple]:
    with sql_session(open_tables(store)) as session:
        return session.execute(query).fetchall()


def standing(store: Store) -> dict[str, tuple]:
    """What per_image says of each object, and that flagged_latest says the same of what is current."""
    rows = ask(store, "SELECT * EXCLUDE (source_uri, image_id), source_uri[8:] AS name FROM per_image ORDER BY name")
    names = ("outcome", "score", "categories", "error_code", "decided", "listed", "current", "first", "last", "name")
    found = {row[-1]: dict(zip(names, row, strict=True)) for row in rows}
    latest = ask(store, "SELECT source_uri[8:], category FROM flagged_latest ORDER BY 1, score DESC, category")
    expected = [(name, category) for name, row in found.items() if row["current"] for category in row["categories"]]
    assert latest == expected
    return {name: (row["outcome"], *row["categories"], row["decided"]) for name, row in found.items()}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def test_the_newest_night_decides_and_what_it_does_not_list_stands_no_more(store):
    write_night(store, "mon", 0, [
        judged("stays", "flagged", "weapon"), judged("mended", "flagged", "gore"), judged("deleted", "flagged", "gore"),
        judged("worse", "cleared"),
    ])  # fmt: skip
    write_night(store, "tue", 1, [
        judged("stays", "flagged", "weapon", "gore"), judged("mended", "cleared", etag="2"),
        judged("worse", "flagged", "gore", etag="2"), judged("new", "error", error_code="fetch_timeout"),
    ])  # fmt: skip
    assert standing(store) == {
        "deleted": ("flagged", "gore", "mon"),
        "mended": ("cleared", "tue"),
        "new": ("error", "tue"),
        "stays": ("flagged", "weapon", "gore", "tue"),
        "worse": ("flagged", "gore", "tue"),
    }
    nights = "CAST(first_seen AS VARCHAR), CAST(last_seen AS VARCHAR)"
    seen = f"SELECT source_uri[8:], current, listed_run_id, {nights} FROM per_image ORDER BY 1"
    first, second = "2026-01-01", "2026-01-02"
    assert ask(store, seen) == [
        ("deleted", False, "mon", first, first),
        ("mended", True, "tue", first, second),
        ("new", True, "tue", second, second),
        ("stays", True, "tue", first, second),
        ("worse", True, "tue", first, second),
    ]
    assert ask(store, "SELECT score, error_code FROM per_image WHERE outcome = 'error'") == [(None, "fetch_timeout")]


def test_an_unchanged_object_keeps_the_verdict_of_the_night_that_tested_it(store):
    objects = [
        judged("bad", "flagged", "weapon"),
        judged("good", "cleared", score=0.1),
        judged("broken", "error", error_code="truncated"),
    ]
    write_night(store, "mon", 0, objects)
    for night, run in enumerate(("tue", "wed"), 1):
        again = [
            unchanged("bad", "mon", "flagged"),
            unchanged("good", "mon"),
            judged("broken", "error", error_code="truncated"),
        ]
        write_night(store, run, night, again, since="last")
    verdicts = {"bad": ("flagged", "weapon", "mon"), "broken": ("error", "wed"), "good": ("cleared", "mon")}
    assert standing(store) == verdicts
    assert ask(store, "SELECT score FROM per_image WHERE outcome = 'cleared'") == [(pytest.approx(0.1),)]
    # The other way round: a finding that a later night, which looked again, did not repeat.
    write_night(store, "thu", 3, [judged("bad", "cleared"), unchanged("good", "mon")])
    write_night(store, "fri", 4, [unchanged("bad", "thu"), unchanged("good", "mon")], since="last")
    assert standing(store) == {"bad": ("cleared", "thu"), "broken": ("error", "wed"), "good": ("cleared", "mon")}


def test_a_trial_with_another_plan_decides_only_until_the_next_night_follows_the_first(store):
    write_night(store, "mon", 0, [judged("bad", "flagged", "weapon"), judged("good", "cleared")])
    write_night(store, "trial", 1, [judged("bad", "cleared"), judged("good", "flagged", "gore")], plan_version="p2")
    assert standing(store) == {"bad": ("cleared", "trial"), "good": ("flagged", "gore", "trial")}
    write_night(store, "wed", 2, [unchanged("bad", "mon", "flagged"), unchanged("good", "mon")], since="last")
    assert standing(store) == {"bad": ("flagged", "weapon", "mon"), "good": ("cleared", "mon")}


def test_known_content_has_the_verdict_of_the_run_that_judged_it_and_so_has_what_is_unchanged_behind_it(store):
    write_night(
        store, "mon", 0, [judged("bad", "flagged", "weapon", sha256="b"), judged("good", "cleared", sha256="g")]
    )
    copies = [
        judged("bad copy", "flagged", "weapon", sha256="b", judged_run_id="mon", judged_outcome="flagged"),
        judged(
            "good copy",
            "skipped",
            sha256="g",
            skip_reason="known content",
            judged_run_id="mon",
            judged_outcome="cleared",
        ),
    ]
    write_night(store, "tue", 1, copies)
    expected = {"bad copy": ("flagged", "weapon", "mon"), "good copy": ("cleared", "mon")}
    assert standing(store) == expected | {"bad": ("flagged", "weapon", "mon"), "good": ("cleared", "mon")}
    for night, run in enumerate(("mon", "tue"), 2):  # whichever of the two an unchanged row names
        write_night(store, f"later {run}", night, [unchanged("bad copy", run, "flagged"), unchanged("good copy", run)])
        assert standing(store) == expected | {"bad": ("flagged", "weapon", "mon"), "good": ("cleared", "mon")}


def test_a_retry_takes_the_place_of_errors_and_of_nothing_else(store):
    failed = [judged(name, "error", error_code="fetch_timeout") for name in ("a", "b", "c")]
    write_night(store, "mon", 0, [*failed, judged("d", "error", error_code="fetch_changed")])
    retried = [judged("a", "flagged", "gore"), judged("b", "cleared"), judged("c", "error", error_code="fetch_denied")]
    write_night(store, "again", 1, [*retried, judged("d", "flagged", "gore", etag="2")], parent_run_id="mon")
    after = {
        "a": ("flagged", "gore", "again"),
        "b": ("cleared", "again"),
        "c": ("error", "mon"),
        "d": ("flagged", "gore", "again"),
    }
    assert standing(store) == after
    assert ask(store, "SELECT count(*) FROM per_image WHERE current AND listed_run_id = 'mon'") == [(4,)]
    # An unchanged object is followed to the retry; a retry of the night before overrules no later verdict.
    names = [
        unchanged("a", "again", "flagged"),
        judged("b", "flagged", "weapon"),
        judged("c", "cleared"),
        unchanged("d", "again", "flagged", etag="2"),
    ]
    write_night(store, "tue", 2, names, since="last")
    write_night(store, "late", 3, [judged("c", "flagged", "gore"), judged("b", "cleared")], parent_run_id="mon")
    assert standing(store) == after | {"b": ("flagged", "weapon", "tue"), "c": ("cleared", "tue")}


def test_sources_are_apart_and_canaries_are_in_none(store):
    write_night(
        store, "mon", 0, [judged("x/1", "flagged", "gore"), judged("y", "flagged", "gore"), judged("x/2", "cleared")]
    )
    below = [
        judged("x/1", "cleared"),
        judged("x/2", "flagged", "weapon"),
        judged("k", "skipped", skip_reason="canary found"),
    ]
    write_night(store, "tue", 1, below, source="s3://b/x/")
    expected = {"x/1": ("cleared", "tue"), "x/2": ("flagged", "weapon", "tue"), "y": ("flagged", "gore", "mon")}
    assert standing(store) == expected
    write_night(store, "wed", 2, [judged("x/2", "cleared")], source="s3://b/x/")
    # Of the larger source's newest night x/1 is still one: nobody has said of it that it is gone.
    assert standing(store) == expected | {"x/1": ("flagged", "gore", "mon"), "x/2": ("cleared", "wed")}


def test_reports_of_an_inventory_are_one_source_whatever_their_date(store):
    report = "s3://b-inventory/b/all/{}T01-00Z/manifest.json"
    write_night(
        store,
        "mon",
        0,
        [judged("a", "flagged", "gore"), judged("b", "flagged", "gore")],
        source=report.format("2026-01-01"),
    )
    write_night(store, "tue", 1, [unchanged("a", "mon", "flagged")], source=report.format("2026-01-02"))
    assert standing(store) == {"a": ("flagged", "gore", "mon"), "b": ("flagged", "gore", "mon")}
    assert ask(store, "SELECT source_uri[8:], current FROM per_image ORDER BY 1") == [("a", True), ("b", False)]
    assert ask(store, "SELECT count(DISTINCT source), count(DISTINCT scope) FROM runs") == [(2, 1)]


def test_runs_of_both_versions_are_one_table_and_unfinished_ones_are_not_there(store):
    old = write_night(store, "old", 0, [judged("a", "flagged", "gore")], version=1)
    write_night(store, "new", 1, [judged("a", "flagged", "gore", sha256="x")], since="last")
    hidden = write_night(store, "hidden", 2, [judged("a", "cleared")])
    store.delete(["runs/hidden.json"])
    store.write("runs/hidden/status.json", b"{}")
    assert "schema_version" not in old and hidden["files"]
    assert ask(store, "SELECT run_id, sha256, CAST(scan_date AS VARCHAR) FROM ledger ORDER BY 1") == [
        ("new", "x", "2026-01-02"),
        ("old", None, "2026-01-01"),
    ]
    columns = "run_id, since, schema_version, nth, newest, plan, listed, flagged, CAST(completed_at AS VARCHAR)"
    assert ask(store, f"SELECT {columns} FROM runs ORDER BY nth") == [
        ("old", None, 1, 0, False, "plan", 1, 1, "2026-01-01 02:00:00+00"),
        ("new", "last", 2, 1, True, "plan", 1, 1, "2026-01-02 02:00:00+00"),
    ]
    for name in ("ledger", "flagged", "errors", "audit"):
        assert [row[0] for row in ask(store, f"DESCRIBE {name}")] == with_scan_date(name).names
    assert [row[0] for row in ask(store, "DESCRIBE runs")] == RUNS.names
    assert ask(store, "SELECT * FROM errors UNION ALL BY NAME SELECT * FROM audit") == []


def test_runs_say_whether_they_are_suspect_and_why_until_somebody_accepts_them(store):
    gates = {"verdicts": [{"gate": "errors"}]}
    odd = [{"gate": "errors", "words": "share of images in error is 0.5"}, {"gate": "flagged:gore", "words": "more"}]
    for night, (run_id, record) in enumerate(
        {
            "before-gates": {},
            "off": {"gates": {"verdicts": []}, "suspect": []},
            "calm": {"gates": gates, "suspect": []},
            "odd": {"gates": gates, "suspect": odd},
        }.items()
    ):
        write_night(store, run_id, night, [judged("a", "cleared")], **record)
    asked = "SELECT run_id, suspect, gates_found FROM runs ORDER BY nth"
    words = ["share of images in error is 0.5", "more"]
    calm = [("before-gates", None, None), ("off", None, None), ("calm", False, [])]
    assert ask(store, asked) == [*calm, ("odd", True, words)]
    store.create(commit.accepted_key("odd"), b"{}")
    assert ask(store, asked) == [*calm, ("odd", False, words)]


def test_runs_say_what_they_cost_by_which_policy_and_what_an_audit_found(store):
    """As records of older versions do not, and as an audit does not that nobody can read."""
    figures, figure = ("recall", "prevalence"), {"value": 0.9, "interval": [0.8, 0.95]}
    nobody = {"value": None, "interval": [0.0, 1.0]}
    paid = {"cost": {"total": 1.5, "currency": "EUR"}, "policy": {"name": "house-rules", "version": "12"}}
    for night, (run_id, record, audit) in enumerate(
        [
            ("old", {}, None),
            ("free", {"cost": None, "policy": None}, {ALL: dict.fromkeys(figures, nobody)}),
            ("paid", paid, {"gore": dict.fromkeys(figures, nobody), ALL: dict.fromkeys(figures, figure)}),
            ("odd", {}, {ALL: "of another program"}),
        ]
    ):
        write_night(store, run_id, night, [judged("a", "cleared")], **record)
        if audit:
            content = {"run_ids": [run_id, "later"], "confidence": 0.95, "estimates": audit}
            commit.write_json(store, commit.audit_key(run_id), content)
    asked = "run_id, cost, currency, policy, policy_version, audited_recall, audited_recall_low, audited_recall_high"
    assert ask(store, f"SELECT {asked}, audited_runs FROM runs ORDER BY nth") == [
        ("old", *[None] * 8),
        ("free", *[None] * 8),
        ("paid", 1.5, "EUR", "house-rules", "12", 0.9, 0.8, 0.95, 2),
        ("odd", *[None] * 8),
    ]


def test_records_are_read_side_by_side(store, monkeypatch):
    """Each of ``READERS`` reads waits until all of them have begun: one after the other would never end."""
    for number in range(READERS):
        write_night(store, f"n{number:02d}", number, [judged("a", "cleared")])
    together, read = threading.Barrier(READERS, timeout=60), Store.read

    def wait(self: Store, key: str, *args: str) -> bytes:
        together.wait()
        return read(self, key, *args)

    monkeypatch.setattr(Store, "read", wait)
    tables = open_tables(store)
    assert tables.runs["run_id"].to_pylist() == [f"n{number:02d}" for number in range(READERS)] and not tables.gone


def test_files_of_other_days_and_runs_are_not_opened(store):
    for night, run in enumerate(("mon", "tue", "wed")):
        write_night(store, run, night, [judged("a", "cleared")])
    tables = open_tables(store)
    for key in store.sizes("ledger"):
        if "tue" not in key:
            store.write(key, b"nobody looks at this")
    with sql_session(tables) as session:
        for condition in ("scan_date = '2026-01-02'", "run_id = 'tue'"):
            assert session.execute(f"SELECT run_id FROM ledger WHERE {condition}").fetchall() == [("tue",)]


def test_what_a_life_cycle_rule_removed_is_named_and_its_rows_are_not_there(store):
    write_night(store, "mon", 0, [judged("a", "flagged", "gore")])
    write_night(store, "tue", 1, [unchanged("a", "mon", "flagged"), judged("b", "cleared")])
    removed = [key for table in ("ledger", "flagged") for key in store.sizes(f"{table}/scan_date=2026-01-01")]
    store.delete(removed)
    assert sorted(open_tables(store).gone) == sorted(removed)
    assert standing(store) == {"a": ("flagged", "mon"), "b": ("cleared", "tue")}


def test_a_run_that_is_compacted_while_its_record_is_read_is_seen_as_it_is_then(store, monkeypatch):
    record = write_night(store, "mon", 0, [judged("a", "cleared")])
    sizes = Store.sizes

    def compact_first(self: Store, prefix: str) -> dict[str, int]:
        """Between the reading of the record and the listing of its files."""
        if prefix == "ledger":
            for file in record["files"]:
                if file["path"].startswith("ledger/"):
                    body = self.read(file["path"])
                    self.delete([file["path"]])
                    file["path"] = file["path"].replace("shard", "compact")
                    self.write(file["path"], body)
            self.write("runs/mon.json", json.dumps(record).encode())
        return sizes(self, prefix)

    monkeypatch.setattr(Store, "sizes", compact_first)
    tables = open_tables(store)
    monkeypatch.undo()
    assert tables.gone == ()
    with sql_session(tables) as session:
        assert session.execute("SELECT count(*) FROM ledger").fetchall() == [(1,)]


def test_an_output_without_a_complete_run_is_wrong_usage(store):
    with pytest.raises(UsageError, match="there is no complete run in"):
        open_tables(store)


@pytest.mark.parametrize("body", [b"{", b"{}", b"[]", b"\xff", b"[" * 100_000])
def test_a_spoilt_record_is_named_with_what_to_do(store, body):
    """An answer that silently leaves a run out would clear what that run had flagged."""
    write_night(store, "mon", 0, [judged("a", "flagged", "gore")])
    write_night(store, "tue", 1, [judged("b", "flagged", "gore")])
    store.write("runs/tue.json", body)
    told = r"runs/tue\.json in .+ is not the JSON that was written there: put it back from a copy, or take it away"
    with pytest.raises(UsageError, match=told):
        open_tables(store)
    with pytest.raises(UsageError, match=told):
        read_queue(store, ("tue",))
    with pytest.raises(UsageError, match=told):
        runs_to_compact(store, (), timedelta())
    expect(run_here(query, "SELECT 1", "--output", store.name), 2, "runs/tue.json")


def test_a_bucket_is_read_like_a_folder(s3_endpoint):
    s3_client(s3_endpoint).create_bucket(Bucket="analysts")
    remote = Store("s3://analysts/some/out", s3_endpoint)
    write_night(remote, "mon", 0, [judged("a b#%.jpg", "flagged", "gore"), judged("c", "cleared")])
    write_night(remote, "tue", 1, [unchanged("a b#%.jpg", "mon", "flagged"), unchanged("c", "mon")])
    assert standing(remote) == {"a b#%.jpg": ("flagged", "gore", "mon"), "c": ("cleared", "mon")}


def test_a_query_is_answered_for_people_and_programs(store):
    write_night(store, "mon", 0, [judged('a,"b"', "flagged", "gore", "weapon"), judged("c\x1b[31m", "cleared")])
    asking = ["--output", store.name]
    statement = "SELECT source_uri, categories, score FROM per_image ORDER BY outcome DESC"
    table = run_here(query, statement, *asking)
    assert table.returncode == 0 and 's3://b/a,"b"' in table.stdout and "\x1b" not in table.stdout
    written = run_here(query, statement, *asking, "--format", "csv").stdout
    rows = list(csv.reader(io.StringIO(written)))
    assert rows[0] == ["source_uri", "categories", "score"] and rows[1][:2] == ['s3://b/a,"b"', '["gore", "weapon"]']
    assert rows[2] == ["s3://b/c\x1b[31m", "[]", ""]
    several = "CREATE TEMP TABLE found AS FROM flagged; SELECT count(*) AS n, max(scan_date) AS at FROM found;"
    lines = run_here(query, *asking, "--format", "json", stdin=several).stdout.splitlines()
    assert [json.loads(line) for line in lines if "at" in line] == [{"n": 2, "at": "2026-01-01"}]


def test_a_spreadsheet_runs_no_cell_of_a_query(store):
    """Numbers stay numbers, and a table of uris is a source again."""
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "plain"]
    write_night(store, "mon", 0, [judged(name, "cleared") for name in names])
    asking = ["--output", store.name, "--format"]
    bare = "SELECT source_uri AS uri, substr(source_uri, 8) AS name, -1.5 AS n, DATE '2026-01-01' AS d FROM ledger"
    rows = list(csv.DictReader(io.StringIO(run_here(query, bare, *asking, "csv").stdout, newline="")))
    assert sorted(row["name"] for row in rows) == sorted(["plain", *(f"'{name}" for name in names[:-1])])
    assert {(row["n"], row["d"]) for row in rows} == {("-1.5", "2026-01-01")}
    assert {row["uri"] for row in rows} == {f"s3://b/{name}" for name in names}
    answered = [json.loads(line)["name"] for line in run_here(query, bare, *asking, "json").stdout.splitlines()]
    assert sorted(answered) == sorted(names)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("SELEC 1", ["syntax error", "SELEC"]),
        ("SELECT colour FROM ledger", ['"colour" not found', "Candidate bindings"]),
        ("INSERT INTO ledger (run_id) VALUES ('x')", ["not an table"]),
        ("FROM ledgers", ["ledgers does not exist", "the views are runs, ledger,", "flagged_latest", "disputed"]),
        ("COPY (SELECT 1) TO '{out}/ledger/x.parquet'", ["Cannot access file", "folders that --files names"]),
        ("COPY (SELECT 1) TO '{files}/../out/ledger/x.parquet'", ["Cannot access file"]),
        ("ATTACH '{out}/x.db'", ["Cannot access file"]),
        ("FROM '/etc/passwd'", ["/etc/passwd"]),
        ("SET enable_external_access = true", ["locked"]),
    ],
)
def test_wrong_statements_and_those_that_would_write_are_one_line(store, tmp_path, statement, words):
    write_night(store, "mon", 0, [judged("a", "cleared")])
    files = tmp_path / "files"
    files.mkdir()
    before = {key: store.read(key) for key in store.sizes("")}
    statement = statement.format(out=tmp_path / "out", files=files)
    expect(run_here(query, statement, "--output", store.name, "--files", str(files)), 2, *words)
    assert {key: store.read(key) for key in store.sizes("")} == before


def test_folders_for_files_have_nothing_in_common_with_the_output(store, tmp_path):
    write_night(store, "mon", 0, [judged("a", "cleared")])
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for folder in (tmp_path, tmp_path / "out", tmp_path / "out/ledger", tmp_path / "link"):
        expect(run_here(query, "SELECT 1", "--output", store.name, "--files", str(folder)), 2, "no query writes there")
    expect(run_here(query, "SELECT 1", "--output", store.name, "--files", str(tmp_path / "no")), 2, "no such folder")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/reviews.csv").write_text("source_uri,label\ns3://b/a,1\n")
    join = f"SELECT label FROM ledger JOIN '{tmp_path}/files/reviews.csv' USING (source_uri)"
    answer = run_here(query, join, "--output", store.name, "--format", "csv", "--files", str(tmp_path / "files"))
    assert answer.stdout == "label\n1\n"


def test_rows_that_are_missing_are_said_to_be(store):
    write_night(store, "mon", 0, [judged("a", "cleared")])
    store.delete(list(store.sizes("ledger")))
    answer = run_here(query, "SELECT count(*) AS n FROM ledger", "--output", store.name, "--format", "csv")
    assert answer.stdout == "n\n0\n" and "1 files of complete runs are gone" in answer.stderr


def test_nights_as_scans_write_them_stand_as_the_page_says(store, tmp_path):
    """The increment's own rows, not ours: unchanged, changed, deleted, and tried again after an error."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.jpg").write_bytes(b"a picture" * (number + 1))
    plan = small_plan(tmp_path, QUICK)
    special = {"1.jpg": "flagged", "2.jpg": "flagged", "3.jpg": "flagged", "4.jpg": "fetch_timeout"}
    scan_by_hand(source, store.name, plan, "mon", lambda name: special.get(name, "cleared"))
    (source / "2.jpg").write_bytes(b"another picture")
    (source / "3.jpg").unlink()
    for run in ("tue", "wed"):
        looked_at: list[str] = []
        scan_by_hand(
            source, store.name, plan, run, lambda name, seen=looked_at: seen.append(name) or "cleared", since="last"
        )
        assert set(looked_at) == ({"2.jpg", "4.jpg"} if run == "tue" else set())
    found = {name.rpartition("/")[2]: verdict for name, verdict in standing(store).items()}
    assert found["1.jpg"] == ("flagged", "automobile", "mon") and found["0.jpg"] == ("cleared", "mon")
    assert found["2.jpg"] == ("cleared", "tue") == found["4.jpg"] and found["3.jpg"] == ("flagged", "automobile", "mon")
    current = ask(store, "SELECT count(*) FILTER (current), count(*) FILTER (NOT current) FROM per_image")
    assert current == [(19, 1)]
    assert ask(store, "SELECT run_id, since, skipped FROM runs ORDER BY nth")[1:] == [
        ("tue", "last", 17),
        ("wed", "last", 19),
    ]
    for run in ("mon", "tue", "wed"):
        compact(store, run)
    assert {name.rpartition("/")[2]: verdict for name, verdict in standing(store).items()} == found
    (source / "5.jpg").unlink()
    scan_by_hand(source, store.name, plan, "thu", lambda name: "flagged", since="last")
    after = {name.rpartition("/")[2]: verdict for name, verdict in standing(store).items()}
    assert after == found  # a compacted night is compared with like any other
