"""Making a net: labelled pictures in, weights and a card with what was measured out."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter

from models.backbone import TRUNKS, Trunk
from models.card import Card, MergePoint, read_card
from models.cost import gmac_per_test
from models.evaluation import check_measurable, measure, recall_at
from models.group_net import GroupNet
from models.merge import MERGES
from models.training import Examples, Progress, Trainer, TrainingConfig, read_checkpoint, train, write_checkpoint
from models.weights import (
    initialise,
    load_net,
    parse_state,
    save_net,
    start_from,
    torchvision_state,
)
from pipeline.errors import RunError, UsageError
from pipeline.flow import read_pictures
from pipeline.labels.examples import LabelledPictures, read_labelled, split_off
from pipeline.plan import Actors, Pool
from pipeline.run.cluster import ray_session
from pipeline.storage import parse_uri, read_object, storage_errors_as_usage
from pipeline.training.curves import draw_curves
from pipeline.training.machine import describe_versions
from pipeline.training.workers import Place, run_workers


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains a net on labelled pictures and writes it with its card. Run again, it goes on where it was."""

    name: str
    """Name of the net: NAME.safetensors and NAME.json are written."""
    labels: tuple[str, ...]
    """What to learn from: folders with a folder per class, or labels files (Parquet: uri, category, label)."""
    validation: tuple[str, ...] = ()
    """Other pictures, in the same forms: half sets the card's thresholds, half is what they are judged on."""
    validation_share: float = 0.1
    """Without --validation, this share of the pictures is kept from training."""
    categories: tuple[str, ...] = ("trefoil",)
    """What the net scores, in order."""
    trunk: str = "late_resnet"
    """The classifier below."""
    merge_points: tuple[str, ...] = ()
    """Where members merge: CUT:SIZE, as in layer1:4 layer2:4. Without it the net is an individual one."""
    merge: str = "max"
    """How they merge."""
    input_size: int = 112
    """Side in pixels of the net's input."""
    init: str | None = None
    """What to start from: a net in the zoo or the path of its card; torchvision:NAME for weights of torchvision's
    own, as in torchvision:DEFAULT; or a state dict of the trunk (.safetensors, .pth or .pt, local or s3://)."""
    teacher: str | None = None
    """Individual net whose scores are part of the targets: see --distillation."""
    output: Path = Path("models/zoo")
    """Folder for weights and card."""
    cache: Path = Path("out/examples")
    """Folder for decoded pictures and checkpoints. A picture is decoded once: one that changes needs another name."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    workers: int = 1
    """Processes that train together, through Ray Train; --cache and --output must be visible to all of them."""
    gpu: bool = False
    """Train on a GPU, one a worker."""
    about: str = ""
    """What the net is for, in words for its card."""
    half: bool = False
    """Keep the weights in float16, for half the size; the card's numbers are those of the rounded weights."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, each with a short measurement."""
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
        if not self.categories or len(set(self.categories)) != len(self.categories):
            raise UsageError(f"categories are {self.categories}: name each once, and at least one")
        if not 0 < self.validation_share < 1:
            raise UsageError(f"validation_share is {self.validation_share}, but it is a share between 0 and 1")
        if (self.training.distillation > 0) != (self.teacher is not None):
            raise UsageError("--teacher and --distillation belong together: give both or neither")
        if self.workers < 1:
            raise UsageError(f"workers is {self.workers}, but at least 1 must train")
        if self.gpu and self.workers == 1 and not torch.cuda.is_available():
            raise UsageError("--gpu: torch finds no GPU on this machine; leave it out to train on the CPU")
        self.parse_merge_points()

    def parse_merge_points(self) -> tuple[MergePoint, ...]:
        parsed = []
        for point in self.merge_points:
            cut, _, size = point.rpartition(":")
            if not size.isdigit() or int(size) < 2 or not cut:
                raise UsageError(f"merge point {point!r}: write CUT:SIZE with a size of at least 2, as in layer1:4")
            parsed.append(MergePoint(cut=cut, size=int(size)))
        return tuple(parsed)

    def absolute(self) -> TrainConfig:
        """The same with paths that hold in another working directory."""
        return replace(self, output=self.output.absolute(), cache=self.cache.absolute())

    def load_teacher(self) -> GroupNet | None:
        if self.teacher is None:
            return None
        try:
            net, card = load_net(self.teacher)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if card.int8:
            raise UsageError(f"teacher {self.teacher!r} is a net in int8: give the one it was made of")
        if card.categories != self.categories or card.input_size != self.input_size:
            raise UsageError(
                f"teacher {self.teacher!r} scores {list(card.categories)} at {card.input_size} px, "
                f"the net to train {list(self.categories)} at {self.input_size} px: they must be the same"
            )
        return net

    def build_net(self) -> GroupNet:
        """With the weights that training starts from: those of ``init``, else such as the seed gives."""
        torch.manual_seed(self.training.seed)
        try:
            net = GroupNet(Trunk(self.trunk, len(self.categories)), self.parse_merge_points(), self.merge)
            if self.init:
                self._initialise(net, self.init)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return net

    def _initialise(self, net: GroupNet, source: str) -> None:
        """Raises ValueError when the weights are missing or do not fit."""
        if source.startswith("torchvision:"):
            start_from(net, torchvision_state(self.trunk, source.removeprefix("torchvision:")))
        elif source.endswith((".safetensors", ".pth", ".pt")):
            with storage_errors_as_usage():
                try:
                    body = read_object(parse_uri(source), self.endpoint_url)
                except FileNotFoundError as error:
                    raise UsageError(f"weights {source}: no such file") from error
            start_from(net, parse_state(body, source))
        else:
            known, card = load_net(source)
            if card.int8:
                raise ValueError(f"--init {source!r} is a net in int8, which cannot learn: give the one it was made of")
            initialise(net, self.categories, known, card.categories)

    def load(self) -> tuple[Source, Source]:
        """To learn from, and to be judged by; decoded and checked."""
        pictures = read_labelled(self.labels, self.categories, self.endpoint_url)
        if self.validation:
            held = read_labelled(self.validation, self.categories, self.endpoint_url)
        else:
            pictures, held = split_off(pictures, self.validation_share)
        return self._decode(pictures, self.labels), self._decode(held, self.validation or self.labels)

    def _decode(self, pictures: LabelledPictures, names: tuple[str, ...]) -> Source:
        path = read_pixels(pictures.uris, self.input_size, self.cache, self.endpoint_url)
        source = Source(pixels=path.absolute(), labels_NK=pictures.labels_NK, categories=self.categories)
        try:
            source.open()
        except ValueError as error:
            raise UsageError(f"{', '.join(names)}: {error}") from error
        return source


