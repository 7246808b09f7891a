"""The default optimizer, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

LRSchedule = Literal["constant", "linear", "cosine"]


def adamw(params: Any) -> Optimizer:
    """AdamW at a learning rate that suits the fine-tuning of a pretrained model."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


def make_lr_scheduler(
    optimizer: Optimizer, name: LRSchedule, *, num_warmup_steps: int, num_steps: float
) -> LRScheduler:
    """Make the schedule of transformers by that name, stepped with every optimizer step.

    Args:
        optimizer: whose learning rates are scaled.
        name: constant, or falling to 0 as a line or a half cosine, after the warm-up.
        num_warmup_steps: optimizer steps over which the rate rises from 0.
        num_steps: optimizer steps of the run; infinite when it has no end.

    Returns:
        The schedule.

    Raises:
        ValueError: the schedule needs an end and the run has none.
    """
    schedule: LRScheduler
    if name == "constant":
        schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps)
        return schedule
    if math.isinf(num_steps):
        raise ValueError(
            f"model.lr_schedule {name!r} ends with the run, but the run has no end: set "
            "trainer.max_steps or trainer.max_epochs"
        )
    schedule = get_scheduler(name, optimizer, num_warmup_steps, int(num_steps))
    return schedule
