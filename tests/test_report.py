"""The report page: its numbers, and that nothing a file is named can do anything in it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from PIL import Image

from pipeline import schema
from pipeline.codes import CODES
from pipeline.output.sink import table_bytes
from pipeline.plan import Plan, StageSpec
from pipeline.reporting import report
from pipeline.reporting.histogram import Scores
from pipeline.reporting.report import write_report
from pipeline.steps import decode, fetch, picture, stages
from pipeline.storage import Location
from pipeline.store import Store, digest

HOSTILE = [
    "s3://uploads/<script>alert(1)</script>.jpg",
    's3://uploads/" onerror="alert(1).jpg',
    "s3://uploads/two\nlines' & more.jpg",
    "s3://uploads/exe.\u202egpj",
]
# Line breaks and marks that turn text around are shown as escapes.
SHOWN = [*HOSTILE[:2], r"s3://uploads/two\nlines' & more.jpg", r"s3://uploads/exe.\u202egpj"]

PLAN = Plan.model_validate(
    {
        "name": "plan <b>",
        "categories": ["emblem"],
        "stages": [
            {
                "name": "screen",
                "model": "tree",
                "rounds": [16, 4],
                "thresholds": {"emblem": [0.02, 0.1]},
                "input_size": 64,
            },
            {"name": "retest", "model": "alone", "rounds": [1], "thresholds": {"emblem": [0.6]}, "input_size": 96},
        ],
    }
)
HISTORY = [("screen", 0, 16, 0.5, 0.02), ("screen", 1, 4, 0.7, 0.1), ("retest", 0, 1, 0.9, 0.6)]


class Page(HTMLParser):
    """What a browser would make of the page: elements with attributes, text, and tables cell by cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.source = page
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, corner: str) -> dict[str, list[str]]:
        """The table whose first column has this head: first cell to the others."""
        (table,) = (table for table in self.tables if table[0][0] == corner)
        return {row[0]: row[1:] for row in table[1:]}

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]

    def figure(self, label: str) -> str:
        (value,) = re.findall(f'<div class="label">{label}</div><div class="value">([^<]*)</div>', self.source)
        return value

    def bars(self, number: int) -> list[str]:
        """Tooltips of the bars of one chart."""
        chart = self.source.split("<svg")[number + 1].split("</svg>")[0]
        return re.findall(r"<rect[^>]*><title>([^<]*)</title>", chart)


def cleared(index: int, score: float, stage: str = "screen", number: int = 0) -> dict[str, Any]:
    return {
        "image_id": f"c{index}",
        "outcome": "cleared",
        "decided_stage": stage,
        "decided_round": number,
        "group_score": score,
    }


def flagged(index: int, uri: str, score: float = 0.9, size: int | None = None) -> dict[str, Any]:
    keys = ("stage", "round", "group_size", "score", "threshold")
    return {
        "image_id": f"f{index:03d}",
        "source_uri": uri,
        "size_bytes": size,
        "category": "emblem",
        "score": score,
        "threshold": 0.6,
        "decided_stage": "retest",
        "stages": [dict(zip(keys, test, strict=True)) for test in HISTORY],
    }


LEDGER = [*(cleared(index, 0.001) for index in range(30)), cleared(30, 0.0199), cleared(31, 0.09, number=1)]


def work(
    images_in: int,
    images_out: int,
    tests: int = 0,
    positive: int = 0,
    gmac: float = 0,
    seconds: float = 0,
    **spent: float,
) -> dict:
    return {
        "images_in": images_in,
        "images_out": images_out,
        "tests": tests,
        "positive_tests": positive,
        "gmac": gmac,
        "seconds": seconds,
    } | spent


