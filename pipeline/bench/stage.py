"""How close a stage comes to its bare net: windows in and out, against the same tests on tensors that lie ready."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.bench.measure import (
    Clock,
    Report,
    Rival,
    Sample,
    Say,
    named,
    plot_rates,
    rate_table,
    result_of,
    take_turns,
    write_result,
)
from pipeline.errors import UsageError
from pipeline.labels.corpus import list_photos
from pipeline.plan import Preparation, StageSpec, load_plan
from pipeline.steps.decode import Decoder
from pipeline.steps.device import accelerator
from pipeline.steps.stages import GroupStage
from pipeline.window import Image, Window


@dataclass(frozen=True, kw_only=True)
class StageBenchConfig:
    """Tests decoded photographs with each stage of a plan, and with its net alone.

    Of a stage with rounds the first one is measured: what it finds positive is another matter. Every stage
    gets all pictures, as if there were none before it.

    Exit codes: 0 done, 2 wrong usage or plan.
    """

    pictures: Path
    """Folder of photographs."""
    plan: str = "emblem"
    """A shipped plan by name, or the path of a plan file. Its num_gpus say where a stage runs."""
    windows: int = 4
    """Windows in a call of a stage; their pictures repeat when the folder has fewer."""
    repeats: int = 5
    """Turns of every row."""
    json: Path | None = None
    """File to write the rows to."""
    plot: Path | None = None
    """File for a plot, .svg or .png."""

    def __post_init__(self) -> None:
        for name in ("windows", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but it must be at least 1")


def bench_stage(config: StageBenchConfig, say: Say) -> dict[str, Any]:
    """Two rows a stage. Raises UsageError, and RunError where its device is missing."""
    plan = load_plan(config.plan)
    photos = list_photos(config.pictures, "all")
    rivals, shares, busy = [], {}, {}
    for stage in plan.stages:
        spec = stage.model_copy(update={"rounds": stage.rounds[:1], "thresholds": _nobody(stage)})
        tester = GroupStage(spec, plan.categories, final=False, gpu_kind=accelerator())
        pixels_NSS3 = _pixels(photos, spec.input_size, config.windows * plan.window.images, plan.preparation)
        device = tester.device.type
        rivals += [
            Rival(name=f"net:{stage.name}", note=f"on {device}", run=partial(_net, tester, pixels_NSS3)),
            Rival(
                name=f"stage:{stage.name}",
                note=f"on {device}",
                run=partial(_stage, tester, pixels_NSS3, plan.window.images),
            ),
        ]
        shares[stage.name] = spec.rounds[0]
        busy[f"stage:{stage.name}"] = partial(_busy_share, tester, pixels_NSS3, plan.window.images)
    rows = named(take_turns(rivals, config.repeats, say), "images_per_s")
    for row in rows:
        row["group_size"] = shares[row["name"].partition(":")[2]]
        row["gpu_busy"] = busy[row["name"]]() if row["name"] in busy else None
        row["of_net"] = row["images_per_s"] / _rate(rows, f"net:{row['name'].partition(':')[2]}")
    result = result_of("stage", rows, "torch", "onnxruntime", plan=plan.name)
    write_result(config.json, result)
    plot_rates(config.plot, f"stages of plan {plan.name}", rows, "images_per_s")
    return result


def _rate(rows: list[dict[str, Any]], name: str) -> float:
    return float(next(row["images_per_s"] for row in rows if row["name"] == name))


def _nobody(stage: StageSpec) -> dict[str, tuple[float, ...]]:
    """Thresholds that no score reaches: one of 1 does where a net is sure of itself."""
    return dict.fromkeys(stage.thresholds, (2.0,))


def _pixels(photos: list[Path], side: int, images: int, limits: Preparation) -> np.ndarray:
    """uint8 (images, side, side, 3)."""
    found = [
        Image(image_id=path.name, uri=path.resolve().as_uri(), payload=path.read_bytes()) for path in photos[:images]
    ]
    window = Window(shard=0, window=0, first_ordinal=0, images=found)
    Decoder("decode", side, limits)([window])
    if window.pixels is None:
        raise UsageError(f"none of the photographs in {photos[0].parent} can be decoded: {found[0].error_detail}")
    return window.pixels[np.arange(images) % len(window.pixels)]


@torch.inference_mode()
def _net(tester: GroupStage, pixels_NSS3: np.ndarray) -> Sample:
    """The net's tests of full batches that lie on its device: what no stage can be faster than."""
    size = tester.spec.rounds[0]
    batch = max(1, tester.spec.batch_images // size) * size
    whole = len(pixels_NSS3) // batch * batch or len(pixels_NSS3) // size * size
    pixels = torch.from_numpy(pixels_NSS3[:whole]).to(tester.device)
    present_N = torch.ones(batch, dtype=torch.bool, device=tester.device)
    _wait(tester.device)
    with Clock() as clock:
        for part in pixels.split(batch):
            tester.test_batch(part, present_N[: len(part)], size, keep=False)
        _wait(tester.device)
    return clock.sample(whole)


def _stage(tester: GroupStage, pixels_NSS3: np.ndarray, window_images: int) -> Sample:
    windows = _windows(pixels_NSS3, window_images)
    with Clock() as clock:
        tester(windows)
        _wait(tester.device)
    return clock.sample(len(pixels_NSS3))


def _windows(pixels_NSS3: np.ndarray, window_images: int) -> list[Window]:
    windows: list[Window] = []
    for start in range(0, len(pixels_NSS3), window_images):
        part = pixels_NSS3[start : start + window_images]
        images = [Image(image_id=str(start + row), uri="", payload=b"") for row in range(len(part))]
        windows.append(Window(shard=0, window=len(windows), first_ordinal=start, images=images, pixels=part))
    return windows


def _busy_share(tester: GroupStage, pixels_NSS3: np.ndarray, window_images: int) -> float | None:
    """Of a call's time the share in which a kernel runs on the GPU, as its profiler records it; None without CUDA."""
    if tester.device.type != "cuda":
        return None
    windows = _windows(pixels_NSS3, window_images)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        _wait(tester.device)
        with Clock() as clock:
            tester(windows)
            _wait(tester.device)
    kernels = [event.time_range for event in profiler.events() if not event.name.startswith(("Memcpy", "Memset"))]
    busy, reached = 0.0, 0.0
    for span in sorted(kernels, key=lambda span: span.start):
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return busy / 1e6 / clock.seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def stage_report(result: dict[str, Any]) -> Report:
    table = rate_table(
        f"stages of plan {result['plan']}",
        result["rows"],
        "images_per_s",
        against=result["rows"][0]["name"],
        **{"of its net": "of_net", "GPU busy": "gpu_busy", "groups of": "group_size", "where": "note"},
    )
    return [table]
