"""Nets on disk: weights as safetensors, beside them a JSON card that says what they are.

A scan opens nothing else, and checks the digest in the card before it uses the weights. A training may
also start from torchvision's weights or from a file of the user's; of a pickle only tensors and plain
values are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from models.backbone import Trunk
from models.card import Card, read_card, read_weights
from models.cost import segment_gmac
from models.group_net import GroupNet
from models.int8 import PieceTrunk


def save_net(
    net: GroupNet,
    folder: Path,
    name: str,
    *,
    categories: tuple[str, ...],
    input_size: int,
    facts: dict[str, Any],
    half: bool = False,
) -> Card:
    """Writes ``name.safetensors`` (float32, or float16 for ``half`` the size) and ``name.json`` into ``folder``."""
    state = {key: value.contiguous() for key, value in net.trunk.classifier.state_dict().items()}
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    body = save_safetensors(state)
    card = Card(
        name=name,
        trunk=net.trunk.name,
        merge=net.merge_name,
        merge_points=net.merge_points,
        categories=categories,
        input_size=input_size,
        sha256=hashlib.sha256(body).hexdigest(),
        facts=facts,
        segment_gmac=segment_gmac(net, input_size),
    )
    _write(folder, card, body)
    return card


def save_graphs(graphs: Mapping[str, bytes], folder: Path, name: str, *, source: Card, facts: dict[str, Any]) -> Card:
    """Writes the graphs of ``int8.quantise`` as a net of its own: its files are named as those of ``source`` are."""
    tensors = {end: torch.frombuffer(bytearray(graph), dtype=torch.uint8) for end, graph in graphs.items()}
    body = save_safetensors(tensors)
    digest = hashlib.sha256(body).hexdigest()
    card = replace(source, name=name, sha256=digest, facts=facts, made_of=source.version)
    _write(folder, card, body)
    return card


def _write(folder: Path, card: Card, body: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{card.name}.safetensors").write_bytes(body)
    described = vars(card) | {"merge_points": [vars(point) for point in card.merge_points]}
    (folder / f"{card.name}.json").write_text(json.dumps(described, indent=2) + "\n")


def initialise(net: GroupNet, categories: tuple[str, ...], source: GroupNet, known: tuple[str, ...]) -> None:
    """Gives ``net`` the weights of ``source``; of the head's rows, those of the categories both score.

    Raises ValueError when the trunks differ.
    """
    if net.trunk.name != source.trunk.name:
        raise ValueError(f"weights of trunk {source.trunk.name!r} do not fit trunk {net.trunk.name!r}")
    mine, theirs = net.trunk.classifier.state_dict(), source.trunk.classifier.state_dict()
    shared = [category for category in categories if category in known]
    for key, value in theirs.items():
        if not key.startswith(net.trunk.head_module + "."):
            mine[key] = value
        elif shared:
            rows = [categories.index(category) for category in shared]
            mine[key] = mine[key].clone()
            mine[key][rows] = value[[known.index(category) for category in shared]]
    net.trunk.classifier.load_state_dict(mine)


def torchvision_state(trunk: str, weights: str = "DEFAULT") -> dict[str, Tensor]:
    """State dict of torchvision's own weights, as in ``IMAGENET1K_V2``; downloaded once, then kept by torch.

    Raises ValueError when there are none of that name, or when they cannot be fetched.
    """
    from torchvision.models import get_model_weights  # noqa: PLC0415  a scan needs none, and it takes seconds

    try:
        known = get_model_weights(trunk)
    except ValueError as error:
        raise ValueError(f"trunk {trunk!r} is not torchvision's: it has no weights to start from") from error
    if weights not in known.__members__:
        raise ValueError(f"weights {weights!r} of {trunk!r} are unknown; known are {', '.join(known.__members__)}")
    found = known[weights]
    try:
        state: dict[str, Tensor] = found.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        # RuntimeError: the file has another hash than its name says, so the download was cut short.
        raise ValueError(
            f"{found.url} could not be fetched ({error}): try again, or fetch the file elsewhere and start from it"
        ) from error
    return state


def parse_state(body: bytes, file_name: str) -> dict[str, Tensor]:
    """State dict from the bytes of a ``.safetensors``, ``.pth`` or ``.pt`` file. Raises ValueError when it is none."""
    suffix = Path(file_name).suffix
    if suffix not in {".safetensors", ".pth", ".pt"}:
        raise ValueError(f"weights {file_name!r} end in {suffix!r}; .safetensors, .pth and .pt can be read")
    try:
        if suffix == ".safetensors":
            return load_safetensors(body)
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"weights {file_name!r} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {file_name!r} are not a state dict, names with tensors: save net.state_dict() alone")
    return state


def start_from(net: GroupNet, state: dict[str, Tensor]) -> None:
    """Gives ``net`` the weights of a state dict of its classifier; a head of another shape stays as it is.

    Raises ValueError when anything else is missing, unknown or of another shape, and changes nothing then.
    """
    head = net.trunk.head_module + "."
    mine = net.trunk.classifier.state_dict()
    if any(key in state and state[key].shape != mine[key].shape for key in mine if key.startswith(head)):
        state = {key: value for key, value in state.items() if not key.startswith(head)}
        expected = {key for key in mine if not key.startswith(head)}
    else:
        expected = set(mine)
    # Files from before 2018 lack this counter, which only a norm without momentum reads.
    missing = [key for key in expected - set(state) if not key.endswith("num_batches_tracked")]
    misshapen = [key for key in expected & set(state) if state[key].shape != mine[key].shape]
    for kind, keys in (("lack", missing), ("have unknown", set(state) - expected), ("have other shapes of", misshapen)):
        if keys:
            raise ValueError(f"the weights do not fit trunk {net.trunk.name!r}: they {kind} {_first_few(keys)}")
    net.trunk.classifier.load_state_dict(mine | state)


def _first_few(keys: Iterable[str]) -> str:
    first, *others = sorted(keys)
    return ", ".join([first, *others[:2]]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")


def load_net(model: str) -> tuple[GroupNet, Card]:
    """The net in eval mode on the CPU. Raises ValueError when it is missing or not what its card says."""
    card = read_card(model)
    tensors = load_safetensors(read_weights(card, model))
    trunk: Trunk
    if card.int8:
        graphs = {end: graph.numpy().tobytes() for end, graph in tensors.items()}
        trunk = PieceTrunk.of_graphs(card.trunk, len(card.categories), graphs)
    else:
        trunk = Trunk(card.trunk, len(card.categories))
        trunk.classifier.load_state_dict(tensors)
    net = GroupNet(trunk, card.merge_points, card.merge)
    if card.segment_gmac:
        net.counted_gmac[card.input_size] = card.segment_gmac
    return net.eval(), card
