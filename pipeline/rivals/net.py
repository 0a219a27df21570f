"""The net that the rivals test every picture with, as a user would load and call any classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from models.card import read_card
from models.weights import load_net


class Classifier:
    """``model``: a net's name in the zoo, or the path of its card. On a GPU in bfloat16, as one does there."""

    def __init__(self, model: str, categories: list[str], threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        net, card = load_net(model)
        self.device, self.dtype = device, torch.float32 if device == "cpu" else torch.bfloat16
        self.net = net.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.columns = [card.categories.index(category) for category in categories]
        self.of_pixels = card.int8
        if self.of_pixels and device != "cpu":
            raise SystemExit(f"model {model!r} is a net in int8, which computes on CPUs only")

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Scores (N, K) of what ``preprocess`` gave."""
        if not self.of_pixels:
            images = images.to(self.device, self.dtype, memory_format=torch.channels_last)
        present_N = torch.ones(len(images), dtype=torch.bool, device=self.device)
        return torch.sigmoid(self.net(images, present_N, 1)[:, self.columns].float()).cpu()


def preprocess(model: str, side: int) -> Callable[..., Tensor]:
    """From a picture, PIL's or a uint8 array, to float32 (3, S, S) of about unit variance; for a net in int8, which
    normalises by itself, to uint8 (S, S, 3)."""
    resized = [v2.ToImage(), v2.Resize([side, side], antialias=True)]
    if read_card(model).int8:
        return v2.Compose([*resized, _channels_last])
    spec = load_net(model)[0].trunk.spec
    mean, std = ([value / 255 for value in channels] for channels in (spec.mean, spec.std))
    return v2.Compose([*resized, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def _channels_last(pixels_3SS: Tensor) -> Tensor:
    return pixels_3SS.permute(1, 2, 0).contiguous()