@dataclass(frozen=True, kw_only=True)
class Source:
    """Decoded pictures as a worker finds them again: ``pixels`` is a file that every worker can read."""

    pixels: Path
    labels_NK: np.ndarray
    categories: tuple[str, ...]

    def open(self) -> Examples:
        """Raises ValueError when a category has no picture with it, or none without."""
        pixels = np.load(self.pixels, mmap_mode="r")
        return Examples(pixels_NSS3=pixels, labels_NK=self.labels_NK, categories=self.categories)

    def describe(self) -> dict[str, Any]:
        counts = self.labels_NK.sum(axis=0).tolist()
        return {
            "pictures": len(self.labels_NK),
            "positives": dict(zip(self.categories, counts, strict=True)),
            "labels_sha256": hashlib.sha256(self.labels_NK.tobytes()).hexdigest(),
        }


def read_pixels(uris: list[str], side: int, cache: Path, endpoint_url: str | None = None) -> Path:
    """A file of uint8 (N, side, side, 3): streamed through Ray Data once, then kept below ``cache``.

    Raises UsageError that names the first unreadable picture.
    """
    content = hashlib.sha256("\n".join([*uris, str(side)]).encode()).hexdigest()[:16]
    path = cache / f"{content}.npy"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    # Two trainings may decode the same pictures at once.
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(len(uris), side, side, 3))
    pool = Pool(num_cpus=1, actors=Actors(max=os.cpu_count() or 1))
    missing = len(uris)
    try:
        with ray_session([pool], "reading the pictures"):
            for row in read_pictures(uris, side, endpoint_url, pool):
                if row["error"]:
                    raise UsageError(f"{row['uri']}: {row['error']}; remove it from the labels")
                chunk = np.frombuffer(row["pixels"], np.uint8).reshape(-1, side, side, 3)
                pixels[row["first"] : row["first"] + len(chunk)] = chunk
                missing -= len(chunk)
        if missing:
            raise RunError(f"{missing:,} of {len(uris):,} pictures did not come back from Ray; start again")
        pixels.flush()
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def fit(config: TrainConfig, on_progress: Callable[[Progress], None]) -> Card:
    """Trains, measures and writes the net. Raises UsageError on bad input, RunError when training diverges."""
    learn, judge = config.load()
    net = config.build_net()
    teacher = config.load_teacher()
    if config.workers == 1:
        place = Place(device="cuda" if config.gpu else "cpu")
        train_and_measure(config, learn, judge, net, teacher, on_progress, place)
    else:
        run_workers(
            partial(train_and_measure, config.absolute(), learn, judge, net, teacher),
            workers=config.workers,
            gpu=config.gpu,
            threads=config.training.threads,
            storage=config.cache.absolute() / "workers",
            on_progress=on_progress,
        )
    return read_card(str(config.output / f"{config.name}.json"))