def run_record(**changes: Any) -> dict[str, Any]:
    screen = [
        {"group_size": 16} | work(2000, 160, 125, 10, 250, 50, transfer_seconds=8),
        {"group_size": 4} | work(160, 40, 40, 10, 10, 5),
    ]
    retest = [{"group_size": 1} | work(40, 4, 40, 4, 80, 45)]
    rounds = [("screen", 0, screen[0]), ("screen", 1, screen[1]), ("retest", 0, retest[0])]
    return {
        "status": "complete",
        "run_id": "night-1",
        "source": "s3://uploads/",
        "scan_date": "2026-01-02",
        "started_at": "2026-01-02T03:04:05.678+00:00",
        "updated_at": "2026-01-02T03:06:05+00:00",
        "plan_version": PLAN.version,
        "weights_sha256": {"screen": "aa" * 32, "retest": "bb" * 32},
        "counts": {"listed": 2010, "cleared": 1996, "flagged": 4, "error": 10, "skipped": 0},
        "errors": {"truncated": 7, "fetch_denied": 3},
        "operators": [
            {"operator": "fetch", "round": None} | work(2010, 2007, seconds=20),
            {"operator": "decode:screen", "round": None} | work(2007, 2000, seconds=80, waited_seconds=20),
            *({"operator": stage, "round": number} | entry for stage, number, entry in rounds),
        ],
        "stages": [
            {"name": "screen", "rounds": screen, "bursts": None, **work(2000, 40, 165, gmac=260, seconds=55)},
            {"name": "retest", "rounds": retest, "bursts": None, **work(40, 4, 40, gmac=80, seconds=45)},
        ],
        "individual_gmac": 2.0,
        "relative_cost": 0.085,
        "seconds": 120.0,
        "startup_seconds": 8.25,
        "images_per_s": 16.75,
        "quality": None,
        "files": [],
    } | changes


Render = Callable[..., Page]


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """Writes tables (each a list of shards) and a report of them, and reads the page back."""
    store = Store(str(tmp_path / "out"))

    def build(
        flagged_shards: list[list[dict]], ledger: list[dict] = LEDGER, *, thumbnails: bool = False, **changes: Any
    ) -> Page:
        files = [{"path": "errors/scan_date=2026-01-02/never-written.parquet", "rows": 0, "bytes": 5}]
        for name, shards in (("ledger", [ledger[:10], ledger[10:]]), ("flagged", flagged_shards)):
            for index, rows in enumerate(shards):
                path = f"{name}/scan_date=2026-01-02/night-1-shard-{index:05d}.parquet"
                body = table_bytes(pa.Table.from_pylist(rows, schema.TABLES[name]))
                store.write(path, body)
                files.append({"path": path, "rows": len(rows), "bytes": len(body), "sha256": digest(body)})
        uri = write_report(store, run_record(files=files) | changes, PLAN, None, thumbnails=thumbnails)
        assert uri == store.uri_of("runs/night-1/report.html")
        return Page(store.read("runs/night-1/report.html").decode())

    return build


HOSTILE_ROWS = [flagged(index, uri, 0.9 - index / 100) for index, uri in enumerate(HOSTILE)]


def test_headline_and_key_figures(render: Render) -> None:
    page = render([HOSTILE_ROWS])
    assert [page.figure(label) for label in ("Listed", "Flagged", "Cleared", "Errors", "Skipped")] == [
        "2,010", "4", "1,996", "10", "0"
    ]  # fmt: skip
    assert page.figure("Relative cost") == "0.085"
    assert page.figure("Images per second") == "16.8"
    assert page.figure("Duration") == "2 min 00 s"
    assert "of it start-up 8.2 s" in page.text
    assert "2026-01-02 03:04:05 UTC to 2026-01-02 03:06:05 UTC" in page.text
    assert f"plan <b> version {PLAN.version}" in page.text
    assert "took 340 GMAC" in page.text
    assert "would have taken\n4,000: this scan did 8.50 % of that work" in page.text


