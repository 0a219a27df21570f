"""Trunks with seams: a classifier as a chain of named segments, between which groups can be merged.

A trunk is an ordinary module whose state dict is that of the classifier it wraps. ``TRUNKS`` is the
whole list; a new trunk is one more entry.

Shapes: N images, S pixels a side, K categories, D channels of a token; X is whatever shape one unit's
features have: C, H, W in a convolutional net, T, D (tokens) in ViT, H, W, C in Swin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD: Channels = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class LateResNet(nn.Module):
    """A small residual net whose work comes late: seven tenths of its MACs lie in ``layer3``.

    The stem brings the picture to a quarter of its side, ``layer1`` to an eighth, and only there,
    where members of a group are merged, do the channels widen. Max pooling at the end: a small
    object anywhere in the picture counts whole.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        stem: tuple[int, int] = (16, 32),
        widths: tuple[int, int, int] = (48, 96, 256),
        first_stride: int = 2,
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(
            *_conv_norm_relu(3, stem[0], first_stride), *_conv_norm_relu(stem[0], stem[1], stride=2)
        )
        self.layer1 = nn.Sequential(_Residual(stem[1], first, stride=2))
        self.layer2 = nn.Sequential(_Residual(first, second, stride=1))
        self.layer3 = nn.Sequential(_Residual(second, third, stride=2), _Residual(third, third, stride=1))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv_norm_relu(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class _Residual(nn.Module):
    """He, Zhang, Ren and Sun's basic block (CVPR 2016), with the names of torchvision's.

    Not torchvision's own: importing that takes every process that tests as long as torch itself.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(inner)) + self.downsample(x))


@dataclass(frozen=True)
class Glue:
    """What a classifier's forward does between its children: a function of the features and of ``parameters``."""

    function: Callable[..., Tensor]
    parameters: tuple[str, ...] = ()
    """Names of those parameters of the classifier that belong to no child of its own."""


Step = str | Glue
"""The name of a child, with dots, or what lies between two of them."""


@dataclass(frozen=True, kw_only=True)
class TrunkSpec:
    """How to build a classifier, and the steps that make up each segment, in order."""

    build: Callable[[int], nn.Module]
    segments: dict[str, tuple[Step, ...]]
    head: tuple[Step, ...]
    """Ends with the name of the linear layer that scores the categories."""
    mean: Channels = IMAGENET_MEAN
    """Of red, green and blue, in 0..255."""
    std: Channels = IMAGENET_STD


_FLATTEN = Glue(lambda features_NX: features_NX.flatten(1))
_CLASS_TOKEN = Glue(lambda tokens_NTD: tokens_NTD[:, 0])


def _to_tokens(patches_NDHW: Tensor, class_token_11D: Tensor, positions_1TD: Tensor) -> Tensor:
    """Tokens (N, T, D): the class token, then the patches, each with its position added."""
    patches_NPD = patches_NDHW.flatten(2).transpose(1, 2)
    count = positions_1TD.shape[1] - 1
    if patches_NPD.shape[1] != count:
        raise ValueError(
            f"the pictures have {patches_NPD.shape[1]} patches, but this trunk has positions for {count}: "
            "give it pictures of 224 px"
        )
    class_token_N1D = class_token_11D.expand(patches_NPD.shape[0], -1, -1)
    return torch.cat([class_token_N1D, patches_NPD], dim=1) + positions_1TD


def _late_resnet(
    stem: tuple[int, int] = (16, 32), widths: tuple[int, int, int] = (48, 96, 256), first_stride: int = 2
) -> TrunkSpec:
    return TrunkSpec(
        build=lambda classes: LateResNet(classes, stem=stem, widths=widths, first_stride=first_stride),
        segments={"stem": ("stem",), "layer1": ("layer1",), "layer2": ("layer2",), "layer3": ("layer3",)},
        head=("pool", _FLATTEN, "fc"),
        mean=(127.5, 127.5, 127.5),
        std=(64.0, 64.0, 64.0),
    )


def _torchvision(name: str, segments: dict[str, tuple[Step, ...]], head: tuple[Step, ...]) -> TrunkSpec:
    def build(classes: int) -> nn.Module:
        from torchvision.models import get_model  # noqa: PLC0415  it takes as long to import as torch

        return get_model(name, weights=None, num_classes=classes)

    return TrunkSpec(build=build, segments=segments, head=head)


def _resnet(name: str) -> TrunkSpec:
    stem: dict[str, tuple[Step, ...]] = {"stem": ("conv1", "bn1", "relu", "maxpool")}
    layers: dict[str, tuple[Step, ...]] = {f"layer{index}": (f"layer{index}",) for index in range(1, 5)}
    return _torchvision(name, stem | layers, ("avgpool", _FLATTEN, "fc"))


def _regnet(name: str) -> TrunkSpec:
    stem: dict[str, tuple[Step, ...]] = {"stem": ("stem",)}
    blocks: dict[str, tuple[Step, ...]] = {f"block{index}": (f"trunk_output.block{index}",) for index in range(1, 5)}
    return _torchvision(name, stem | blocks, ("avgpool", _FLATTEN, "fc"))


def _sequential(name: str, children: int, head: tuple[Step, ...]) -> TrunkSpec:
    """A classifier whose ``features`` are a sequence of so many children."""
    return _torchvision(name, {f"features{index}": (f"features.{index}",) for index in range(children)}, head)


def _vit(name: str, layers: int, every: int) -> TrunkSpec:
    """Cuts behind the tokens and behind ``every`` few of the encoder's layers, named by how many are done."""
    tokens = Glue(_to_tokens, ("class_token", "encoder.pos_embedding"))
    segments: dict[str, tuple[Step, ...]] = {"tokens": ("conv_proj", tokens, "encoder.dropout")}
    for done in range(every, layers + 1, every):
        segments[f"encoder{done}"] = tuple(
            f"encoder.layers.encoder_layer_{index}" for index in range(done - every, done)
        )
    return _torchvision(name, segments, ("encoder.ln", _CLASS_TOKEN, "heads.head"))


_EFFICIENTNET_HEAD = ("avgpool", _FLATTEN, "classifier.0", "classifier.1")
_MOBILENET_HEAD = ("avgpool", _FLATTEN, "classifier.0", "classifier.1", "classifier.2", "classifier.3")
_CONVNEXT_HEAD = ("avgpool", "classifier.0", "classifier.1", "classifier.2")
_SWIN_HEAD = ("norm", "permute", "avgpool", "flatten", "head")

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_RESNEXTS = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
_REGNET_SIZES = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
_REGNETS = (*(f"regnet_{kind}_{size}" for kind in "xy" for size in _REGNET_SIZES), "regnet_y_128gf")
_EFFICIENTNETS = {f"efficientnet_b{index}": 9 for index in range(8)} | {
    "efficientnet_v2_s": 8,
    "efficientnet_v2_m": 9,
    "efficientnet_v2_l": 9,
}
_MOBILENETS = {"mobilenet_v3_small": 13, "mobilenet_v3_large": 17}
_CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
_VITS = {"vit_b_16": (12, 3), "vit_b_32": (12, 3), "vit_l_16": (24, 3), "vit_l_32": (24, 3), "vit_h_14": (32, 4)}
_SWINS = ("swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b")

TRUNKS: dict[str, TrunkSpec] = {
    "late_resnet": _late_resnet(),
    # For pictures of 32 px, which a quarter of the side would leave nothing of.
    "late_resnet_32": _late_resnet(stem=(24, 48), widths=(80, 128, 256), first_stride=1),
    # First stages that every image can pay for.
    "late_resnet_mini": _late_resnet(stem=(12, 24), widths=(32, 48, 88)),
    "late_resnet_32_mini": _late_resnet(stem=(12, 24), widths=(32, 48, 88), first_stride=1),
    **{name: _resnet(name) for name in _RESNETS + _RESNEXTS},
    **{name: _regnet(name) for name in _REGNETS},
    **{name: _sequential(name, children, _EFFICIENTNET_HEAD) for name, children in _EFFICIENTNETS.items()},
    **{name: _sequential(name, children, _MOBILENET_HEAD) for name, children in _MOBILENETS.items()},
    **{name: _sequential(name, 8, _CONVNEXT_HEAD) for name in _CONVNEXTS},
    **{name: _sequential(name, 8, _SWIN_HEAD) for name in _SWINS},
    **{name: _vit(name, layers, every) for name, (layers, every) in _VITS.items()},
}


class Trunk(nn.Module):
    """A classifier with seams.

    ``classifier`` owns all parameters; segments and head are views of its children.
    """

    def __init__(self, name: str, num_categories: int) -> None:
        super().__init__()
        if name not in TRUNKS:
            raise ValueError(f"trunk {name!r} is unknown; known are {', '.join(TRUNKS)}")
        self.name = name
        self.num_categories = num_categories
        self.spec = TRUNKS[name]
        # The first segment does nothing: behind it stand the pixels themselves, which can be merged too.
        self.segments: dict[str, tuple[Step, ...]] = {"pixels": (), **self.spec.segments}
        self.classifier = self.spec.build(num_categories)
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the seams: each stands behind the segment of its name."""
        return tuple(self.segments)

    @property
    def head_module(self) -> str:
        """Name of the linear layer that scores the categories."""
        name = self.spec.head[-1]
        assert isinstance(name, str), name
        return name

    def segment_parameters(self, segment: str) -> list[nn.Parameter]:
        """All parameters that the segment's steps use."""
        found: list[nn.Parameter] = []
        for step in self.segments[segment]:
            if isinstance(step, Glue):
                found += map(self.classifier.get_parameter, step.parameters)
            else:
                found += self.classifier.get_submodule(step).parameters()
        return found

    def normalise(self, pixels_NSS3: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (N, S, S, 3) to ``dtype`` (N, 3, S, S) of about unit variance, channels last in memory."""
        mean_311, std_311 = self._constants_on(pixels_NSS3.device)
        # In place: two more tensors of that size would be memory that the system clears for each batch.
        return pixels_NSS3.permute(0, 3, 1, 2).to(torch.float32, copy=True).sub_(mean_311).div_(std_311).to(dtype)

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Sent once: each transfer would wait for all that the device has to do. No buffers, which bfloat16 would round.
        if device not in self._constants:
            with torch.inference_mode(mode=False):  # whoever asks first may not be the last: one may train
                mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in (self.spec.mean, self.spec.std))
                self._constants[device] = mean.to(device), std.to(device)
        return self._constants[device]

    def features(self, x: Tensor, *, after: str | None = None, upto: str | None = None) -> Tensor:
        """Runs the segments behind cut ``after`` (None: from the pixels) up to and with ``upto`` (None: all)."""
        names = self.cuts
        start = 0 if after is None else names.index(after) + 1
        stop = len(names) if upto is None else names.index(upto) + 1
        for segment in names[start:stop]:
            x = self._run(self.segments[segment], x)
        return x

    def head(self, features_NX: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self._run(self.spec.head, features_NX)

    def _run(self, steps: tuple[Step, ...], x: Tensor) -> Tensor:
        for step in steps:
            if isinstance(step, Glue):
                x = step.function(x, *map(self.classifier.get_parameter, step.parameters))
            else:
                x = self.classifier.get_submodule(step)(x)
        return x
