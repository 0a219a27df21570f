"""What a net is, as its card says: read by all who need not compute with it, without torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

ZOO = Path(__file__).parent / "zoo"


@dataclass(frozen=True, kw_only=True)
class MergePoint:
    """``size`` neighbouring units become one behind the segment ``cut``; behind ``pixels`` the images do."""

    cut: str
    size: int


def group_sizes(merge_points: tuple[MergePoint, ...]) -> tuple[int, ...]:
    """By depth, the number of merges they take: the prefix products of the points' sizes."""
    sizes = [point.size for point in merge_points]
    return tuple(prod(sizes[:depth]) for depth in range(len(sizes) + 1))


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a net is and how good it was when it was measured. ``facts`` is for people."""

    name: str
    trunk: str
    merge: str
    merge_points: tuple[MergePoint, ...]
    categories: tuple[str, ...]
    input_size: int
    sha256: str
    facts: dict[str, Any]
    segment_gmac: dict[str, float] | None = None
    """As ``models/cost.py`` counts it at ``input_size``; older cards lack it."""
    made_of: str | None = None
    """Version of the net in floats that one in int8 was made of (``models/int8.py``); of one in floats None."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes that the net can test, from single images up."""
        return group_sizes(self.merge_points)

    @property
    def int8(self) -> bool:
        """Whether its weights are graphs in int8: for CPUs, and pictures of ``input_size`` alone."""
        return self.made_of is not None

    @property
    def version(self) -> str:
        return f"{self.name}@{self.sha256[:12]}"


def locate(model: str) -> Path:
    """The card of a net named as in the zoo, or by the path of its card or weights."""
    path = Path(model)
    if path.suffix in {".json", ".safetensors"}:
        card = path.with_suffix(".json")
    else:
        card = ZOO / f"{model}.json"
    if not card.is_file():
        known = ", ".join(sorted(entry.stem for entry in ZOO.glob("*.json"))) or "none"
        raise ValueError(f"model {model!r} is missing: no card at {card}; in the zoo are: {known}")
    return card


def read_card(model: str) -> Card:
    path = locate(model)
    try:
        raw = json.loads(path.read_text())
        points = tuple(MergePoint(**point) for point in raw.pop("merge_points"))
        categories = tuple(raw.pop("categories"))
        return Card(merge_points=points, categories=categories, **raw)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a model card: {error}") from error


def read_weights(card: Card, model: str) -> bytes:
    """The weights beside a card, as they are on disk. Raises ValueError when they are missing or not the card's."""
    path = locate(model).with_suffix(".safetensors")
    if not path.is_file():
        raise ValueError(f"model {model!r} has a card but no weights: {path} is missing")
    body = path.read_bytes()
    digest = hashlib.sha256(body).hexdigest()
    if digest != card.sha256:
        raise ValueError(f"{path} has sha256 {digest}, but its card says {card.sha256}: fetch the file again")
    return body
