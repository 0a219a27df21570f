"""Making a net: labelled pictures in, weights and a card with what was measured out."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from models.backbone import TRUNKS, Trunk
from models.evaluation import measure
from models.group_net import GroupNet, MergePoint
from models.merge import MERGES
from models.training import Examples, TrainingConfig, train
from models.weights import Card, load_net, save_net
from pipeline.errors import RunError, UsageError
from pipeline.examples import load_examples


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a net on labelled pictures and writes it with its card."""

    name: str
    """Name of the net: NAME.safetensors and NAME.json are written."""
    labels: tuple[str, ...]
    """Labels files (Parquet: uri, category, label) of the pictures to learn from."""
    validation: tuple[str, ...]
    """Labels files of other pictures: half sets the card's thresholds, half is what they are judged on."""
    categories: tuple[str, ...] = ("emblem",)
    """What the net scores, in order."""
    trunk: str = "late_resnet"
    """The classifier below."""
    merge_points: tuple[str, ...] = ()
    """Where members merge: CUT:SIZE, as in layer1:4 layer2:4. Without it the net is an individual one."""
    merge: str = "max"
    """How they merge: max or mean."""
    input_size: int = 112
    """Side in pixels of the net's input."""
    init: str | None = None
    """Net to start from: a name in the zoo or the path of a card."""
    output: Path = Path("models/zoo")
    """Folder for weights and card."""
    cache: Path = Path("out/examples")
    """Folder for decoded pictures."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    target_recall: float = 0.998
    """Recall that the card's thresholds aim at."""
    redraws: int = 4
    """How often each positive is given other companions when the net is measured."""
    training: Annotated[TrainingConfig, Parameter(name="*")] = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.merge not in MERGES:
            raise UsageError(f"merge {self.merge!r} is unknown; known are {', '.join(MERGES)}")
        if self.trunk not in TRUNKS:
            raise UsageError(f"trunk {self.trunk!r} is unknown; known are {', '.join(TRUNKS)}")

    def build_net(self) -> GroupNet:
        points = tuple(point.split(":") for point in self.merge_points)
        merge_points = tuple(MergePoint(cut=cut, size=int(size)) for cut, size in points)
        net = GroupNet(Trunk(self.trunk, len(self.categories)), merge_points, self.merge)
        if self.init:
            net.trunk.load_state_dict(load_net(self.init)[0].trunk.state_dict())
        return net

    def load(self, labels: tuple[str, ...]) -> Examples:
        pixels, truth = load_examples(list(labels), self.categories, self.input_size, self.cache, self.endpoint_url)
        try:
            return Examples(pixels_NSS3=pixels, labels_NK=truth)
        except ValueError as error:
            raise UsageError(f"{', '.join(labels)}: {error}") from error


def fit(config: TrainConfig, on_progress: Callable[[int, float, float], None]) -> Card:
    """Trains, measures and writes the net. Raises UsageError on bad input, RunError when training diverges."""
    examples, validation = config.load(config.labels), config.load(config.validation)
    began = time.perf_counter()

    def save(net: GroupNet, folder: Path, facts: dict[str, Any]) -> Card:
        return save_net(
            net, folder, config.name, categories=config.categories, input_size=config.input_size, facts=facts
        )

    def checkpoint(step: int, net: GroupNet) -> None:
        save(net, config.cache / "checkpoints", {"step": step})

    try:
        net = train(config.build_net(), examples, config.training, on_progress=on_progress, on_checkpoint=checkpoint)
    except ValueError as error:
        raise RunError(str(error)) from error
    seconds = round(time.perf_counter() - began)
    training = config.training
    facts = {
        "data": {"labels": config.labels, "pictures": len(examples.labels_NK), "validation": config.validation},
        "training": asdict(training) | {"init": config.init, "seconds": seconds},
        "hardware": f"{platform.machine()}, {training.threads} threads, torch {torch.__version__}",
        "measured": measure(
            net, validation, target_recall=config.target_recall, redraws=config.redraws, seed=training.seed
        ),
    }
    return save(net, config.output, facts)