def test_funnel_times_errors_and_digests(render: Render) -> None:
    page = render([HOSTILE_ROWS])
    steps = page.table("Step")
    assert list(steps) == ["fetch", "decode for screen", "screen, round 1", "screen, round 2", "retest, round 1"]
    assert steps["decode for screen"] == ["", "2,007", "2,000", "", "", "", "", "80.0 s"]
    assert steps["screen, round 1"] == ["", "2,000", "160", "16", "125", "8.00 %", "250", "50.0 s"]
    assert steps["retest, round 1"] == ["", "40", "4", "1", "40", "10.00 %", "80", "45.0 s"]
    assert page.table("Operator") == {
        "fetch": ["", "20.0 s", "10.00 %", "–", "–", "–", "2,010", "100"],
        "decode:screen": ["", "80.0 s", "40.00 %", "–", "20.0 s", "80.00 %", "2,007", "25.1"],
        "screen": ["", "55.0 s", "27.50 %", "8.0 s", "–", "–", "2,000", "36.4"],
        "retest": ["", "45.0 s", "22.50 %", "–", "–", "–", "40", "0.889"],
    }
    assert page.table("Code") == {
        "truncated": ["7", CODES["truncated"].meaning],
        "fetch_denied": ["3", CODES["fetch_denied"].meaning],
    }
    assert page.table("Stage") == {"screen": ["tree", "aa" * 32], "retest": ["alone", "bb" * 32]}


@pytest.mark.parametrize(("decided", "scale", "width"), [(1000, "linear", "50.0%"), (1998, "log", "14.45%")])
def test_bars_are_on_the_scale_that_can_be_read(render: Render, decided: int, scale: str, width: str) -> None:
    operators = [{"operator": "fetch", "round": None} | work(2000, 2000 - decided, seconds=1)]
    page = render([[]], operators=operators, stages=_idle_stages())
    assert f"on a {scale} scale" in page.text
    assert page.values("style")[:2] == ["width:100.0%", f"width:{width}"]


def _idle_stages() -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "rounds": [{"group_size": size} | work(0, 0) for size in stage.rounds],
            "bursts": None,
            **work(0, 0),
        }
        for stage in PLAN.stages
    ]


def test_windows_that_fell_back_are_counted_for_stages_with_a_rule(render: Render) -> None:
    stages = run_record()["stages"]
    stages[0]["bursts"] = 1200
    page = render([HOSTILE_ROWS], stages=stages, windows=40_000)
    assert "Stage screen, windows that fell back: 1,200 of 40,000." in page.text
    assert page.text.count("fell back") == 1 and "fell back" not in render([HOSTILE_ROWS]).text


