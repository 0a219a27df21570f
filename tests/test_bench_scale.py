"""The scale benchmark: what is seen of a scan, a night on paper worked out by hand, and nights that are played."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.benchmark import COMMANDS
from jobs.cli import parse, run_command
from pipeline.bench import scale as bench_scale
from pipeline.bench.capacity import CapacityConfig, limits, plan_night
from pipeline.bench.idle import IdleFetcher
from pipeline.bench.night import bench_capacity, capacity_report
from pipeline.bench.scale import (
    PICTURES,
    ScaleConfig,
    Trace,
    driver_inputs,
    growth,
    plot_scale,
    row_of,
    scale_report,
    watch,
    write_listing,
)
from pipeline.bench.simulation import Driver, Play
from pipeline.errors import RunError, UsageError
from pipeline.flow import window_refs
from pipeline.listing.manifest import build_manifest
from pipeline.listing.source import list_source
from pipeline.output import commit
from pipeline.output.commit import Ledger
from pipeline.output.sink import Sink
from pipeline.plan import WindowSpec, parse_plan
from pipeline.store import Store

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.yaml"


def test_every_key_of_a_listing_is_a_name_of_its_own_that_can_be_read(tmp_path):
    bench_scale.draw_pictures(tmp_path / "pictures")
    source = write_listing(tmp_path, 2_300)
    listed = list(list_source(str(source), (), None))
    assert len({row["uri"] for row in listed}) == len(listed) == 2_300
    for row in listed[:: PICTURES + 1]:
        status = Path(urlsplit(row["uri"]).path).stat()
        assert row["size_bytes"] == status.st_size > 500 and row["etag"] == f"{status.st_mtime_ns:x}-{status.st_size:x}"
    assert len({path.read_bytes() for path in (tmp_path / "pictures").iterdir()}) == PICTURES
    # The next size builds upon it.
    assert pq.read_table(write_listing(tmp_path, 999)).num_rows == 999


def test_an_idle_scan_clears_every_image_and_its_shards_add_up(tmp_path):
    bench_scale.draw_pictures(tmp_path / "pictures")
    plan = parse_plan(bench_scale.PLAN, "test")
    store = Store(str(tmp_path / "out"))
    rows = list_source(str(write_listing(tmp_path, 700)), (), None)
    manifest = build_manifest(rows, store, "m", salt="s", window=WindowSpec(images=100), shard_size=500)
    fetcher = IdleFetcher(plan, store, None, plan.preparation)
    ledger = Ledger(store, "r", "2026-01-01", list(manifest.shards))
    sink = Sink(store, commit.attempts_prefix("r"), "r", plan, {"mini": ("v", "d")}, "s")
    for ref in window_refs(store, list(manifest.shards)).to_pylist():
        (window,) = fetcher([ref])
        assert all(image.payload is None for image in window.images)
        for receipt in sink([window]):
            ledger.add(receipt)
    assert not ledger.pending and ledger.tally.outcomes == {"cleared": 700, "flagged": 0, "error": 0, "skipped": 0}
    assert ledger.commit_seconds > 0


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


RECORD = {
    "counts": {"listed": 2_000, "skipped": 0},
    "listed_at": moment(1_010),
    "started_at": moment(1_020),
    "updated_at": moment(1_070),
    "seconds": 65.0,
    "startup_seconds": 35.0,
    "commit_seconds": 4.0,
    "windows": 8,
    "files": [{"path": "ledger/a"}, {"path": "flagged/a"}, {"path": "ledger/b"}],
}
"""Listed from 10 to 20 s, first result at 40 s, recorded at 70 s."""
TRACE = Trace(
    when=np.array([1_000.0, 1_020.0, 1_040.0, 1_080.0]),
    machine=np.array([500.0, 520.0, 550.0, 630.0]),
    driver=np.array([0.0, 15.0, 25.0, 45.0]),
    peak=np.array([1e8, 6e8, 7e8, 9e8]),
)


def test_what_a_scan_took_is_told_apart_from_its_start_up():
    row = row_of(RECORD, TRACE)
    assert row["seconds"] == pytest.approx(80) and row["listing_seconds"] == pytest.approx(10)
    assert row["startup_seconds"] == pytest.approx(30)  # 40 s to the first result, less 10 of listing
    assert row["images_per_s"] == pytest.approx(2_000 / 40)
    assert row["listing_cpu_s_per_1k"] == pytest.approx(10 / 2)
    assert row["cpu_s_per_1k"] == pytest.approx((10 + 80) / 2)
    assert row["driver_cpu_seconds"] == pytest.approx(20) and row["window_ms"] == pytest.approx(1e3 * (20 - 4) / 8)
    assert row["commit_us"] == pytest.approx(2_000) and row["listing_us"] == pytest.approx(5_000)
    assert (row["peak_bytes"], row["listing_peak_bytes"], row["shards"]) == (9e8, 6e8, 2)
    # Where nothing is tested, all that comes behind the listing is what the night costs.
    unchanged = row_of(RECORD | {"counts": {"listed": 2_000, "skipped": 2_000}, "windows": 0}, TRACE)
    assert unchanged["images_per_s"] == pytest.approx(2_000 / 60)
    assert unchanged["window_ms"] == unchanged["windows_per_s"] == 0


def test_a_process_is_watched_until_its_end():
    work = (
        "import time; held = b'x' * 150_000_000; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    )
    trace = watch([sys.executable, "-c", work])
    assert 150e6 < trace.peak_until(trace.when[-1]) < 300e6
    assert 0.3 < trace.between("driver", trace.when[0], trace.when[-1]) < 1
    assert trace.between("machine", trace.when[0], trace.when[-1]) > 0.3
    with pytest.raises(RunError, match=r"ended with 3: there is no room"):
        watch([sys.executable, "-c", "import sys; print('hm'); print('there is no room'); sys.exit(3)"])


def seen(keys: int, cost: float, peak: float, night: str = "first", **more: float) -> dict:
    row = dict.fromkeys(row_of(RECORD, TRACE), 1.0) | {"row_bytes": 600.0}
    return row | {"keys": keys, "night": night, "cpu_s_per_1k": cost, "peak_bytes": peak} | more


def test_rows_are_compared_and_become_the_inputs_of_the_paper(tmp_path):
    rows = [
        seen(1_000_000, 2.0, 1.2e9, window_ms=8.0, listing_us=12.0),
        seen(1_000_000, 9.0, 5e9, "unchanged"),
        seen(5_000_000, 2.2, 1.24e9, window_ms=5.0, listing_us=13.0),
    ]
    assert growth(rows) == pytest.approx(1.1)
    assert driver_inputs(rows) == pytest.approx(
        {"listing_us": 13, "window_ms": 8, "commit_us": 1, "row_bytes": 600, "driver_bytes": 10, "driver_base_mb": 1190}
    )
    assert driver_inputs(rows[:1])["driver_bytes"] == 0
    result = {"idle": True, "shard_size": 1_000_000, "rows": rows}
    assert scale_report(result)[0].row_count == 3
    plot_scale(tmp_path / "new" / "scale.svg", result)
    assert "<svg" in (tmp_path / "new" / "scale.svg").read_text()


NIGHT = CapacityConfig(
    images=(1_000_000,), hours=1.0, image_bytes=100_000, side=100, window_images=1_000, shard_images=100_000,
    prefixes=2,
    fetch_cpu_ms=1.0, decode_cpu_ms=7.0, write_cpu_ms=1.0, net_cpu_ms=27.0,
    listing_us=36.0, window_ms=9.0, commit_us=9.0, driver_base_mb=1_000.0, driver_bytes=100.0, row_bytes=500.0,
    cpu_node_cpus=4, cpu_node_gbit=1.0, cpu_node_dollars=2.0, head_node_gb=16, utilisation=0.5, vanish_per_hour=0.0,
)  # fmt: skip


def test_a_night_on_processors_alone():
    night = plan_night(NIGHT, 3_600_000)
    assert (night.images_per_s, night.gets_per_s, night.gets_per_s_and_prefix) == (1_000, 1_000, 500)
    assert night.source_gbit == pytest.approx(0.8) and night.moved_gbit == 0
    assert night.cpus == pytest.approx(36) and night.cpu_nodes == 18  # half busy: 72 processors, 4 in a node
    assert (night.gpus, night.gpu_nodes) == (0, 0)
    assert (night.windows, night.windows_per_block, night.shards) == (3_600, 1, 36)
    assert night.driver_busy == pytest.approx(0.018)  # 9 us for a window's image, 9 for its commit
    assert night.listing_hours == pytest.approx(0.036) and night.driver_gb == pytest.approx(1.36)
    assert night.object_store_gb == pytest.approx(2 * 72 * 1_000 * 130_000 / 1e9)
    assert night.written_gb == pytest.approx(1.8)
    assert night.node_dollars == pytest.approx(36) and night.request_dollars == pytest.approx(1.44 + 0.036)
    assert plan_night(NIGHT, 100_000_000).windows_per_block == 10


def test_a_night_whose_stages_run_on_gpus():
    config = replace(
        NIGHT, net_cpu_ms=0.0, stage_images_per_s=(500.0, 50.0), stage_shares=(1.0, 0.1), gpu_node_gpus=4,
        gpu_node_gbit=0.25, gpu_node_dollars=3.0,
    )  # fmt: skip
    night = plan_night(config, 3_600_000)
    assert night.moved_gbit == pytest.approx(1.04)  # files and pixels, 130 kB an image
    assert night.cpu_nodes == 5  # 9 processors, half busy: 18 in nodes of 4; the network, 1.04 of 1 Gbit, would want 3
    assert night.gpus == 8  # 2 ms in the first stage, 2 in the second
    assert night.gpu_nodes == 9, "the network wants more of them than the GPUs do"
    assert night.node_dollars == pytest.approx(5 * 2 + 9 * 3)


def test_what_breaks_first_is_named_with_its_number():
    found = limits(NIGHT)
    images = {limit.what: limit.images for limit in found}
    assert [limit.images for limit in found] == sorted(images.values())
    assert images["GETs below 2 prefixes"] == 5_500 * 2 * 3_600
    assert images["the driver takes receipts and commits shards"] == pytest.approx(3_600 / 18e-6)
    assert images["one process lists the source within 4 hours"] == pytest.approx(4 * 3_600 / 36e-6)
    assert images["the driver's memory is 16 GB"] == pytest.approx(15e9 / 100)
    assert images["PUTs of attempts below one prefix"] == pytest.approx(3_500 * 3_600 * 1_000 / 2)
    assert found[0].what == "GETs below 2 prefixes"
    slow = replace(NIGHT, commit_us=900.0)
    assert limits(slow)[0].what == "the driver takes receipts and commits shards"


def test_the_driver_does_one_thing_after_the_other():
    driver = Driver(replace(NIGHT, shard_images=2_000), windows=3)  # 9 ms a window, 9 ms to commit one
    driver.take(10.0, 2)  # the only window of the last shard
    assert driver.free == pytest.approx(10.018)
    driver.take(10.0, 0)
    driver.take(10.01, 1)
    assert driver.free == pytest.approx(10.018 + 0.009 + 0.009 + 0.018)
    assert driver.busy == pytest.approx(0.054) and driver.longest_wait == pytest.approx(0.018)
    assert driver.most_open == 1 and not driver.left


def test_a_night_that_nothing_disturbs_takes_what_its_pools_take():
    played = Play(NIGHT, plan_night(NIGHT, 3_600_000)).run()
    # 3,600 windows of 36 s on 72 processors: half an hour, and a last window.
    assert played.hours == pytest.approx(0.5, rel=0.05)
    assert played.driver_busy * played.hours * 3_600 == pytest.approx(3_600 * 0.018)
    assert (played.vanished, played.done_again) == (0, 0) and played.longest_wait < 1
    assert Play(NIGHT, plan_night(NIGHT, 3_600_000)).run() == played, "the same seed is the same night"


def test_gpus_that_are_behind_hold_up_those_who_fetch():
    config = replace(
        NIGHT, net_cpu_ms=0.0, decode_cpu_ms=1.0, stage_images_per_s=(1_000.0,), stage_shares=(1.0,),
        cpu_node_gbit=100.0,
    )  # fmt: skip
    night = replace(plan_night(config, 1_000_000), gpus=1, gpu_nodes=1)
    play = Play(config, night)
    played = play.run()
    assert played.hours == pytest.approx(1_000 / 3_600, rel=0.05)  # 1,000 windows of a second
    assert not play.stuck and played.done_again == 0


def test_nodes_that_vanish_cost_time_and_no_window():
    config = replace(NIGHT, vanish_per_hour=2.0, replace_minutes=2.0)
    night = replace(plan_night(config, 3_600_000), windows_per_block=10)
    calm = Play(NIGHT, replace(night)).run()
    play = Play(config, night)
    played = play.run()
    assert played.vanished > 5 and 0.001 < played.done_again < 0.5
    assert played.hours > calm.hours
    assert play.driver.taken == sum(play.came) == 3_600 and not play.driver.left
    with pytest.raises(UsageError, match="nodes are gone before a block is done"):
        Play(replace(config, vanish_per_hour=2_000.0), night).run()


def test_a_driver_that_does_not_keep_up_is_the_night():
    config = replace(NIGHT, commit_us=1_800.0)
    night = plan_night(config, 3_600_000)
    played = Play(config, night).run()
    assert night.driver_busy > 1 and played.driver_busy > 0.9
    assert played.hours == pytest.approx(3_600_000 * 1_809e-6 / 3_600, rel=0.05)
    assert played.longest_wait > 1_800


def test_the_pages_inputs_are_read_and_end_as_tables_and_json(tmp_path):
    file = yaml.safe_load(PAGE.read_text()) | {"images": [10_000_000], "json": str(tmp_path / "c.json")}
    (tmp_path / "scale.yaml").write_text(yaml.safe_dump(file))
    config = parse("jobs.benchmark capacity", CapacityConfig, ["--config", str(tmp_path / "scale.yaml")])
    said: list[str] = []
    tables = capacity_report(bench_capacity(config, said.append))
    assert [table.row_count for table in tables] == [20, 5, 6]
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["nights"][0]["images"] == written["played"][0]["images"] == 10_000_000
    assert written["inputs"]["cpu_node_dollars"] == file["cpu_node_dollars"]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (ScaleConfig(), {"keys": ()}, "keys are"),
        (ScaleConfig(), {"keys": (0, 5)}, "keys are"),
        (ScaleConfig(), {"repeats": 0}, "repeats is 0"),
        (ScaleConfig(), {"shard_size": -1}, "shard_size is -1"),
        (NIGHT, {"images": (0,)}, "images are"),
        (NIGHT, {"hours": 0.0}, "hours is 0, but it must be above 0"),
        (NIGHT, {"vanish_per_hour": -1.0}, "vanish_per_hour is -1, but it must be at least 0"),
        (NIGHT, {"utilisation": 1.2}, r"utilisation is 1\.2, but a share"),
        (NIGHT, {"stage_shares": (1.0,)}, "stage_images_per_s has 0 stages, stage_shares 1"),
        (NIGHT, {"stage_images_per_s": (0.0,), "stage_shares": (1.0,)}, "give rates above 0"),
    ],
)
def test_wrong_numbers_are_named(config, changes, message):
    with pytest.raises(UsageError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scale", "--keys", "100", "--plan", "nowhere.yaml"], "nowhere.yaml"),
        (["capacity", "--images", "1000"], "fetch-cpu-ms"),
    ],
)
def test_a_wrong_command_line_ends_with_2(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["jobs.benchmark", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command("jobs.benchmark", COMMANDS)
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("idle", [False, True])
def test_scans_of_two_sizes_are_measured(tmp_path, idle):
    config = ScaleConfig(keys=(2_000, 500), idle=idle, again=idle, repeats=2, json=tmp_path / "s.json")
    said: list[str] = []
    result = bench_scale.bench_scale(config, said.append)
    nights = ["first", "unchanged"][: 1 + idle]
    assert [(row["keys"], row["night"]) for row in result["rows"]] == [(n, m) for n in (500, 2_000) for m in nights]
    assert len(said) == 3 * len(nights) and json.loads((tmp_path / "s.json").read_text()) == result
    for row in result["rows"]:
        assert row["cpu_s_per_1k"] > row["listing_cpu_s_per_1k"] > 0 and row["images_per_s"] > 1
        assert 100e6 < row["listing_peak_bytes"] <= row["peak_bytes"] < 1.5e9


@pytest.mark.load
@pytest.mark.timeout(14_400)
def test_an_image_of_a_million_costs_what_one_of_ten_thousand_does():
    result = bench_scale.bench_scale(ScaleConfig(keys=(10_000, 1_000_000)), print)
    assert growth(result["rows"]) < 1.1


@pytest.mark.load
@pytest.mark.timeout(14_400)
def test_the_driver_of_ten_million_keys_stays_below_one_and_a_half_gigabytes():
    result = bench_scale.bench_scale(ScaleConfig(keys=(10_000_000,), idle=True), print)
    assert max(row["peak_bytes"] for row in result["rows"]) < 1.5e9
