"""Nets on disk: weights as safetensors, beside them a JSON card that says what they are.

A pickle is never opened. The digest in the card is checked before the weights are used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from models.backbone import Trunk
from models.group_net import GroupNet, MergePoint

ZOO = Path(__file__).parent / "zoo"


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

    @property
    def version(self) -> str:
        return f"{self.name}@{self.sha256[:12]}"


def save_net(
    net: GroupNet, folder: Path, name: str, *, categories: tuple[str, ...], input_size: int, facts: dict[str, Any]
) -> Card:
    """Writes ``name.safetensors`` (float32) and ``name.json`` into ``folder``."""
    body = save_safetensors({key: value.contiguous() for key, value in net.trunk.classifier.state_dict().items()})
    folder.mkdir(parents=True, exist_ok=True)
    card = Card(
        name=name,
        trunk=net.trunk.name,
        merge=net.merge_name,
        merge_points=net.merge_points,
        categories=categories,
        input_size=input_size,
        sha256=hashlib.sha256(body).hexdigest(),
        facts=facts,
    )
    (folder / f"{name}.safetensors").write_bytes(body)
    described = vars(card) | {"merge_points": [vars(point) for point in card.merge_points]}
    (folder / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n")
    return card


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


def load_net(model: str) -> tuple[GroupNet, Card]:
    """The net in eval mode on the CPU. Raises ValueError when it is missing or not what its card says."""
    card = read_card(model)
    path = locate(model).with_suffix(".safetensors")
    if not path.is_file():
        raise ValueError(f"model {model!r} has a card but no weights: {path} is missing")
    body = path.read_bytes()
    digest = hashlib.sha256(body).hexdigest()
    if digest != card.sha256:
        raise ValueError(f"{path} has sha256 {digest}, but its card says {card.sha256}: fetch the file again")
    net = GroupNet(Trunk(card.trunk, len(card.categories)), card.merge_points, card.merge)
    net.trunk.classifier.load_state_dict(load_safetensors(body))
    return net.eval(), card
