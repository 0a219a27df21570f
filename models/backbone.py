"""Trunks with seams: a classifier as a chain of named segments, between which groups can be merged.

A trunk is an ordinary module whose state dict is that of the classifier it wraps. ``TRUNKS`` is the
whole list; a new trunk is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock


class LateResNet(nn.Module):
    """A small residual net whose work comes late: seven tenths of its MACs lie in ``layer3``.

    The stem brings the picture to a quarter of its side, ``layer1`` to an eighth, and only there,
    where members of a group are merged, do the channels widen. Max pooling at the end: a small
    object anywhere in the picture counts whole.
    """

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = (48, 96, 256)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(*_conv_norm_relu(3, 16), *_conv_norm_relu(16, 32))
        self.layer1 = nn.Sequential(_residual(32, first, stride=2))
        self.layer2 = nn.Sequential(_residual(first, second, stride=1))
        self.layer3 = nn.Sequential(_residual(second, third, stride=2), _residual(third, third, stride=1))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def _residual(inputs: int, outputs: int, *, stride: int) -> BasicBlock:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


@dataclass(frozen=True)
class TrunkSpec:
    """How to build a classifier, and which of its children make up each segment, in order."""

    build: Callable[[int], nn.Module]
    segments: dict[str, tuple[str, ...]]
    head: tuple[str, ...]


_RESNET_SEGMENTS = {
    "stem": ("conv1", "bn1", "relu", "maxpool"),
    "layer1": ("layer1",),
    "layer2": ("layer2",),
    "layer3": ("layer3",),
    "layer4": ("layer4",),
}


def _torchvision_resnet(build: Callable[..., nn.Module]) -> TrunkSpec:
    return TrunkSpec(lambda classes: build(weights=None, num_classes=classes), _RESNET_SEGMENTS, ("avgpool", "fc"))


TRUNKS: dict[str, TrunkSpec] = {
    "late_resnet": TrunkSpec(
        LateResNet,
        {"stem": ("stem",), "layer1": ("layer1",), "layer2": ("layer2",), "layer3": ("layer3",)},
        ("pool", "fc"),
    ),
    "resnet18": _torchvision_resnet(resnet.resnet18),
    "resnet50": _torchvision_resnet(resnet.resnet50),
    "resnext101_32x8d": _torchvision_resnet(resnet.resnext101_32x8d),
}


class Trunk(nn.Module):
    """A classifier with seams. N images, H x W pixels, C categories.

    ``classifier`` owns all parameters; segments and head are views of its children.
    """

    def __init__(self, name: str, num_categories: int) -> None:
        super().__init__()
        if name not in TRUNKS:
            raise ValueError(f"trunk {name!r} is unknown; known are {', '.join(TRUNKS)}")
        self.name = name
        self.num_categories = num_categories
        self.spec = TRUNKS[name]
        self.classifier = self.spec.build(num_categories)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the seams: each stands behind the segment of its name."""
        return tuple(self.spec.segments)

    def features(self, x: Tensor, *, after: str | None = None, upto: str | None = None) -> Tensor:
        """Runs the segments behind cut ``after`` (None: from the pixels) up to and with ``upto`` (None: all)."""
        names = list(self.spec.segments)
        start = 0 if after is None else names.index(after) + 1
        stop = len(names) if upto is None else names.index(upto) + 1
        for segment in names[start:stop]:
            for child in self.spec.segments[segment]:
                x = self.classifier.get_submodule(child)(x)
        return x

    def head(self, features_NCHW: Tensor) -> Tensor:
        """Logits (N, C)."""
        x = features_NCHW
        for child in self.spec.head:
            module = self.classifier.get_submodule(child)
            x = module(torch.flatten(x, 1) if isinstance(module, nn.Linear) else x)
        return x
