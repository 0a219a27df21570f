"""What a scan tells: the same events as lines for people and as JSON for machines. No Ray."""

from __future__ import annotations

import io
import json
import logging
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from jobs import scan, status
from pipeline.errors import RunError, UsageError
from pipeline.reporting import events
from pipeline.reporting.events import Events, configure
from pipeline.store import Store
from tests.conftest import QUICK, small_plan
from tests.outputs import run_here, scan_by_hand


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.delenv(events.VARIABLE, raising=False)
    yield
    configure(None)


@pytest.fixture
def night(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        (source / f"{number:02d}.jpg").write_bytes(b"a picture")
    plan = small_plan(tmp_path, QUICK)

    def run(run_id: str, verdict: str = "cleared", **options: object) -> dict:
        decide = lambda name: verdict if name < "10" else "cleared"  # noqa: E731
        return scan_by_hand(source, str(tmp_path / "out"), plan, run_id, decide, **({"shard_size": 16} | options))

    return run


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_what_they_were(night, capsys):
    night("r")
    assert capsys.readouterr().out.splitlines() == [
        "run r: scanning 40 images",
        "shard 0 committed (1 of 3)",
        "shard 1 committed (2 of 3)",
        "shard 2 committed (3 of 3)",
    ]


def test_a_deadline_that_cannot_be_kept_is_told_when_the_scan_begins(night, capsys):
    night("r", shard_size=64, deadline="2999-01-01")
    warned, begun = capsys.readouterr().out.splitlines()
    assert warned.startswith(
        "run r: --deadline cannot stop this start: it stops between shards, and there is one of 40"
    )
    assert begun == "run r: scanning 40 images"
    configure("json")
    night("s", shard_size=64, limit_cost=1e9)
    told = [entry for entry in objects(capsys.readouterr().out) if entry["level"] == "warning"]
    assert [entry["event"] for entry in told] == ["unbounded"]
    night("t", deadline="2999-01-01")
    assert "cannot stop" not in capsys.readouterr().out


def test_the_same_events_are_objects(night, capsys):
    configure("json")
    record = night("r", "flagged")
    told = objects(capsys.readouterr().out)
    assert [entry["event"] for entry in told] == [
        "listed", "started", "shard_committed", "shard_committed", "shard_committed", "complete",
    ]  # fmt: skip
    assert all(entry["run_id"] == "r" and entry["level"] == "info" for entry in told)
    moments = [datetime.fromisoformat(entry["ts"]) for entry in told]
    assert moments == sorted(moments) and all(moment.tzinfo for moment in moments)
    assert (told[0]["listed"], told[0]["shards"]) == (40, 3) and told[1]["message"] == "run r: scanning 40 images"
    assert [(entry["shard"], entry["images"], entry["done"]) for entry in told[2:5]] == [
        (0, 16, 1),
        (1, 16, 2),
        (2, 8, 3),
    ]
    assert told[-1]["counts"] == record["counts"] and told[-1]["relative_cost"] == record["relative_cost"]


def test_a_failure_is_an_error_with_its_reason(night, capsys):
    configure("json")
    with pytest.raises(RunError):
        night("r", "fetch_denied", max_outage=0.0)
    said = capsys.readouterr()
    (failed,) = objects(said.err)
    assert (failed["event"], failed["level"], failed["run_id"]) == ("failed", "error", "r")
    assert "over the limit of 0" in failed["reason"]
    assert "complete" not in said.out


def test_a_job_that_ends_with_an_error_says_so_in_the_format_that_was_asked_for(tmp_path, monkeypatch):
    Store(str(tmp_path)).write("runs/begun/status.json", b"{}")
    wrong = ("--output", str(tmp_path), "--run-id", "none")
    assert run_here(status, *wrong).stderr.startswith("jobs.status: there is no run 'none'")
    monkeypatch.setenv(events.VARIABLE, "json")
    (said,) = objects(run_here(status, *wrong).stderr)
    assert (said["event"], said["exit_code"]) == ("ended", 2) and "there is no run 'none'" in said["message"]


def test_the_flag_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv(events.VARIABLE, "json")
    configure(None)
    assert events.told_as_json()
    configure("text")
    assert not events.told_as_json()
    monkeypatch.setenv(events.VARIABLE, "xml")
    with pytest.raises(UsageError, match="DORFMAN_LOG_FORMAT is 'xml': give one of text, json"):
        configure(None)
    monkeypatch.delenv(events.VARIABLE)
    refused = run_here(scan, "--source", "x", "--log-format", "xml")
    assert refused.returncode == 2 and "--log-format" in refused.stderr


def test_a_sentence_is_shown_as_it_is():
    out = io.StringIO()
    Events("r", Console(file=out, width=40)).tell(
        "x", "a [bold]name[/bold] that is longer than the console is wide", a=1
    )
    assert out.getvalue() == "a [bold]name[/bold] that is longer than the console is wide\n"
    out.truncate(0)
    Events("r", Console(file=out)).tell("machines only", level=logging.WARNING)
    assert out.getvalue().strip("\0") == ""
