"""Benchmarks: what they share, and that each measures what it says, on next to nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow
from rich.console import Console

from pipeline.bench.decode import DecodeBenchConfig, bench_decode, decode_report
from pipeline.bench.measure import (
    Clock,
    Rival,
    Sample,
    named,
    plot_rates,
    rate_table,
    result_of,
    take_turns,
    write_result,
)
from pipeline.bench.scan import NAMES, ScanBenchConfig, bench_scan, scan_report
from pipeline.bench.stage import StageBenchConfig, bench_stage, stage_report
from pipeline.errors import UsageError
from tests.conftest import QUICK, small_plan


def silent(_: str) -> None:
    pass


def shown(*tables) -> str:
    text = io.StringIO()
    Console(width=200, file=text).print(*tables)
    return text.getvalue()


def rival(name: str, seconds: list[float], calls: list[str]) -> Rival:
    left = iter(seconds)

    def run() -> Sample:
        calls.append(name)
        return Sample(count=100, seconds=next(left), cpu_seconds=0.5, facts={"recall": 0.9})

    return Rival(name=name, run=run, note="x")


def test_rivals_take_turns_and_the_first_turn_is_dropped(tmp_path):
    calls: list[str] = []
    rivals = [rival("a", [50.0, 1.0, 4.0, 2.0], calls), rival("b", [50.0, 1.0, 1.0, 1.0], calls)]
    rows = named(take_turns(rivals, 3, silent), "images_per_s")
    assert calls == ["a", "b"] * 4
    assert rows[0]["images_per_s"] == 50 and rows[0]["images_per_s_range"] == [25, 100]
    assert rows[0]["seconds"] == [1.0, 4.0, 2.0] and rows[0]["cpu_s_per_1k"] == 5 and rows[0]["recall"] == 0.9

    write_result(tmp_path / "new" / "r.json", result_of("scan", rows, "numpy", images=100))
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written["benchmark"] == "scan" and written["rows"] == rows
    assert written["machine"]["cpus"] and written["versions"]["numpy"] == np.__version__
    text = shown(rate_table("t", rows, "images_per_s", against="a", recall="recall"))
    assert "50.0" in text and "25.0 to 100.0" in text and "2.00" in text and "0.9000" in text
    plot_rates(tmp_path / "p.svg", "t", rows, "images_per_s")
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_what_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        write_result(tmp_path / "file" / "r.json", {})


@pytest.mark.parametrize("machine", [False, True])
def test_the_clock_counts_processor_seconds(machine):
    with Clock(machine=machine) as clock:
        total = 0
        while clock._cpu() - clock.cpu_began < 0.3:
            total += sum(range(20_000))
    sample = clock.sample(7, fact=1)
    assert 0.3 <= sample.cpu_seconds < 30 and sample.seconds >= 0.3 / 8 and sample.count == 7
    assert sample.facts == {"fact": 1}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(2)
    for number in range(4):
        grain = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Pillow.fromarray(grain).resize((400, 300), Pillow.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return folder


def test_decoders_are_compared_with_a_full_decode(pictures, tmp_path):
    config = DecodeBenchConfig(
        pictures=pictures, images=5, sizes=("400x300", "131x97"), sides=(32,), repeats=1,
        json=tmp_path / "d.json", plot=tmp_path / "d.svg",
    )  # fmt: skip
    result = bench_decode(config, silent)
    names = ["pillow-full", "torchvision", "ours-unguarded", "ours"]
    assert [(row["size"], row["name"]) for row in result["rows"]] == [
        (size, name) for size in config.sizes for name in names
    ]
    for row in result["rows"]:
        assert row["images_per_s"] > 0 and row["cpu_s_per_1k"] >= 0  # the machine's clock ticks in hundredths
        assert row["difference"] == 0 if row["name"] == "pillow-full" else 0 <= row["difference"] < 2
    assert json.loads((tmp_path / "d.json").read_text())["rows"] == result["rows"]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"d-400x300.svg", "d-131x97.svg"}
    assert all("pillow-full" in shown(table) for table in decode_report(result))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"sizes": ("500",)}, "WIDTHxHEIGHT"), ({"sides": ()}, "give some"), ({"repeats": 0}, "at least 1")],
)
def test_wrong_sizes_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        DecodeBenchConfig(pictures=Path(), **changes)


def test_a_stage_is_compared_with_its_net(pictures, tmp_path):
    config = StageBenchConfig(pictures=pictures, plan=str(small_plan(tmp_path, QUICK)), windows=2, repeats=1)
    result = bench_stage(config, silent)
    assert [row["name"] for row in result["rows"]] == ["net:tree", "stage:tree"]
    assert [row["group_size"] for row in result["rows"]] == [4, 4]
    assert result["rows"][0]["of_net"] == 1 and 0 < result["rows"][1]["of_net"] < 2
    assert "stage:tree" in shown(*stage_report(result))


@pytest.fixture
def labelled(corpus: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Forty of the corpus's pictures, linked, and their labels."""
    folder = tmp_path / "forty"
    folder.mkdir()
    rows = []
    for row in pq.read_table(corpus / "labels.parquet").to_pylist()[:40]:
        path = Path(row["uri"].removeprefix("file://"))
        (folder / path.name).hardlink_to(path)
        rows.append(row | {"uri": (folder / path.name).as_uri()})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    return folder, tmp_path / "labels.parquet"


def test_the_decode_limit_decodes_every_picture(labelled):
    source, labels = labelled
    result = bench_scan(ScanBenchConfig(source=source, labels=labels, repeats=1, rivals=("decode-limit",)), silent)
    (row,) = result["rows"]
    assert (row["name"], result["images"]) == ("decode-limit", 40) and result["positives"] > 0
    assert row["images_per_s"] > 0 and "recall" not in row, "what only decodes finds nothing"


@pytest.mark.slow
def test_all_rivals_scan_the_same_pictures(labelled, tmp_path):
    source, labels = labelled
    config = ScanBenchConfig(source=source, labels=labels, repeats=1, json=tmp_path / "s.json")
    result = bench_scan(config, silent)
    assert [row["name"] for row in result["rows"]] == list(NAMES)
    found = {row["name"]: row.get("recall") for row in result["rows"]}
    assert found["ray-template"] == found["dataloader"] == pytest.approx(found["ours-individual"], abs=0.21)
    assert found["ours-planned"] > 0.5 and found["decode-limit"] is None
    assert "start-up s" in shown(*scan_report(result))


def test_rivals_and_folders_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UsageError, match="rivals slow are unknown; known are ray-template"):
        ScanBenchConfig(source=tmp_path, labels=tmp_path / "l", rivals=("slow",))
    with pytest.raises(UsageError, match="is no folder"):
        ScanBenchConfig(source=tmp_path / "none", labels=tmp_path / "l")
