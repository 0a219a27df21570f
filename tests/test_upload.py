"""Batches on their way to a device, and what is replayed there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.plan import StageSpec
from pipeline.steps.device import VARIABLE
from pipeline.steps.graphs import Graphs
from pipeline.steps.stages import GroupStage
from pipeline.steps.upload import Upload
from pipeline.window import Image, Window


def filled(upload: Upload, array: np.ndarray) -> torch.Tensor:
    here = upload.empty(array.shape, torch.uint8)
    here.numpy()[:] = array
    return here


def test_what_is_written_arrives():
    upload = Upload(torch.device("cpu"))
    array = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    there = upload(filled(upload, array))
    assert there.dtype == torch.uint8 and np.array_equal(there.numpy(), array)


def window(pixels_NSS3: np.ndarray) -> Window:
    images = [Image(image_id=str(number), uri=f"/{number}", payload=b"") for number in range(len(pixels_NSS3))]
    return Window(shard=0, window=0, first_ordinal=0, images=images, pixels=pixels_NSS3)


@pytest.mark.gpu
def test_batches_arrive_whole_while_the_device_computes():
    device = torch.device("cuda")
    upload, rng = Upload(device), np.random.default_rng(2)
    busy = torch.randn(4096, 4096, device=device)
    arrays = [rng.integers(0, 256, (64, 160, 160, 3), dtype=np.uint8) for _ in range(40)]
    sums = []
    for array in arrays:
        for _ in range(4):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(upload(filled(upload, array)).long().sum())
    assert [int(total) for total in sums] == [int(array.sum()) for array in arrays]


@pytest.mark.gpu
def test_a_stage_scores_on_a_gpu_what_it_scores_on_a_cpu(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    pixels_NSS3 = np.random.default_rng(3).integers(0, 256, (256, 160, 160, 3), dtype=np.uint8)
    scores = []
    for gpus in (0, 1):
        spec = StageSpec(
            name="s", model="emblem", rounds=(16, 4), thresholds={"trefoil": (0.0, 0.0)}, input_size=160, num_gpus=gpus
        )
        (tested,) = GroupStage(spec, ("trefoil",), final=True)([window(pixels_NSS3.copy())])
        scores.append([[test.scores for test in image.tests] for image in tested.images])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_without_cuda_a_function_is_called():
    ran = []

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ran.append(len(x))
        return x + 1, x * 2

    graphs = Graphs(torch.device("cpu"))
    for _ in range(3):
        more, double = graphs("key", run, torch.ones(2))
        assert more.tolist() == double.tolist() == [2.0, 2.0]
    assert ran == [2, 2, 2] and not graphs.recorded


@pytest.mark.gpu
def test_a_replayed_graph_computes_what_its_function_does_and_results_stay():
    device = torch.device("cuda")
    weight = torch.randn(64, 64, device=device)
    graphs = Graphs(device)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x @ weight).relu(), x.sum(dim=1)

    given = [torch.randn(rows, 64, device=device) for rows in (32, 32, 8, 32, 8, 8, 32)]
    found = [graphs("key", run, x) for x in given]
    assert len(graphs.recorded) == 2, "one a shape, from its second call on"
    for x, results in zip(given, found, strict=True):
        for result, expected in zip(results, run(x), strict=True):
            assert torch.equal(result, expected)
    graphs.forget()
    assert torch.equal(graphs("key", run, given[0])[1], given[0].sum(dim=1)) and not graphs.recorded


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_that_replays_scores_as_in_its_first_call(monkeypatch, dtype):
    monkeypatch.delenv(VARIABLE, raising=False)
    pixels_NSS3 = np.random.default_rng(4).integers(0, 256, (256, 80, 80, 3), dtype=np.uint8)
    spec = StageSpec(
        name="s", model="emblem", rounds=(16, 4, 1), thresholds={"trefoil": (0.0, 0.0, 0.0)}, input_size=80,
        dtype=dtype, num_gpus=1, batch_images=64,
    )  # fmt: skip
    stage = GroupStage(spec, ("trefoil",), final=True)
    calls = []
    for _ in range(3):
        (tested,) = stage([window(pixels_NSS3.copy())])
        calls.append([[test.scores for test in image.tests] for image in tested.images])
    assert len(stage.graphs.recorded) == 3, "full batches of each round"
    assert calls[0] == calls[1] == calls[2]
