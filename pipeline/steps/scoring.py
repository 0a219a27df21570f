"""What an actor of a calibration does: scores groups of decoded pictures, and times tests. Knows nothing of Ray."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.folding import fold_norms
from models.group_net import GroupNet
from models.training import score_groups
from models.weights import load_net
from pipeline.steps.device import open_device

TIMED_IMAGES = 64
TIMED_REPEATS = 7


class GroupScorer:
    """``rows -> rows``: groups of ``schema.SCORING`` to their scores.

    ``pixels``: by input size a file of uint8 (N, S, S, 3), which the actor opens for itself. Nets are loaded when
    they are first asked for, and stay. ``gpu_kind``: the device, without one the CPU.
    Raises RunError when it is missing.
    """

    def __init__(self, pixels: Mapping[int, str], categories: tuple[str, ...], gpu_kind: str | None) -> None:
        self.pixels = {side: np.load(path, mmap_mode="r") for side, path in pixels.items()}
        self.categories = categories
        self.device = open_device(gpu_kind, "--gpu") if gpu_kind else torch.device("cpu")
        torch.backends.cudnn.allow_tf32 = False
        torch.set_num_threads(1)
        self.net = lru_cache(maxsize=None)(self._load)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._time(row) if row["members"] is None else self._score(row) for row in rows]

    def _load(self, model: str) -> tuple[GroupNet, list[int]]:
        net, card = load_net(model)
        fold_norms(net)  # as a stage does
        net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net, [card.categories.index(category) for category in self.categories]

    @torch.inference_mode()
    def _score(self, row: dict[str, Any]) -> dict[str, Any]:
        net, columns = self.net(row["model"])
        members_GM = np.array(row["members"], dtype=np.int64).reshape(-1, row["size"])
        scores_GK = score_groups(net, self.pixels[row["side"]], members_GM)[:, columns]
        return row | {"members": None, "scores": scores_GK.ravel().tolist(), "seconds": None, "seconds_kept": None}

    @torch.inference_mode()
    def _time(self, row: dict[str, Any]) -> dict[str, Any]:
        """Seconds of one test of a group, from pixels, and from what the net's largest test has kept."""
        net, _ = self.net(row["model"])
        size, largest = row["size"], net.group_sizes[-1]
        groups = max(1, TIMED_IMAGES // size)
        fresh = self._median(lambda: net(*self._images(net, row["side"], groups * size), size)) / groups
        kept = None
        if size < largest:
            images_NCHW, present_N = self._images(net, row["side"], max(1, TIMED_IMAGES // largest) * largest)
            _, features = net.test(images_NCHW, present_N, largest)
            units = features.units[size]
            kept = self._median(lambda: net.retest(units, size)) / len(units)
        return row | {"members": None, "scores": None, "seconds": fresh, "seconds_kept": kept}

    def _images(self, net: GroupNet, side: int, count: int) -> tuple[Tensor, Tensor]:
        pixels_NSS3 = torch.from_numpy(np.resize(self.pixels[side][:count], (count, side, side, 3))).to(self.device)
        return net.trunk.normalise(pixels_NSS3), torch.ones(count, dtype=torch.bool, device=self.device)

    def _median(self, run: Callable[[], Tensor]) -> float:
        taken = []
        for _ in range(TIMED_REPEATS + 1):
            began = time.perf_counter()
            run().cpu()  # waits for the device
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])  # the first one pays for what later ones find ready
