"""Training a group net, and measuring it: on arrays of pictures, in one process.

Shapes: N pictures, S pixels a side, K categories, G groups, M members, B groups in a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.group_net import GroupNet


@dataclass(frozen=True, kw_only=True)
class Examples:
    """``pixels_NSS3`` uint8; ``labels_NK`` bool."""

    pixels_NSS3: np.ndarray
    labels_NK: np.ndarray

    def __post_init__(self) -> None:
        violating = self.labels_NK.any(axis=1)
        for kind, there in (("violating", violating.any()), ("not violating", not violating.all())):
            if not there:
                raise ValueError(f"none of the {violating.size} pictures is labelled {kind}: a net needs both")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    steps: int = 3000
    """Optimiser steps."""
    images_per_step: int = 128
    """Pictures that pass through the net in one step, whatever the group size."""
    group_shares: tuple[float, ...] = (1.0,)
    """How often each group size is drawn, from single images up."""
    positive_share: float = 0.5
    """Share of the groups that are given a violating member."""
    learning_rate: float = 2e-3
    """Peak of a one-cycle schedule."""
    weight_decay: float = 0.02
    ema_decay: float = 0.998
    """The net that is kept is the running average of the trained one."""
    hard_share: float = 0.0
    """Share of the negatives drawn from those the net finds hardest; they are looked for four times."""
    frozen: tuple[str, ...] = ()
    """Segments whose weights stay as they were initialised: early ones cost most of a step and change least."""
    seed: int = 1
    threads: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.hard_share < 1:
            raise ValueError(f"hard_share is {self.hard_share}, but it is a share below 1")


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (N, S, S, 3) to float32 (N, 3, S, S) of about unit variance, channels last in memory."""
    return (pixels.permute(0, 3, 1, 2).float() - 127.5) / 64.0


