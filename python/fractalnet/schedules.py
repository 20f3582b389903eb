"""The learning rate over a training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from .config import Schedule


def halvings(epoch: int, epochs: int) -> int:
    """How often the remaining epochs have halved when `epoch` (from 0) begins: the largest k with 2^k * left <= epochs.

    Source: Larsson et al. 2016 (arXiv:1605.07648), section 4: the rate drops by 10 whenever they do.
    Example:
        >>> [halvings(epoch, 400) for epoch in (0, 199, 200, 300, 350, 399)]
        [0, 0, 1, 2, 3, 8]
    """
    return (epochs // (epochs - epoch)).bit_length() - 1


def factor(schedule: Schedule, progress: float, epochs: int) -> float:
    """What the optimizer's learning rate is multiplied by.

    Args:
        progress: epochs that are done, fractions included; from 0 to epochs.
    """
    rise = min(1.0, progress / schedule.warmup) if schedule.warmup else 1.0
    if schedule.kind == "halving":
        return rise * schedule.factor ** halvings(min(int(progress), epochs - 1), epochs)
    if schedule.kind == "milestones":
        return rise * schedule.factor ** sum(progress >= milestone for milestone in schedule.milestones)
    if schedule.kind == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * min(progress / epochs, 1.0)))
    return rise


def scheduler(optimizer: Optimizer, schedule: Schedule, epochs: int, steps: int) -> LambdaLR:
    """A scheduler that is stepped after every step of the optimizer, of which an epoch has `steps`."""
    return LambdaLR(optimizer, lambda step: factor(schedule, step / steps, epochs))
