"""What a scan costs: what was there to be paid for, the arithmetic, and what record, report and closing table say."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from jobs import scan as job
from pipeline.errors import UsageError
from pipeline.output import commit
from pipeline.reporting.prices import Meter, cost_of, cost_rows, money, read_prices, resources
from pipeline.reporting.progress import closing_table
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.store import Store, digest
from tests.conftest import QUICK, small_plan
from tests.outputs import run_here, scan_by_hand

ROOT = Path(__file__).parents[1]
TABLE: dict[str, Any] = {
    "name": "ours", "currency": "EUR", "cpu_hour": 0.02, "gpu_hour": 0.5, "million_gets": 0.4, "million_puts": 5.0
}  # fmt: skip
PRICES = TABLE | {"storage_gb_month": None, "sha256": "ab" * 32}


def write(folder: Path, content: Any) -> str:
    path = folder / "prices.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_a_table_is_read_with_the_digest_of_its_file(tmp_path):
    path = write(tmp_path, TABLE)
    assert read_prices(path, None) == PRICES | {"sha256": digest(Path(path).read_bytes())}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"currency": "euros"}, "currency: 'euros' is not three capital letters, as in EUR"),
        ({"cpu_hour": -0.1}, "cpu_hour is -0.1, but at least 0 is wanted"),
        ({"million_gets": float("inf")}, "million_gets is inf, but a finite number is wanted"),
        ({"gpu": 1}, "gpu is no field; known there: name, currency, cpu_hour, gpu_hour, million_gets"),
        ({"million_puts": None}, "million_puts is nothing, but a number is wanted, written as 0.5"),
        ({"cpu_hour": "0,04"}, "cpu_hour is '0,04', but a number is wanted, written as 0.5"),
        ({"cpu_hour": True}, "cpu_hour: yes is a switch, but a number is wanted"),
        ({"cpu_hour": {"EUR": 1}}, "cpu_hour is a mapping, but a number is wanted"),
        ({"name": "my prices"}, "name: 'my prices' is not a letter or digit, then up to 63"),
        ({"currency": None}, "currency is nothing, but text is wanted"),
        ({"currency": "x" * 100}, "currency: 'x{59}... is not three"),
    ],
)
def test_a_table_that_is_wrong_is_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words) as caught:
        read_prices(write(tmp_path, TABLE | changes), None)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("prices ")


def test_a_table_without_a_currency_or_of_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="currency is missing; give it"):
        read_prices(write(tmp_path, {name: value for name, value in TABLE.items() if name != "currency"}), None)
    (tmp_path / "prices.yaml").write_text("")
    with pytest.raises(UsageError, match=r"prices\.yaml is empty, but it must hold fields"):
        read_prices(str(tmp_path / "prices.yaml"), None)


def test_the_example_is_a_price_table_and_says_that_it_is_no_offer():
    path = ROOT / "docs/deploy/prices.yaml"
    assert read_prices(str(path), None)["storage_gb_month"] == 0.023
    assert "NOT OFFERS" in path.read_text()


# What was there


class Cluster:
    """Of a size, at a time, that the test sets."""

    def __init__(self) -> None:
        self.size: tuple[float, float] | None = None
        self.time = 0.0
        self.looks = 0

    def look(self) -> tuple[float, float] | None:
        self.looks += 1
        return self.size

    def at(self, seconds: float, *size: float) -> None:
        self.time = seconds
        self.size = (size[0], size[1]) if size else None

    def meter(self) -> Meter:
        return Meter(self.look, lambda: self.time)


def test_a_cluster_that_grows_is_paid_by_the_time_it_was_there():
    cluster = Cluster()
    meter = cluster.meter()
    meter.look()
    assert meter.cluster is None
    cluster.at(100, 4, 0)
    meter.look()
    assert meter.cluster == (4, 0)
    cluster.at(160, 12, 2)
    meter.look()
    cluster.at(400, 12, 2)
    meter.look(at_once=True)
    # 60 s of 4 CPUs, 240 s of 12 CPUs and 2 GPUs; nothing of the time before there was one.
    assert meter.cluster == (pytest.approx((60 * 4 + 240 * 12) / 300), pytest.approx(240 * 2 / 300))


def test_receipts_count_files_and_ray_is_asked_once_in_ten_seconds():
    cluster = Cluster()
    meter = cluster.meter()
    for second in range(35):
        cluster.at(second, 8, 0)
        outcomes = [{"outcome": "cleared", "images": 100 + second}, {"outcome": "error", "images": 1}]
        meter.took({"files": [{"table": "ledger"}, {"table": "audit"}], "outcomes": outcomes})
    assert (meter.first_images, meter.images) == (101, 35 * 101 + 34 * 35 / 2)
    assert meter.attempt_files == 70 and cluster.looks == 4 and meter.seconds == 30


def there(source: str, output: str, **changes: Any) -> dict[str, Any]:
    meter = Meter(lambda: (8.0, 1.0))
    meter.look()
    meter.attempt_files = 500
    counts = {
        "listed": 20_500,
        "seconds": 60.0,
        "startup_seconds": 9.0,
        "images": 20_000,
        "fetched": 19_000.0,
        "shards": 2,
        "written": 4000,
    }
    return resources(meter, source=source, output=output, **(counts | changes))


def test_requests_are_those_of_images_attempts_shards_and_the_listing():
    found = there("s3://uploads/", "s3://results/dorfman")
    assert (found["cpus"], found["gpus"], found["seconds"], found["images"]) == (8, 1, 60, 20_000)
    assert found["gets"] == 19_000 + 500 + 2 * 2
    assert found["puts"] == 500 + 2 * 11 + 21


def test_a_folder_asks_for_nothing_that_costs(tmp_path):
    folders = there(str(tmp_path), str(tmp_path / "out"))
    assert (folders["gets"], folders["puts"]) == (0, 0)
    assert there("s3://uploads/", str(tmp_path))["gets"] == 19_000
    assert there("listed.parquet", str(tmp_path))["gets"] == 19_000, "its uris are mostly those of a bucket"


@pytest.mark.parametrize(
    "source", ["s3://lists/night.csv", "s3://reports/a/2026/manifest.json", "reports/a/2026/manifest.json"]
)
def test_nobody_lists_what_a_table_or_a_report_has_listed(source, tmp_path):
    assert [there(source, str(tmp_path))[name] for name in ("gets", "puts")] == [19_000, 0]


# What it costs


def record(*, on_gpu: bool = False, **changes: Any) -> dict[str, Any]:
    work = [("fetch", 20.0), ("decode:screen", 60.0), ("screen", 70.0), ("single", 30.0), ("write", 20.0)]
    return {
        "plan": {"stages": [{"name": "screen", "num_gpus": float(on_gpu)}, {"name": "single", "num_gpus": 0.0}]},
        "operators": [{"operator": name, "seconds": seconds} for name, seconds in work],
        "relative_cost": 0.25,
        "resources": {
            "cpus": 16.0, "gpus": 2.0, "seconds": 1800.0, "images": 500_000, "gets": 600_000, "puts": 20_000,
            "bytes_written": 3_000_000_000, "startup_seconds": 450.0, "tested": 400_000,
            "tested_after_startup": 390_000,
        },
    } | changes  # fmt: skip


def test_parts_add_up_and_are_told_by_the_million_images():
    cost = cost_of(record(), PRICES | {"storage_gb_month": 0.02})
    parts = {"cpus": 16 * 0.5 * 0.02, "gpus": 2 * 0.5 * 0.5, "gets": 0.24, "puts": 0.1, "storage": 0.06}
    assert cost["parts"] == pytest.approx(parts)
    assert cost["total"] == pytest.approx(sum(parts.values())) == pytest.approx(1.06)
    assert cost["per_million_images"] == pytest.approx(2.12)
    assert cost_of(record(), PRICES)["parts"]["storage"] is None


def test_start_up_is_set_apart_and_the_rest_is_told_by_the_images_that_came_after_it():
    cost = cost_of(record(), PRICES | {"storage_gb_month": 0.02})
    assert cost["startup"] == pytest.approx((0.16 + 0.5) / 4)
    assert cost["steady_per_million"] == pytest.approx((0.75 * 0.66 / 390_000 + 0.4 / 400_000) * 1e6)
    shown = dict(cost_rows({"cost": cost}))
    assert shown["  of the cost start-up, until the first result"] == "16%"
    assert shown["cost per million tested images, without start-up"] == "2.27 EUR"
    older = {name: value for name, value in cost.items() if name not in ("startup", "steady_per_million")}
    assert [name for name, _ in cost_rows({"cost": older}) if "start-up" in name] == [
        "cost per million listed images, with start-up"
    ]
    short = record()
    short["resources"] |= {"startup_seconds": 901.0}
    cost = cost_of(short, PRICES)
    assert cost["steady_per_million"] is None
    shown = dict(cost_rows({"cost": cost}))
    assert shown["cost per million tested images, without start-up"] == "too short a scan to tell"
    assert shown["cost per million listed images, with start-up"] == "2.00 EUR"


def test_alone_only_the_part_of_stages_grows():
    # On CPUs the stages had 100 of 200 seconds; GPUs that no stage uses do not grow.
    cost = cost_of(record(), PRICES)
    assert cost["stages"] == pytest.approx(0.16 / 2)
    assert cost["alone"] == pytest.approx(cost["total"] + 0.08 * 3)
    # With the screen on GPUs these grow whole, and of the CPUs' 130 seconds the other stage's 30.
    cost = cost_of(record(on_gpu=True), PRICES)
    assert cost["stages"] == pytest.approx(0.5 + 0.16 * 30 / 130)
    assert cost["alone"] == pytest.approx(cost["total"] + 3 * cost["stages"])
    assert cost_of(record(relative_cost=2.0), PRICES)["alone"] < cost_of(record(), PRICES)["total"]


def test_what_nobody_knows_is_not_made_up():
    untested = cost_of(record(relative_cost=None, operators=[]), PRICES)
    assert untested["alone"] is None and untested["stages"] == 0
    lone = record()
    lone["resources"] |= {"cpus": None, "gpus": None, "images": 0}
    cost = cost_of(lone, PRICES)
    assert (cost["parts"]["cpus"], cost["alone"], cost["per_million_images"]) == (None, None, None)
    assert cost["total"] == pytest.approx(0.34)


def test_money_has_cents_or_three_digits():
    assert [money(amount, "EUR") for amount in (0, 1234.567, 0.01234, 1)] == [
        "0.00 EUR", "1,234.57 EUR", "0.0123 EUR", "1.00 EUR"
    ]  # fmt: skip


# With a run


def night(folder: Path, **options: Any) -> dict[str, Any]:
    source = folder / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.jpg").write_bytes(b"picture" * number)
    plan = small_plan(folder, QUICK)
    return scan_by_hand(source, str(folder / "out"), plan, "night", lambda _: "cleared", **options)


def test_every_record_says_what_was_there_and_has_a_cost_only_with_prices(tmp_path):
    found = night(tmp_path)
    assert found["cost"] is None and found["resources"]["images"] == 20
    assert found["resources"]["bytes_written"] == sum(file["bytes"] for file in found["files"])
    assert list(cost_rows(found)) == [] and "<h2>Cost</h2>" not in (tmp_path / "out/runs/night/report.html").read_text()


def test_cost_stands_in_record_report_and_closing_table(corpus, ray_session, tmp_path):
    """A real scan: Ray says what was there."""
    prices = TABLE | {"cpu_hour": 36.0, "storage_gb_month": 0.02}
    plan = small_plan(tmp_path, QUICK)
    config = ScanConfig(
        source=str(corpus / "0000"), output=str(tmp_path / "out"), plan=str(plan), prices=write(tmp_path, prices),
        run_id="paid", salt="s",
    )  # fmt: skip
    found = run_scan(config)
    assert found == commit.read_json(Store(config.output), "runs/paid.json")
    there, cost = found["resources"], found["cost"]
    assert (there["cpus"], there["gpus"], there["gets"], there["puts"]) == (2, 0, 0, 0)
    assert there["startup_seconds"] == found["startup_seconds"] < there["seconds"]
    assert there["tested"] == found["counts"]["listed"] and there["tested_after_startup"] < there["tested"]
    assert there["seconds"] == found["seconds"] and there["images"] == found["counts"]["listed"] > 0
    assert cost["parts"]["cpus"] == pytest.approx(2 * found["seconds"] / 100)
    assert cost["total"] == pytest.approx(cost["parts"]["cpus"] + cost["parts"]["storage"])
    page = (tmp_path / "out/runs/paid/report.html").read_text()
    assert f">{money(cost['startup'], '').strip()}</td>" in page and "Per million tested images" in page
    assert "<h2>Cost</h2>" in page and f">{money(cost['total'], '').strip()}</td>" in page
    console = Console(file=io.StringIO(), width=120)
    console.print(closing_table(found | {"errors": {"truncated": 2}}))
    said = console.file.getvalue()
    assert money(cost["total"], "EUR") in said and "cost by price table ours" in said
    assert f"{money(cost['alone'], 'EUR')}" in said and "testing every image alone, estimated" in said
    assert re.search(r"│ error +│ +0 │\n│   truncated +│ +2 │\n│ skipped ", said), "codes stand below errors"


def test_bad_prices_end_the_job_with_two_and_one_line(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.jpg").write_bytes(b"x")
    arguments = ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "out")]
    done = run_here(job, *arguments, "--prices", write(tmp_path, TABLE | {"currency": "euros"}))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "currency" in done.stderr
