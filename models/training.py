"""Training a group net, on arrays of pictures.

Shapes: N pictures, S pixels a side, K categories, G groups, M members, B groups in a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.cost import gmac_per_test
from models.group_net import GroupNet


@dataclass(frozen=True, kw_only=True)
class Examples:
    """``pixels_NSS3`` uint8; ``labels_NK`` bool."""

    pixels_NSS3: np.ndarray
    labels_NK: np.ndarray
    categories: tuple[str, ...]

    def __post_init__(self) -> None:
        for category, labels_N in zip(self.categories, self.labels_NK.T, strict=True):
            for kind, there in (("with", labels_N.any()), ("without", not labels_N.all())):
                if not there:
                    raise ValueError(
                        f"none of the {labels_N.size} pictures is labelled {kind} category {category!r}: "
                        "a net needs both"
                    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    steps: int = 3000
    """Optimiser steps."""
    images_per_step: int = 128
    """Pictures in a step of single images, shared out among the workers. Groups cost less for each picture, so a
    step of groups takes as many more as cost the same."""
    group_shares: tuple[float, ...] = (1.0,)
    """How often each group size is drawn, from single images up."""
    positive_share: float = 0.5
    """Share of the groups that are given a violating member."""
    learning_rate: float = 2e-3
    """Peak of a one-cycle schedule."""
    weight_decay: float = 0.02
    ema_decay: float = 0.998
    """The net that is kept is the running average of the trained one. This is what it keeps of itself in a step, at
    most: early on it keeps less (``warm_decay``), so that a short training is not an average of its beginnings."""
    hard_share: float = 0.0
    """Share of the negatives drawn from those the net finds hardest."""
    hard_searches: int = 4
    """How often these are looked for."""
    distillation: float = 0.0
    """Weight of the teacher's scores in the targets; the rest is the label's."""
    frozen: tuple[str, ...] = ()
    """Segments whose weights stay as they were initialised: early ones cost most of a step and change least."""
    frozen_statistics: bool = False
    """Batch norms keep the statistics they were initialised with. Groups of different sizes have different
    ones, and a checkpoint has room for one: a net that is to test several sizes starts from an individual one
    and adapts its weights to fixed statistics."""
    views: Literal["any way up", "upright"] = "any way up"
    """Which symmetries make new pictures of old ones: all eight of the square, or mirroring alone."""
    input_sizes: tuple[int, ...] = ()
    """Sides in pixels that are drawn from, a step at a time; without them, the pictures' own. A net that is
    to be used at several sizes learns at all of them."""
    shift: float = 0.0
    """Pictures are moved by up to this share of their side."""
    bf16: bool = False
    """Multiply in bfloat16; weights, norms and the optimiser stay in float32."""
    seed: int = 1
    threads: int = 2

    def __post_init__(self) -> None:
        for name in ("positive_share", "hard_share", "distillation", "shift"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it is a share, at least 0 and below 1")
        for name in ("steps", "images_per_step", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if not self.group_shares or min(self.group_shares) < 0 or sum(self.group_shares) == 0:
            raise ValueError(f"group_shares are {self.group_shares}; give each group size its share, as in 0.5 0.5")


def augment(images_NCHW: Tensor, generator: torch.Generator, config: TrainingConfig) -> Tensor:
    """Other views of the pictures; brightness, contrast and place drawn for each one."""
    count, side = len(images_NCHW), images_NCHW.shape[-1]
    if config.views == "upright":
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        images_NCHW = torch.where(mirrored.to(images_NCHW.device), images_NCHW.flip(3), images_NCHW)
    else:
        turns, flip = (int(torch.randint(high, (), generator=generator)) for high in (4, 2))
        images_NCHW = torch.rot90(images_NCHW, turns, (2, 3))
        images_NCHW = images_NCHW.flip(3) if flip else images_NCHW
    reach = round(config.shift * side)
    if reach:
        padded = functional.pad(images_NCHW, (reach,) * 4, mode="reflect")
        places = torch.randint(2 * reach + 1, (count, 2), generator=generator).tolist()
        images_NCHW = torch.stack(
            [padded[row, :, top : top + side, left : left + side] for row, (top, left) in enumerate(places)]
        )
    gain = 1 + 0.3 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    offset = 0.5 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    moved = images_NCHW * gain.to(images_NCHW.device) + offset.to(images_NCHW.device)
    return moved.contiguous(memory_format=torch.channels_last)


class GroupSampler:
    """Draws groups: random negatives, and in some of them one violating picture (rarely two).

    The violating one is of a random category first, so that a rare category is learnt like a common
    one. Where every picture shows some category there are no negatives to host it: groups are then
    drawn as the pictures come.
    """

    def __init__(self, labels_NK: np.ndarray, config: TrainingConfig, seed: int) -> None:
        self.positives_K = [np.flatnonzero(labels_N) for labels_N in labels_NK.T]
        self.negatives = np.flatnonzero(~labels_NK.any(axis=1))
        self.hard = self.negatives
        self.count = len(labels_NK)
        self.config = config
        self.rng = np.random.default_rng(seed)

    def draw(self, groups: int, size: int) -> np.ndarray:
        """Indices (G, M)."""
        if not self.negatives.size:
            return self.rng.integers(0, self.count, (groups, size))
        members_GM = self.rng.choice(self.negatives, (groups, size))
        swap_GM = self.rng.random((groups, size)) < self.config.hard_share
        members_GM[swap_GM] = self.rng.choice(self.hard, int(swap_GM.sum()))
        for group in np.flatnonzero(self.rng.random(groups) < self.config.positive_share):
            violating = 2 if size > 1 and self.rng.random() < 0.1 else 1
            for slot in self.rng.choice(size, violating, replace=False):
                category = int(self.rng.integers(len(self.positives_K)))
                members_GM[group, slot] = self.rng.choice(self.positives_K[category])
        return members_GM


_Tensors = tuple[Tensor, ...] | list[Tensor]


class Trainer:
    """One net in training, and the running average of its weights, which is what is kept.

    ``rank`` of ``workers`` draws its own share of each step's pictures; ``parallel`` wraps the net so
    that the workers' gradients are averaged.
    """

    def __init__(
        self,
        net: GroupNet,
        examples: Examples,
        config: TrainingConfig,
        *,
        teacher: GroupNet | None = None,
        device: str = "cpu",
        rank: int = 0,
        workers: int = 1,
        parallel: Callable[[GroupNet], nn.Module] = lambda net: net,
    ) -> None:
        unknown = set(config.frozen) - set(net.trunk.cuts)
        if unknown:
            raise ValueError(f"frozen segments {sorted(unknown)} are not among {net.trunk.cuts}")
        if len(config.group_shares) > len(net.group_sizes):
            raise ValueError(f"group_shares are {config.group_shares}, but the net's sizes are {net.group_sizes}")
        if config.distillation and teacher is None:
            raise ValueError(f"distillation is {config.distillation}, but there is no teacher to learn from")
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads)
        self.net, self.examples, self.config, self.device = net, examples, config, device
        costs = {size: gmac_per_test(net, examples.pixels_NSS3.shape[1], size) for size in net.group_sizes}
        self.groups_per_step = {
            size: max(2, round(config.images_per_step / workers * costs[1] / cost)) for size, cost in costs.items()
        }
        self.generator = torch.Generator().manual_seed(config.seed + 1000 * rank)
        self.sampler = GroupSampler(examples.labels_NK, config, config.seed + 1000 * rank)
        self.targets_NK = torch.from_numpy(examples.labels_NK.astype(np.float32))
        if teacher is not None and config.distillation:
            everyone = np.arange(len(self.targets_NK))[:, None]
            taught_NK = torch.from_numpy(score_groups(teacher, examples.pixels_NSS3, everyone))
            self.targets_NK = self.targets_NK.lerp(taught_NK, config.distillation)
        self.shares = np.array(config.group_shares) / sum(config.group_shares)
        net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for segment in config.frozen:
            for parameter in net.trunk.segment_parameters(segment):
                parameter.requires_grad_(False)
        self._average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=self._take_into_average, use_buffers=True)
        self._set_mode()
        self.parallel_net = parallel(net)
        self.optimizer = torch.optim.AdamW(_parameter_groups(net, config.weight_decay), lr=config.learning_rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.15
        )
        self.steps_done = 0
        self.running_loss = 0.0

    @property
    def average(self) -> GroupNet:
        return cast(GroupNet, self._average.module)

    def step(self) -> float:
        """One optimiser step at a group size drawn for it; the loss. Raises ValueError when it is not finite."""
        if self.config.hard_share and self.steps_done and self.steps_done % self._search_every() == 0:
            self.find_hard_negatives()
        # The workers draw the same size: a step is as slow as its slowest worker.
        turn = np.random.default_rng([self.config.seed, self.steps_done])
        size = int(turn.choice(self.net.group_sizes[: len(self.shares)], p=self.shares))
        members_GM = self.sampler.draw(self.groups_per_step[size], size)
        pixels = torch.from_numpy(self.examples.pixels_NSS3[members_GM.reshape(-1)]).to(self.device)
        images_NCHW = self.net.trunk.normalise(pixels)
        if self.config.input_sizes:
            side = int(turn.choice(self.config.input_sizes))
            images_NCHW = functional.interpolate(images_NCHW, (side, side), mode="bilinear", antialias=True)
        images_NCHW = augment(images_NCHW, self.generator, self.config)
        present_N = torch.ones(len(images_NCHW), dtype=torch.bool, device=self.device)
        target_GK = self.targets_NK[torch.from_numpy(members_GM)].amax(dim=1).to(self.device)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.config.bf16):
            logits_GK = self.parallel_net(images_NCHW, present_N, size)
        loss = functional.binary_cross_entropy_with_logits(logits_GK.float(), target_GK)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {self.steps_done + 1}: "
                f"lower the learning rate of {self.config.learning_rate}"
            )
        self.optimizer.step()
        self.schedule.step()
        self._average.update_parameters(self.net)
        self.running_loss += 0.02 * (value - self.running_loss) if self.steps_done else value
        self.steps_done += 1
        return value

    def _take_into_average(self, averaged: _Tensors, current: _Tensors, taken: Tensor | int) -> None:
        decay = warm_decay(self.config.ema_decay, self.steps_done)
        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(averaged, current, taken)

    def _search_every(self) -> int:
        return max(1, self.config.steps // (self.config.hard_searches + 1))

    def _set_mode(self) -> None:
        self.net.train()
        if self.config.frozen_statistics:
            for module in self.net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def find_hard_negatives(self, pool: int = 16_000) -> None:
        """From now on the sampler's hard negatives are those that the average net scores highest."""
        candidates = self.sampler.rng.permutation(self.sampler.negatives)[:pool]
        self.sampler.hard = hardest_negatives(self.average, self.examples, candidates)

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on as if it had never stopped."""
        return {
            "config": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.config).items()},
            "net": self.net.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "sampler": self.sampler.rng.bit_generator.state,
            "hard": torch.from_numpy(self.sampler.hard),
            "steps_done": self.steps_done,
            "running_loss": self.running_loss,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from ``state``. Raises ValueError when it belongs to a training of other settings."""
        mine = self.state()["config"]
        changed = sorted(name for name in mine if state["config"].get(name) != mine[name])
        if changed:
            raise ValueError(
                f"the checkpoint was made with other settings of {', '.join(changed)}: give the earlier ones, "
                "or start afresh under another name"
            )
        self.net.load_state_dict(state["net"])
        self._average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"].cpu())
        self.sampler.rng.bit_generator.state = state["sampler"]
        self.sampler.hard = state["hard"].cpu().numpy()
        self.steps_done = state["steps_done"]
        self.running_loss = state["running_loss"]


