"""The device behind ``num_gpus``: CUDA, unless DORFMAN_DEVICE says otherwise. Knows nothing of Ray."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

from pipeline.errors import RunError, UsageError

if TYPE_CHECKING:
    import torch

VARIABLE = "DORFMAN_DEVICE"


def accelerator() -> str:
    """The kind of device that a pool with GPUs computes on: ``cpu`` rehearses a plan on machines without any.

    Read where a job is driven, and its actors are told: the nodes of a cluster have other environments.
    Raises UsageError.
    """
    import torch  # noqa: PLC0415  the driver of a plan without GPUs needs none

    kind = os.environ.get(VARIABLE) or "cuda"
    try:
        known = torch.device(kind).type == kind
    except RuntimeError:
        known = False
    if not known:
        raise UsageError(
            f"{VARIABLE} is {kind!r}, but it names a kind of device that torch knows: cuda (also for AMD), xpu, mps, "
            "or cpu to rehearse a plan without GPUs; which one of several an actor uses is Ray's to say"
        )
    return kind


def open_device(kind: str, what: str) -> torch.device:
    """Raises RunError when ``what`` was given a device that torch cannot use here, as by a driver that is missing."""
    import torch  # noqa: PLC0415

    device = torch.device(kind)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise RunError(
            f"{what} asks for GPUs, but torch finds no {kind} device on {platform.node()} "
            f"({str(error).splitlines()[0]}); mend the driver there, set num_gpus: 0, or name another kind of device "
            f"in {VARIABLE}"
        ) from error
    return device
