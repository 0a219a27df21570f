"""Trains a net: ``python -m jobs.train --labels a/labels.parquet --validation b/labels.parquet --name NAME``."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console

from jobs.cli import run_job
from models.backbone import TRUNKS, Trunk
from models.evaluation import measure
from models.group_net import GroupNet, MergePoint
from models.training import Examples, TrainingConfig, train
from models.weights import load_net, save_net
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
        if self.trunk not in TRUNKS:
            raise UsageError(f"trunk {self.trunk!r} is unknown; known are {', '.join(TRUNKS)}")

    def build_net(self) -> GroupNet:
        points = tuple(point.split(":") for point in self.merge_points)
        merge_points = tuple(MergePoint(cut=cut, size=int(size)) for cut, size in points)
        net = GroupNet(Trunk(self.trunk, len(self.categories)), merge_points, self.merge)
        if self.init:
            net.trunk.load_state_dict(load_net(self.init)[0].trunk.state_dict())
        return net


def run(config: TrainConfig) -> None:
    console = Console()
    sets = [
        Examples(**dict(zip(("pixels_NSS3", "labels_NK"), loaded, strict=True)))
        for loaded in (
            load_examples(list(uris), config.categories, config.input_size, config.cache, config.endpoint_url)
            for uris in (config.labels, config.validation)
        )
    ]
    began = time.perf_counter()
    steps = config.training.steps

    def progress(step: int, loss: float, rate: float) -> None:
        console.print(f"step {step:,}/{steps:,}  loss {loss:.4f}  {rate * 60:.0f} steps/min")

    def checkpoint(step: int, net: GroupNet) -> None:
        save(net, config.cache / "checkpoints", {"step": step})

    def save(net: GroupNet, folder: Path, facts: dict) -> None:
        save_net(net, folder, config.name, categories=config.categories, input_size=config.input_size, facts=facts)

    try:
        net = train(config.build_net(), sets[0], config.training, on_progress=progress, on_checkpoint=checkpoint)
    except ValueError as error:
        raise RunError(str(error)) from error
    seconds = time.perf_counter() - began
    rows = measure(net, sets[1], target_recall=config.target_recall, redraws=config.redraws, seed=config.training.seed)
    facts = {
        "data": {"labels": config.labels, "pictures": len(sets[0].labels_NK), "validation": config.validation},
        "training": asdict(config.training) | {"init": config.init, "seconds": round(seconds)},
        "hardware": f"{platform.machine()}, {config.training.threads} threads, torch {torch.__version__}",
        "measured": rows,
    }
    save(net, config.output, facts)
    for row in rows:
        console.print(
            f"groups of {row['group_size']}: recall {row['recall']:.4f} "
            f"[{row['recall_interval'][0]:.4f}, {row['recall_interval'][1]:.4f}] of {row['positives']} positives, "
            f"FPR {row['false_positive_rate']:.4f} at threshold {row['threshold']:.4f}"
        )


if __name__ == "__main__":
    run_job("jobs.train", TrainConfig, run)