def warm_decay(decay: float, steps: int) -> float:
    """Of a running average after so many steps: it spans the last tenth of them or so, until it spans what ``decay``
    says. The rule is that of TensorFlow's ExponentialMovingAverage with ``num_updates``."""
    return min(decay, (1 + steps) / (10 + steps))


def _parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices and kernels only."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    free = [parameter for parameter in trained if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def hardest_negatives(net: GroupNet, examples: Examples, negatives: np.ndarray, share: float = 0.1) -> np.ndarray:
    """The ``share`` of the negatives with the highest individual scores."""
    scores = score_groups(net, examples.pixels_NSS3, negatives[:, None]).max(axis=1)
    return negatives[np.argsort(scores)[-max(1, round(share * len(negatives))) :]]


@torch.inference_mode()
def score_groups(net: GroupNet, pixels_NSS3: np.ndarray, members_GM: np.ndarray, batch: int = 256) -> np.ndarray:
    """Scores (G, K) after the sigmoid, of groups given as indices, on the device that holds the net."""
    net.eval()
    size = members_GM.shape[1]
    return np.concatenate(list(_score_batches(net, pixels_NSS3, members_GM, max(1, batch // size))))


def _score_batches(net: GroupNet, pixels: np.ndarray, members_GM: np.ndarray, groups: int) -> Iterator[np.ndarray]:
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    for start in range(0, len(members_GM), groups):
        chunk_GM = members_GM[start : start + groups]
        images = net.trunk.normalise(torch.from_numpy(pixels[chunk_GM.reshape(-1)]).to(device))
        present = torch.ones(len(images), dtype=torch.bool, device=device)
        yield torch.sigmoid(net(images, present, chunk_GM.shape[1])).float().cpu().numpy()


def host_positives(
    labels_N: np.ndarray, size: int, redraws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of ``size`` around every positive, ``redraws`` times with other negatives, and as many without.

    Returns members (G, M) whose first is the positive, and members (G, M) of negatives only.
    """
    positives, negatives = np.flatnonzero(labels_N), np.flatnonzero(~labels_N)
    return host(np.tile(positives, redraws), negatives, size, rng), whole_groups(rng.permutation(negatives), size)


def host(positives_P: np.ndarray, negatives: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Members (P, M) of groups: each positive first, then negatives drawn for it."""
    hosted_PM = rng.choice(negatives, (len(positives_P), size))
    hosted_PM[:, 0] = positives_P
    return hosted_PM


def whole_groups(members: np.ndarray, size: int) -> np.ndarray:
    """Members (G, M) in their order; what does not fill a group is left out."""
    return members[: len(members) // size * size].reshape(-1, size)


@dataclass(frozen=True, kw_only=True)
class Progress:
    step: int
    loss: float
    """Running mean."""
    steps_per_second: float
    measured: dict[int, float] | None
    """By group size, recall at a fixed false positive rate; only now and then."""


def train(
    trainer: Trainer,
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_checkpoint: Callable[[Trainer], None] = lambda trainer: None,
    measure: Callable[[GroupNet], dict[int, float]] | None = None,
    progress_every: int = 50,
    checkpoint_every: int = 500,
) -> GroupNet:
    """Runs the steps that are left and returns the averaged net. Raises ValueError when the loss is not finite."""
    began, before = time.perf_counter(), trainer.steps_done
    while trainer.steps_done < trainer.config.steps:
        trainer.step()
        step, last = trainer.steps_done, trainer.steps_done == trainer.config.steps
        measuring = measure is not None and (step % checkpoint_every == 0 or last)
        if step % progress_every == 0 or measuring:
            rate = (step - before) / (time.perf_counter() - began)
            measured = measure(trainer.average) if measure and measuring else None
            on_progress(Progress(step=step, loss=trainer.running_loss, steps_per_second=rate, measured=measured))
        if step % checkpoint_every == 0 or last:
            on_checkpoint(trainer)
    return trainer.average.eval()


def write_checkpoint(trainer: Trainer, path: Path, extra: dict[str, Any]) -> None:
    """All or nothing: a kill while writing leaves the checkpoint before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(trainer.state() | {"extra": extra}, partial)
    partial.replace(path)


def read_checkpoint(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Restores the trainer; returns what was kept beside. Only tensors and plain values are unpickled."""
    state = torch.load(path, map_location=trainer.device, weights_only=True)
    trainer.restore(state)
    return state["extra"]