def train_and_measure(
    config: TrainConfig,
    learn: Source,
    judge: Source,
    net: GroupNet,
    teacher: GroupNet | None,
    on_progress: Callable[[Progress], None],
    place: Place,
) -> None:
    """One worker's part. The first of them keeps the checkpoints, measures, and writes net, card and curves."""
    training = config.training
    history: list[dict[str, Any]] = []
    began, seconds_before = time.perf_counter(), 0.0
    validation = judge.open()
    try:
        check_measurable(validation, net.group_sizes, training.seed)
    except ValueError as error:
        raise UsageError(f"validation: {error}") from error

    def seconds() -> float:
        return seconds_before + time.perf_counter() - began

    def progress(now: Progress) -> None:
        history.append(asdict(now))
        on_progress(now)

    def checkpoint(now: Trainer) -> None:
        write_checkpoint(now, path, {"history": history, "seconds": seconds()})

    path = config.cache / "checkpoints" / f"{config.name}.pt"
    first = place.rank == 0
    try:
        trainer = Trainer(
            net,
            learn.open(),
            training,
            teacher=teacher,
            device=place.device,
            rank=place.rank,
            workers=place.workers,
            parallel=place.parallel,
        )
        if path.exists():
            kept = read_checkpoint(trainer, path)
            history, seconds_before = kept["history"], kept["seconds"]
        net = train(
            trainer,
            on_progress=progress if first else lambda now: None,
            on_checkpoint=checkpoint if first else lambda now: None,
            measure=(lambda net: recall_at(net, validation, false_positive_rate=0.01, seed=training.seed))
            if first
            else None,
            checkpoint_every=config.checkpoint_every,
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    if not first:
        return
    duration = round(seconds())
    if config.half:
        net = net.half().float()
    save_net(
        net,
        config.output,
        config.name,
        categories=config.categories,
        input_size=config.input_size,
        half=config.half,
        facts={
            "about": config.about,
            "data": {"labels": config.labels} | learn.describe(),
            "validation": {"labels": config.validation or f"{config.validation_share:g} of the same pictures"}
            | judge.describe(),
            "training": asdict(training) | {"init": config.init, "teacher": config.teacher, "seconds": duration},
            "hardware": f"{place.workers} x {_hardware(place, training)}",
            "versions": describe_versions("dorfman", "torch", "torchvision"),
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "gmac_per_test": {
                str(size): round(gmac_per_test(net, config.input_size, size), 6) for size in net.group_sizes
            },
            "measured": measure(
                net, validation, target_recall=config.target_recall, redraws=config.redraws, seed=training.seed
            ),
        },
    )
    draw_curves(history, config.name, config.output / f"{config.name}.svg")
    path.unlink(missing_ok=True)


def _hardware(place: Place, training: TrainingConfig) -> str:
    if place.device.startswith("cuda"):
        return torch.cuda.get_device_name(place.device)
    return f"{training.threads} threads of {platform.machine()}"
