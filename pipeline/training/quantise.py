"""A net in int8 of one in floats: ranges from some labelled pictures, a card with what the others measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.card import Card, read_card
from models.evaluation import measure
from models.group_net import GroupNet
from models.int8 import quantise
from models.training import Examples, score_groups
from models.weights import load_net, save_graphs
from pipeline.errors import UsageError
from pipeline.labels.examples import read_labelled
from pipeline.training.fit import read_pixels
from pipeline.training.machine import describe_versions

FEWEST = 32
"""Pictures for the ranges: with fewer the rarest activations are cut off."""


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """Makes a net in int8, for CPUs, of one in floats. Its scores are others: calibrate it, and plan with it, anew.

    Exit codes: 0 done, 1 it began and failed, 2 wrong usage, labels or net.
    """

    name: str
    """Name of the new net: NAME.safetensors and NAME.json are written."""
    model: str
    """The net in floats: one of the zoo, or the path of its card."""
    labels: tuple[str, ...]
    """Pictures like those that it will see: folders with a folder per class, or labels files (Parquet: uri, category,
    label)."""
    pictures: int = 512
    """So many of them, drawn at random, give the ranges of what the net computes; the others judge the new net."""
    output: Path = Path("models/zoo")
    """Folder for graphs and card."""
    cache: Path = Path("out/examples")
    """Folder for decoded pictures."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    about: str = ""
    """What the net is for, in words for its card."""
    target_recall: float = 0.998
    """Recall that the card's thresholds aim at."""
    redraws: int = 4
    """How often each positive is given other companions when the nets are measured."""
    seed: int = 1
    """Of the pictures for the ranges, and of the companions."""

    def __post_init__(self) -> None:
        if self.pictures < FEWEST:
            raise UsageError(f"pictures is {self.pictures}, but ranges want at least {FEWEST}")
        if not 0 < self.target_recall <= 1:
            raise UsageError(f"target recall is {self.target_recall:g}, but it is a share of the positives")
        if self.redraws < 1:
            raise UsageError(f"redraws is {self.redraws}, but it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """The new net's card, and what its net in floats measured on the same pictures."""

    card: Card
    before: list[dict[str, Any]]


def run_quantise(config: QuantiseConfig, say: Callable[[str], None]) -> Quantised:
    """Raises UsageError on labels or a net that cannot be quantised."""
    try:
        net, card = load_net(config.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if card.arithmetic != "float":
        raise UsageError(f"model {config.model!r} is a net in {card.arithmetic} already: give the one it was made of")
    found = read_labelled(config.labels, card.categories, config.endpoint_url)
    if len(found.uris) <= config.pictures:
        raise UsageError(
            f"labels: {len(found.uris):,} pictures, of which {config.pictures:,} are for ranges, leave none to judge "
            "the net with: label more, or give fewer --pictures"
        )
    pixels = np.load(read_pixels(found.uris, card.input_size, config.cache, config.endpoint_url), mmap_mode="r")
    order = np.random.default_rng(config.seed).permutation(len(pixels))
    ranges, judging = np.sort(order[: config.pictures]), np.sort(order[config.pictures :])
    try:
        judge = Examples(pixels_NSS3=pixels[judging], labels_NK=found.labels_NK[judging], categories=card.categories)
    except ValueError as error:
        raise UsageError(f"{', '.join(config.labels)}: {error}") from error
    say(f"ranges of {len(ranges):,} pictures, {len(judging):,} others judge")
    try:
        graphs = quantise(load_net(config.model)[0], pixels[ranges])
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: install dorfman with its extra int8") from error
    facts = {
        "about": config.about,
        "made_of": card.version,
        "ranges": {"labels": config.labels, "pictures": len(ranges), "seed": config.seed},
        "versions": describe_versions("dorfman", "torch", "onnx", "onnxruntime"),
        "gmac_per_test": card.facts.get("gmac_per_test"),
    }
    save_graphs(graphs, config.output, config.name, source=card, facts=facts)
    int8_net, _ = load_net(str(config.output / f"{config.name}.json"))
    judged = partial(
        measure, examples=judge, target_recall=config.target_recall, redraws=config.redraws, seed=config.seed
    )
    facts["scores"] = _compare(net, int8_net, judge)
    facts["measured"] = judged(int8_net)
    save_graphs(graphs, config.output, config.name, source=card, facts=facts)
    return Quantised(card=read_card(str(config.output / f"{config.name}.json")), before=judged(net))


def _compare(before: GroupNet, after: GroupNet, examples: Examples) -> dict[str, float]:
    """How far the scores of single images lie apart."""
    alone = np.arange(len(examples.pixels_NSS3))[:, None]
    differences = np.abs(
        score_groups(after, examples.pixels_NSS3, alone) - score_groups(before, examples.pixels_NSS3, alone)
    )
    return {
        "pictures": len(alone),
        "mean_difference": round(float(differences.mean()), 6),
        "greatest_difference": round(float(differences.max()), 6),
    }