def test_hostile_names_are_text_and_nothing_else(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(location: Location, endpoint_url: str | None) -> bytes:
        raise OSError(f"cannot read {location.uri}")

    # Error texts repeat names; and no test may ask AWS for anything.
    monkeypatch.setattr(report, "read_object", refuse)
    quality = {
        "recall": 0.5,
        "recall_interval": (0.1, 0.9),
        "false_positive_rate": 0.0,
        "false_positive_rate_interval": (0.0, 0.01),
        "positives": 8,
        "negatives": 2000,
        "unlabelled": 0,
        "missed": HOSTILE,
    }
    page = render([HOSTILE_ROWS], quality=quality, source="s3://<img src=x>/", thumbnails=True)
    assert [row[0] for row in page.table("#").values()] == SHOWN
    assert all(f"\n{name}\n" in page.text for name in SHOWN)
    assert f"not fetched: cannot read {SHOWN[0]}" in page.text
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "a"}
    assert "<script" not in page.source.lower()
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_page_asks_nothing_of_the_network(render: Render, tmp_path: Path) -> None:
    uri, size = _write_picture(tmp_path / "a.png")
    page = render([[flagged(0, uri, size=size)]], thumbnails=True)
    policy = page.elements[[attrs.get("http-equiv") for _, attrs in page.elements].index("Content-Security-Policy")]
    assert {"default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"} <= set(policy[1]["content"].split("; "))
    addresses = [value for name in ("src", "href", "xlink:href", "srcset", "action") for value in page.values(name)]
    assert len(addresses) == 1 and addresses[0].startswith("data:image/jpeg;base64,")
    assert not re.search(r"https?://|url\(|@import", page.source)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_in_a_browser_hostile_names_do_nothing_and_nothing_is_asked_for(
    render: Render, tmp_path: Path, chromium: Any, width: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, size = _write_picture(tmp_path / "a.png")
    here = report.read_object

    def refuse(location: Location, endpoint_url: str | None) -> bytes:
        if location.bucket:
            raise OSError(f"cannot read {location.uri}")
        return here(location, endpoint_url)

    monkeypatch.setattr(report, "read_object", refuse)
    rows = [*HOSTILE_ROWS, flagged(9, uri, 0.5, size)]
    render([rows], thumbnails=True, source="s3://<img src=x onerror=alert(1)>/", operators=[], errors={})
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    trouble: list[str] = []
    address = (tmp_path / "out" / "runs" / "night-1" / "report.html").as_uri()
    page.on("request", lambda sent: sent.url.startswith((address, "data:")) or trouble.append(sent.url))
    page.on("console", lambda line: trouble.append(line.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    # Text as a reader sees it: names are there letter by letter, and made no element.
    text = page.inner_text("body")
    assert all(name in text for name in SHOWN) and "<img src=x onerror=alert(1)>" in text
    assert page.locator("script, iframe, object, embed, a, form, img:not([src^='data:image/jpeg'])").count() == 0
    assert page.eval_on_selector("img", "picture => picture.naturalWidth") == 128
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # A name that had become a script could not run: the page's own policy stops it.
    trouble_before = list(trouble)
    page.evaluate(
        "() => { const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        "document.body.append(script); }"
    )
    assert page.evaluate("window.ran") is None
    context.close()
    assert trouble_before == []


def _write_picture(path: Path) -> tuple[str, int]:
    Image.new("RGB", (300, 200), (200, 30, 30)).save(path)
    return Location(None, str(path)).uri, path.stat().st_size


def test_thumbnails_only_when_asked_for(render: Render, tmp_path: Path) -> None:
    uri, size = _write_picture(tmp_path / "<b> & more.png")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    gone = flagged(1, Location(None, str(tmp_path / "gone.jpg")).uri, 0.8)
    rows = [flagged(0, uri, size=size), gone, flagged(2, Location(None, str(broken)).uri, 0.7), flagged(3, uri, 0.6, 1)]

    page = render([rows], thumbnails=True)
    (data,) = page.values("src")
    image = Image.open(io.BytesIO(base64.b64decode(data.removeprefix("data:image/jpeg;base64,"))))
    assert (image.format, image.size) == ("JPEG", (128, 128))
    assert all(abs(a - b) < 6 for a, b in zip(image.getpixel((64, 64)), (200, 30, 30), strict=True))
    problems = re.findall(r'<div class="missing">([^<]*)<', page.source)
    assert problems == ["gone since the scan", "not decoded: not_an_image", "changed since the scan"]
    assert "Pictures are not shown" not in page.text

    page = render([rows])
    assert not page.values("src")
    assert "Pictures are not shown" in page.text


def test_quality(render: Render) -> None:
    quality = {
        "recall": 0.975,
        "recall_interval": (0.9128, 0.997),
        "false_positive_rate": 0.0005,
        "false_positive_rate_interval": (0.00006, 0.0018),
        "positives": 80,
        "negatives": 4000,
        "unlabelled": 3,
        "missed": [f"s3://uploads/missed-{index:03d}.jpg" for index in range(25)],
    }
    page = render([HOSTILE_ROWS], quality=quality)
    assert page.table("Against the labels")["Recall"] == ["97.50 %", "91.28 % to 99.70 %", "80 violating"]
    assert page.table("Against the labels")["False-positive rate"] == [
        "0.0500 %",
        "0.0060 % to 0.18 %",
        "4,000 not violating",
    ]
    assert "3 images have no label" in page.text
    assert "missed-019.jpg" in page.text and "missed-020.jpg" not in page.text

    nobody = quality | {"recall": None, "positives": 0, "missed": []}
    assert render([HOSTILE_ROWS], quality=nobody).table("Against the labels")["Recall"][0] == "–"
    unknown = nobody | {"false_positive_rate": None, "negatives": 0}
    assert "they name none of the 2,010 images" in render([HOSTILE_ROWS], quality=unknown).text


def test_without_labels_there_is_no_quality(render: Render) -> None:
    assert "Recall" not in render([HOSTILE_ROWS], quality=None).text


def test_nothing_flagged(render: Render) -> None:
    counts = {"listed": 2000, "cleared": 2000, "flagged": 0, "error": 0, "skipped": 0}
    page = render([[]], thumbnails=True, counts=counts, errors={})
    assert page.figure("Flagged") == "0"
    assert "No image was flagged." in page.text
    assert "every image that was not skipped has been judged" in page.text


def test_everything_an_error(render: Render) -> None:
    counts = {"listed": 10, "cleared": 0, "flagged": 0, "error": 10, "skipped": 0}
    page = render([[]], ledger=[], counts=counts, stages=_idle_stages(), operators=[], relative_cost=None)
    assert page.figure("Relative cost") == "–"
    assert "No image reached the first stage" in page.text
    assert [page.bars(number) for number in range(3)] == [[], [], []]


def test_a_plan_that_did_not_pay_is_said_so(render: Render) -> None:
    assert "cost 1.30 times as much, so the plan did not pay" in render([HOSTILE_ROWS], relative_cost=1.3).text


def test_no_bar_holds_scores_of_both_sides_of_a_threshold(render: Render) -> None:
    ledger = [*LEDGER, cleared(40, 0.59999, "retest"), cleared(41, 1e-12, "retest")]
    rows = [flagged(0, "s3://uploads/a.jpg"), flagged(1, "s3://uploads/b.jpg")]
    rows[0]["stages"][2]["score"], rows[1]["stages"][2]["score"] = 0.6, 1.0
    page = render([rows], ledger)
    first, second, last = (page.bars(number) for number in range(3))
    assert [bar.split(",")[0] for bar in first] == ["30 cleared", "1 cleared", "2 flagged"]
    assert first[1].endswith("to 0.02")
    assert [bar.split(",")[0] for bar in second] == ["1 cleared", "2 flagged"]
    assert [bar.split(",")[0] for bar in last] == ["1 cleared", "1 cleared", "1 flagged", "1 flagged"]
    assert last[1].endswith("to 0.6") and "score 0.6 to" in last[2]
    assert "score 0 to" in last[0] and last[3].endswith("to 1")


def test_thresholds_of_all_categories_part_the_bars() -> None:
    limits = {"gore": (0.5,), "weapon": (0.513,), "spam": (0.5,)}
    stage = StageSpec.model_validate({"name": "s", "model": "m", "rounds": [1], "thresholds": limits, "input_size": 80})
    scores = Scores((stage,))
    found = [0.4999, 0.5, 0.5129, 0.513, 0.999999]
    scores.add("cleared", pa.table({"stage": ["s"] * 5, "round": [0] * 5, "score": found}))
    (chart,) = scores.charts()
    bars = [(bar["count"], round(bar["low"], 4), round(bar["high"], 4)) for bar in chart["bars"]["cleared"]]
    assert [bar[0] for bar in bars] == [1, 2, 1, 1] and [bars[1][1], *bars[1][2:], bars[2][1]] == [0.5, 0.513, 0.513]
    assert all(bar["width"] > 0 for bar in chart["bars"]["cleared"])


def test_the_top_is_taken_over_all_files(render: Render) -> None:
    rows = [flagged(index, f"s3://uploads/{index:03d}.jpg", 0.6 + index / 1000) for index in range(160)]
    page = render([rows[::2], rows[1::2]], counts=run_record()["counts"] | {"flagged": 160})
    names = [row[0] for row in page.table("#").values()]
    assert names == [f"s3://uploads/{index:03d}.jpg" for index in range(159, 59, -1)]
    assert "The 100 highest scores" in page.text


def test_the_same_run_gives_the_same_bytes(render: Render) -> None:
    assert render([HOSTILE_ROWS]).source == render([HOSTILE_ROWS]).source


def test_every_error_code_is_explained() -> None:
    codes = set(get_args(picture.ErrorCode))
    for module in (fetch, decode, stages):
        source = Path(module.__file__ or "").read_text()
        codes |= set(re.findall(r'(?:FetchError|\.fail)\(\s*"(\w+)"', source))
        codes |= set(re.findall(r'(?:\d{3}: |FetchError\()"(\w+)"', source))
        codes |= set(re.findall(r'FetchError\("(\w+)" if', source)) | set(re.findall(r'else "(fetch_\w+)"', source))
    assert len(codes) > 10
    assert codes == set(CODES)
