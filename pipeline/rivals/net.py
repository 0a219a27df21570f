"""The net that the rivals test every picture with, as a user would load and call any classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from models.weights import load_net


class Classifier:
    """``model``: a net's name in the zoo, or the path of its card. On a GPU in bfloat16, as one does there."""

    def __init__(self, model: str, categories: list[str], threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        net, card = load_net(model)
        self.device, self.dtype = device, torch.float32 if device == "cpu" else torch.bfloat16
        self.net = net.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.columns = [card.categories.index(category) for category in categories]

    @torch.inference_mode()
    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Scores (N, K)."""
        images_NCHW = images_NCHW.to(self.device, self.dtype, memory_format=torch.channels_last)
        present_N = torch.ones(len(images_NCHW), dtype=torch.bool, device=self.device)
        return torch.sigmoid(self.net(images_NCHW, present_N, 1)[:, self.columns].float()).cpu()


def preprocess(model: str, side: int) -> v2.Compose:
    """From a picture, PIL's or a uint8 array, to float32 (3, S, S) of about unit variance."""
    spec = load_net(model)[0].trunk.spec
    mean, std = ([value / 255 for value in channels] for channels in (spec.mean, spec.std))
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize([side, side], antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