def augment(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """One of the eight symmetries of the square for the batch, brightness and contrast for each picture."""
    count = images_NCHW.shape[0]
    turns, flip = (int(torch.randint(high, (), generator=generator)) for high in (4, 2))
    images_NCHW = torch.rot90(images_NCHW, turns, (2, 3))
    if flip:
        images_NCHW = images_NCHW.flip(3)
    gain = 1 + 0.3 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    shift = 0.5 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    return (images_NCHW * gain + shift).contiguous(memory_format=torch.channels_last)


class GroupSampler:
    """Draws groups: random negatives, and in some of them one violating picture (rarely two)."""

    def __init__(self, labels_NK: np.ndarray, config: TrainingConfig) -> None:
        violating_N = labels_NK.any(axis=1)
        self.positives = np.flatnonzero(violating_N)
        self.negatives = np.flatnonzero(~violating_N)
        self.hard = self.negatives
        self.config = config
        self.rng = np.random.default_rng(config.seed)

    def draw(self, groups: int, size: int) -> np.ndarray:
        """Indices (G, M)."""
        members_GM = self.rng.choice(self.negatives, (groups, size))
        swap_GM = self.rng.random((groups, size)) < self.config.hard_share
        members_GM[swap_GM] = self.rng.choice(self.hard, int(swap_GM.sum()))
        for group in np.flatnonzero(self.rng.random(groups) < self.config.positive_share):
            violating = 2 if size > 1 and self.rng.random() < 0.1 else 1
            slots = self.rng.choice(size, violating, replace=False)
            members_GM[group, slots] = self.rng.choice(self.positives, violating)
        return members_GM


class Trainer:
    """One net in training, and the running average of its weights, which is what is kept."""

    def __init__(self, net: GroupNet, examples: Examples, config: TrainingConfig) -> None:
        torch.manual_seed(config.seed)
        torch.set_num_threads(config.threads)
        self.net, self.examples, self.config = net, examples, config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sampler = GroupSampler(examples.labels_NK, config)
        self.labels_NK = torch.from_numpy(examples.labels_NK.astype(np.float32))
        self.shares = np.array(config.group_shares) / sum(config.group_shares)
        net.to(memory_format=torch.channels_last)
        net.train()
        for segment in config.frozen:
            for child in net.trunk.spec.segments[segment]:
                net.trunk.classifier.get_submodule(child).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(_parameter_groups(net, config.weight_decay), lr=config.learning_rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.15
        )
        self._average = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
        )

    @property
    def average(self) -> GroupNet:
        return cast(GroupNet, self._average.module)

    def step(self) -> float:
        """One optimiser step at a group size drawn for it; the loss."""
        size = int(self.sampler.rng.choice(self.net.group_sizes[: len(self.shares)], p=self.shares))
        members_GM = self.sampler.draw(max(1, self.config.images_per_step // size), size)
        pixels = torch.from_numpy(self.examples.pixels_NSS3[members_GM.reshape(-1)])
        images_NCHW = augment(normalise(pixels), self.generator)
        present_N = torch.ones(len(images_NCHW), dtype=torch.bool)
        target_GK = self.labels_NK[torch.from_numpy(members_GM)].amax(dim=1)
        loss = functional.binary_cross_entropy_with_logits(self.net(images_NCHW, present_N, size), target_GK)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self._average.update_parameters(self.net)
        return loss.item()

    def find_hard_negatives(self, pool: int = 8000) -> None:
        """From now on the sampler's hard negatives are those that the average net scores highest."""
        candidates = self.sampler.rng.permutation(self.sampler.negatives)[:pool]
        self.sampler.hard = hardest_negatives(self.average, self.examples, candidates)
        self.net.train()


def train(
    net: GroupNet,
    examples: Examples,
    config: TrainingConfig,
    *,
    on_progress: Callable[[int, float, float], None] = lambda step, loss, rate: None,
    on_checkpoint: Callable[[int, GroupNet], None] = lambda step, net: None,
    checkpoint_every: int = 500,
) -> GroupNet:
    """Trains in place and returns the averaged net. Raises ValueError when the loss is not finite.

    ``on_progress`` gets the step, the running loss and the steps a second.
    """
    trainer = Trainer(net, examples, config)
    running, began = 0.0, time.perf_counter()
    for step in range(config.steps):
        if config.hard_share and step and step % max(1, config.steps // 5) == 0:
            trainer.find_hard_negatives()
        loss = trainer.step()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}: lower the learning rate of {config.learning_rate}")
        running += 0.02 * (loss - running) if step else loss
        if step % 50 == 49:
            on_progress(step + 1, running, (step + 1) / (time.perf_counter() - began))
        if step % checkpoint_every == checkpoint_every - 1:
            on_checkpoint(step + 1, trainer.average)
    return trainer.average.eval()


def _parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices and kernels only."""
    decayed = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def hardest_negatives(net: GroupNet, examples: Examples, negatives: np.ndarray, share: float = 0.1) -> np.ndarray:
    """The ``share`` of the negatives with the highest individual scores."""
    scores = score_groups(net, examples.pixels_NSS3, negatives[:, None]).max(axis=1)
    return negatives[np.argsort(scores)[-max(1, round(share * len(negatives))) :]]


@torch.inference_mode()
def score_groups(net: GroupNet, pixels_NSS3: np.ndarray, members_GM: np.ndarray, batch: int = 256) -> np.ndarray:
    """Scores (G, K) after the sigmoid, of groups given as indices."""
    net.eval()
    size = members_GM.shape[1]
    return np.concatenate(list(_score_batches(net, pixels_NSS3, members_GM, max(1, batch // size))))


def _score_batches(net: GroupNet, pixels: np.ndarray, members_GM: np.ndarray, groups: int) -> Iterator[np.ndarray]:
    for start in range(0, len(members_GM), groups):
        chunk_GM = members_GM[start : start + groups]
        images = normalise(torch.from_numpy(pixels[chunk_GM.reshape(-1)]))
        present = torch.ones(len(images), dtype=torch.bool)
        yield torch.sigmoid(net(images, present, chunk_GM.shape[1])).float().numpy()


def host_positives(
    labels_N: np.ndarray, size: int, redraws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of ``size`` around every positive, ``redraws`` times with other negatives, and as many without.

    Returns members (G, M) whose first is the positive, and members (G, M) of negatives only.
    """
    positives, negatives = np.flatnonzero(labels_N), np.flatnonzero(~labels_N)
    hosted = rng.choice(negatives, (len(positives) * redraws, size))
    hosted[:, 0] = np.tile(positives, redraws)
    without = rng.permutation(negatives)[: len(negatives) // size * size].reshape(-1, size)
    return hosted, without
