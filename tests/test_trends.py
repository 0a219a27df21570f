"""Run by run: which records a trend is drawn from, what is made of strange ones, and where the points stand."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.output import commit
from pipeline.past.history import RUNS, read_history
from pipeline.past.records import PastRuns
from pipeline.reporting.report import write_report
from pipeline.reporting.trends import HEIGHT, WIDTH, _ticks, charts
from pipeline.store import Store
from tests.outputs import write_night
from tests.test_report import PLAN, Page, run_record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def record(night: int, **changes: Any) -> dict[str, Any]:
    moment = datetime(2026, 3, 1, 2, tzinfo=UTC) + timedelta(days=night)
    named = {
        "run_id": f"n{night:02d}",
        "started_at": moment.isoformat(),
        "scan_date": moment.date().isoformat(),
        "counts": {"listed": 1100, "cleared": 990 - night, "flagged": 10 + night, "error": 100, "skipped": 0},
    }
    return run_record(**named) | changes


def write(store: Store, *records: dict[str, Any]) -> dict[str, Any]:
    for content in records:
        commit.write_json(store, commit.record_key(content["run_id"]), content)
    return records[-1]


def figure(value: float | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    return {"value": value, "interval": [low, high]}


def audit_json(recall: dict[str, Any], prevalence: dict[str, Any], name: str = "all categories") -> dict[str, Any]:
    estimates = {name: {"recall": recall, "prevalence": prevalence, "flagged": 3}}
    return {"run_ids": ["n00", "n01"], "confidence": 0.95, "estimates": estimates, "alarm": None}


def ids(store: Store, last: dict[str, Any]) -> list[str]:
    return [night.run_id for night in read_history(PastRuns(store), last).nights]


def test_runs_over_the_same_source_by_start_up_to_this_one(store):
    last = write(
        store,
        record(0),
        record(2),
        record(1),
        record(3, source="s3://elsewhere/"),
        record(4, parent_run_id="n00"),
        record(6),
        record(5),
    )
    assert ids(store, last) == ["n00", "n01", "n02", "n05"]
    assert ids(store, record(4, parent_run_id="n00")) == ["n00", "n01", "n02"], "a retry is none of them"


def test_of_an_inventory_report_the_date_is_no_other_source(store):
    report = "s3://b/inventory/all/2026-03-0{}T00-00Z/manifest.json"
    last = write(store, record(0, source=report.format(1)), record(1, source=report.format(2)))
    assert ids(store, last) == ["n00", "n01"]


def test_thirty_runs_at_the_most(store):
    last = write(store, *(record(night) for night in range(RUNS + 5)))
    assert ids(store, last) == [f"n{night:02d}" for night in range(5, RUNS + 5)]


def test_figures_of_a_night(store):
    certificate = {"recall": {"a": 0.95, "b": 0.9}, "confidence": 0.95}
    quality = {
        "recall": 0.8, "recall_interval": [0.6, 0.9], "positives": 20, "negatives": 1980, "missed": ["<script>"],
    }  # fmt: skip
    last = write(
        store,
        record(0, relative_cost=None, counts={"listed": 5, "cleared": 0, "flagged": 0, "error": 5, "skipped": 0}),
        record(1, quality=quality, plan={"certificate": certificate, "stages": [{}]}),
        record(2, cost={"currency": "EUR", "total": 12.5, "parts": {}}),
    )
    commit.write_json(
        store, commit.audit_key("n02"), audit_json(figure(0.97, 0.91, 0.99), figure(0.002, 0.001, 0.004), "emblem")
    )
    first, second, third = read_history(PastRuns(store), last).nights
    assert (first.flagged, first.relative_cost, first.prevalence, first.labelled) == (None, None, None, None)
    assert second.flagged is not None and second.flagged.value == 11 / 1000
    assert second.prevalence is not None and second.prevalence.value == 20 / 2000
    assert second.certified is not None and second.certified.value == 0.9
    labelled = second.labelled
    assert labelled is not None and (labelled.value, labelled.low, labelled.high) == (0.8, 0.6, 0.9)
    assert third.audited is not None and (third.audited.value, third.audited.low) == (0.97, 0.91)
    assert third.prevalence is not None and third.prevalence.high == 0.004 and third.audited_runs == 2
    assert third.cost is not None and (third.cost.value, third.currency) == (12.5, "EUR")


STRANGE: list[tuple[Any, str]] = [
    ({"counts": "many"}, "counts: "),
    ({"counts": {"listed": 1, "cleared": -5, "flagged": 1}}, "counts.cleared: "),
    ({"started_at": "yesterday"}, "Invalid isoformat string"),
    ({"started_at": None}, "started_at: "),
    ({"scan_date": "2026-13-45"}, "month must be in 1..12"),
    ({"scan_date": "<script>"}, "scan_date: "),
    ({"run_id": "../other"}, "it names another run"),
    ({"images_per_s": float("nan")}, "images_per_s: "),
    ({"images_per_s": float("inf")}, "images_per_s: "),
    ({"images_per_s": "fast"}, "images_per_s: "),
    ({"relative_cost": 1e300}, "relative_cost: "),
    ({"source": 7}, "source: "),
    ({"quality": {"recall": 2, "recall_interval": [0, 1], "positives": 1, "negatives": 1}}, "quality.recall: "),
    ({"quality": {"recall": 0.5, "recall_interval": [0], "positives": 1, "negatives": 1}}, "quality.recall_interval: "),
    ({"cost": {"currency": "<b>", "total": 1}}, "cost.currency: "),
    ({"plan": {"certificate": {"recall": {"a": "much"}}}}, "plan.certificate.recall.a: "),
]


@pytest.mark.parametrize(("changes", "words"), STRANGE)
def test_a_strange_record_is_left_out_by_name(store, changes, words):
    strange = record(1, **changes)
    store.write(commit.record_key("n01"), json.dumps(strange).encode())
    last = write(store, record(0), record(2))
    history = read_history(PastRuns(store), last)
    assert [night.run_id for night in history.nights] == ["n00", "n02"]
    assert list(history.skipped) == ["run n01"] and words in history.skipped["run n01"]


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[]", b"null", b'"text"', b"[" * 100_000, b"{", b"1" * 5000])
def test_what_is_no_record_is_left_out_by_name(store, body):
    store.write(commit.record_key("n01"), body)
    store.write(commit.audit_key("n00"), body)
    last = write(store, record(0), record(2))
    history = read_history(PastRuns(store), last)
    assert [night.run_id for night in history.nights] == ["n00", "n02"]
    assert set(history.skipped) == {"run n01", "audit of n00"}


def test_an_older_record_counts_as_far_as_it_goes(store):
    write_night(store, "old", 0, [])
    old = commit.read_json(store, commit.record_key("old"))
    assert old is not None and "images_per_s" not in old
    last = write(store, record(70, source="s3://b/", counts=old["counts"] | {"cleared": 5}))
    history = read_history(PastRuns(store), last)
    assert [night.run_id for night in history.nights] == ["n70"]
    assert history.skipped == {"run old": "images_per_s: Field required"}
    # The first version had no quality, plan, cost, or parent.
    first = {key: value for key, value in record(0).items() if key not in ("quality", "plan", "cost", "parent_run_id")}
    assert ids(store, write(store, first, record(1))) == ["n00", "n01"]


# Charts


def drawn(store: Store, *records: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        chart["title"].split(",")[0]: chart for chart in charts(read_history(PastRuns(store), write(store, *records)))
    }


def test_points_stand_where_their_values_are(store):
    found = drawn(store, *(record(night, images_per_s=float(100 * night)) for night in range(21)))
    chart = found["Images per second"]
    (series,) = chart["series"]
    assert [tick for tick, _ in chart["ticks"]] == [0, 1000, 2000]
    first, middle, last = (series["points"][night] for night in (0, 10, 20))
    assert (first["x"], first["y"]) == (0, HEIGHT) and (last["x"], last["y"]) == (WIDTH, 0)
    assert (middle["x"], middle["y"]) == (WIDTH / 2, HEIGHT / 2)
    assert len(series["lines"]) == 1 and series["lines"][0].count(",") == 21
    assert [(end["label"], end["x"], end["anchor"]) for end in chart["ends"]] == [
        ("2026-03-01", 0, "start"), ("2026-03-21", WIDTH, "end")
    ]  # fmt: skip


def at(number: int, moment: str) -> dict[str, Any]:
    return record(number, scan_date=moment[:10], started_at=f"{moment}:00+00:00")


@pytest.mark.parametrize(
    ("moments", "labels"),
    [
        (["2026-03-01T02:00", "2026-03-02T02:00"], ["2026-03-01 to 2026-03-02"]),
        (["2026-03-01T02:00", "2026-03-01T14:30"], ["2026-03-01 02:00 to 14:30"]),
        (["2026-03-01T02:00", "2026-03-02T02:00", "2026-03-02T14:30"], ["2026-03-01 to 2026-03-02 14:30"]),
        (
            [f"2026-03-01T{hour:02d}:00" for hour in range(12)],
            ["2026-03-01 00:00", "2026-03-01 11:00"],
        ),
    ],
)
def test_days_with_several_runs_are_told_apart_by_the_time(store, moments, labels):
    chart = drawn(store, *(at(number, moment) for number, moment in enumerate(moments)))["Images per second"]
    assert [end["label"] for end in chart["ends"]] == labels
    assert len(set(chart["moments"])) == len(moments)


def test_a_line_does_not_pass_over_a_night_without_the_figure(store):
    costs = [0.1, 0.2, None, 0.3, None, 0.4, 0.5]
    found = drawn(store, *(record(night, relative_cost=cost) for night, cost in enumerate(costs)))
    (series,) = found["Relative cost"]["series"]
    assert [point["night"] for point in series["points"]] == [0, 1, 3, 5, 6]
    assert [line.count(",") for line in series["lines"]] == [2, 2]


def test_a_chart_needs_a_figure_and_two_runs(store):
    assert drawn(store, record(0)) == {}
    assert list(drawn(store, record(0), record(1))) == ["Flagged", "Relative cost", "Images per second"]


def test_another_plan_is_marked_where_it_begins(store):
    versions = ["aaaa", "aaaa", "bbbb", "bbbb", "aaaa"]
    found = drawn(store, *(record(night, plan_version=version) for night, version in enumerate(versions)))
    changes = found["Flagged"]["changes"]
    assert [(change["before"], change["after"], change["run_id"]) for change in changes] == [
        ("aaaa", "bbbb", "n02"), ("bbbb", "aaaa", "n04")
    ]  # fmt: skip
    points = found["Flagged"]["series"][0]["points"]
    assert points[1]["x"] < changes[0]["x"] < points[2]["x"] and points[3]["x"] < changes[1]["x"] < points[4]["x"]


def test_costs_in_another_currency_than_the_last_are_not_drawn(store):
    def cost(currency: str, total: float) -> dict[str, Any]:
        return {"cost": {"currency": currency, "total": total}}

    found = drawn(store, record(0, **cost("USD", 900)), record(1, **cost("EUR", 4)), record(2, **cost("EUR", 5)))
    (series,) = found["Cost in EUR"]["series"]
    assert [(point["night"], point["value"].value) for point in series["points"]] == [(1, 4), (2, 5)]


def test_recall_has_its_bound_and_its_intervals_on_an_axis_of_its_own(store):
    certified = {"plan": {"certificate": {"recall": {"a": 0.95}}}}
    write(store, record(0), record(1))
    commit.write_json(store, commit.audit_key("n01"), audit_json(figure(0.97, 0.92, 0.99), figure(0.01, 0.005, 0.02)))
    found = drawn(store, record(0, **certified), record(1, **certified))
    chart = found["Recall"]
    assert [series["kind"] for series in chart["series"]] == ["certified", "audited"]
    assert 0.85 < chart["ticks"][0][0] <= 0.92 and chart["ticks"][-1][0] == pytest.approx(1.0)
    (point,) = chart["series"][1]["points"]
    assert point["interval"][0] > point["y"] > point["interval"][1] >= 0
    # What never moves has an axis too.
    assert found["Item prevalence"]["series"][0]["points"][0]["value"].high == 0.02


@pytest.mark.parametrize(
    ("least", "most", "ticks"),
    [
        (0, 0, [0, 0.5]), (0, 7.3, [0, 2.5, 5, 7.5]), (0.9, 1.0, [0.9, 0.95, 1.0]), (0, 1e-9, [0, 5e-10, 1e-9]),
        (0, 3e14, [0, 1e14, 2e14, 3e14]), (0.98, 1.0, [0.98, 0.99, 1.0]),
    ],
)  # fmt: skip
def test_ticks_are_round_and_few_and_around_all(least, most, ticks):
    assert _ticks(least, most) == pytest.approx(ticks)


# In the report


def page_of(store: Store, last: dict[str, Any]) -> Page:
    write_report(store, last, PLAN, None, thumbnails=False)
    return Page(store.read(commit.report_key(last["run_id"])).decode())


def test_the_report_draws_them_and_escapes_what_records_say(store):
    nights = [record(night, plan_version=PLAN.version if night else "<old&>") for night in range(3)]
    write(store, *nights, record(40, source="s3://elsewhere/"))
    store.write(commit.record_key("<b>n&'\""), b"{}")
    page = page_of(store, nights[-1])
    assert "The last 3 complete runs over this source" in page.text
    labels = [label for label in page.values("aria-label") if label.endswith("run by run")]
    assert labels == [
        "Flagged, of what was judged, run by run", "Relative cost, run by run", "Images per second, run by run"
    ]  # fmt: skip
    assert page.source.count("<polyline") == 3 and page.source.count("<circle") == 9
    assert f"plan version {PLAN.version} from run n01 on, before it <old&>" in page.text
    assert "&lt;old&amp;&gt;" in page.source and "<b>n" not in page.source
    assert "Left out, for they are not as records are written" in page.text and "run <b>n&'\"" in page.text
    assert not re.search(r"<script|<a |https?://|url\(", page.source)


def test_the_first_run_over_a_source_has_no_trend(store):
    page = page_of(store, record(0))
    assert "This is the first complete run over this source" in page.text and "<polyline" not in page.source


def test_labels_below_a_chart_touch_neither_each_other_nor_its_border(store, chromium):
    """As a browser sets them, from two runs a day to as many as are drawn."""
    for runs, span in ((2, 24), (2, 12), (9, 24), (10, 12), (30, 12), (30, 24)):
        first = datetime(2026, 3, 1, 2, tzinfo=UTC)
        shown = [at(n, (first + timedelta(hours=span * n)).isoformat()[:16]) for n in range(runs)]
        page = chromium.new_page()
        page.set_content(page_of(store, write(store, *shown)).source)
        boxes = page.eval_on_selector_all(
            'svg[aria-label$="run by run"]',
            """charts => charts.map(chart => [chart, ...chart.querySelectorAll("text:not([x='-6'])")].map(
                part => { const box = part.getBoundingClientRect(); return [box.left, box.right] }))""",
        )
        page.close()
        assert len(boxes) == 3
        for (left, right), *labels in boxes:
            ends = [edge for label in labels for edge in label]
            assert 1 <= len(labels) <= 2 and [left, *ends, right] == sorted([left, *ends, right]), (runs, span)
