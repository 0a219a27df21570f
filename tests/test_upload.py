"""Batches on their way to a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.device import VARIABLE
from pipeline.plan import StageSpec
from pipeline.stages import GroupStage
from pipeline.upload import Upload
from pipeline.window import Image, Window


def test_an_array_is_a_tensor_of_the_same_values():
    array = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    there = Upload(torch.device("cpu"))(array)
    assert there.dtype == torch.uint8 and np.array_equal(there.numpy(), array)
    assert Upload(torch.device("cpu"))(np.ones(3, bool)).all()


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
        sums.append(upload(array).long().sum())
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
