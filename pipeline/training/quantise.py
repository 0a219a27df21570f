"""A net in int8 of one in floats: ranges from some labelled pictures, a card with what the others measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from models.card import Card, locate, read_card
from models.cost import NetCost, segment_gmac
from models.evaluation import check_measurable, measure
from models.group_net import GroupNet
from models.int8 import PieceTrunk, quantise
from models.training import Examples, score_groups
from models.weights import load_net, save_graphs
from pipeline.errors import UsageError
from pipeline.labels.examples import LabelledPictures, read_labelled
from pipeline.training.fit import Source, read_pixels
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
    """Raises UsageError on labels or a net that cannot be quantised, before anything is written."""
    net, card = _load(config)
    found = read_labelled(config.labels, card.categories, config.endpoint_url)
    if len(found.uris) <= config.pictures:
        raise UsageError(
            f"labels: {len(found.uris):,} pictures, of which {config.pictures:,} are for ranges, leave none to judge "
            "the net with: label more, or give fewer --pictures"
        )
    order = np.random.default_rng(config.seed).permutation(len(found.uris))
    ranges, judging = (
        _decoded(config, card, found, rows) for rows in (order[: config.pictures], order[config.pictures :])
    )
    try:
        judge = judging.open()
        check_measurable(judge, card.group_sizes, config.seed)
    except ValueError as error:
        raise UsageError(f"{', '.join(config.labels)}: {error}") from error
    say(f"ranges of {config.pictures:,} pictures, {len(judge.pixels_NSS3):,} others judge")
    source = replace(card, segment_gmac=segment_gmac(net, card.input_size))
    graphs = quantise(net, np.load(ranges.pixels, mmap_mode="r"))
    trunk = PieceTrunk.of_graphs(card.trunk, len(card.categories), graphs)
    small = GroupNet(trunk, card.merge_points, card.merge).eval()
    judged = partial(
        measure, examples=judge, target_recall=config.target_recall, redraws=config.redraws, seed=config.seed
    )
    facts = {
        "about": config.about,
        "ranges": {"labels": config.labels, "seed": config.seed} | ranges.describe(),
        "validation": {"labels": "the others"} | judging.describe(),
        "versions": describe_versions("dorfman", "torch", "onnx", "onnxruntime"),
        "gmac_per_test": {str(size): round(NetCost(source.segment_gmac or {}, card.merge_points).per_test(size), 6)
                          for size in card.group_sizes},
        "scores": _compare(net, small, judge),
        "measured": judged(small),
    }  # fmt: skip
    save_graphs(graphs, config.output, config.name, source=source, facts=facts)
    return Quantised(card=read_card(str(config.output / f"{config.name}.json")), before=judged(net))


def _load(config: QuantiseConfig) -> tuple[GroupNet, Card]:
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} missing: install dorfman with its extra int8, dorfman[int8]")
    try:
        net, card = load_net(config.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if card.int8:
        raise UsageError(f"model {config.model!r} is a net in int8 already: give the one it was made of")
    if locate(config.model).resolve() == (config.output / f"{config.name}.json").resolve():
        raise UsageError(f"name {config.name!r} is that of the net in floats, which it would replace: give another")
    if config.pictures < card.group_sizes[-1]:
        raise UsageError(
            f"pictures is {config.pictures}, but the net tests groups of {card.group_sizes[-1]}: give as many at least"
        )
    return net, card


def _decoded(config: QuantiseConfig, card: Card, found: LabelledPictures, rows: np.ndarray) -> Source:
    uris = [found.uris[row] for row in rows]
    pixels = read_pixels(uris, card.input_size, config.cache, config.endpoint_url)
    return Source(pixels=pixels, labels_NK=found.labels_NK[rows], categories=card.categories)


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
