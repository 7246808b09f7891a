"""The default optimizer, the course of the learning rate, and the clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

LRSchedule = Literal["constant", "linear", "cosine"]


def adamw(params: Any) -> Optimizer:
    """AdamW at a learning rate that suits the fine-tuning of a pretrained model."""
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


def make_optimizer(
    make: Callable[[Any], Optimizer],
    policy: Sequence[Tensor],
    critic: Sequence[Tensor],
    *,
    critic_lr: float | None,
) -> Optimizer:
    """Make an optimizer with two groups, of which that of the critic may be empty for now.

    Args:
        make: from groups of parameters.
        policy: parameters.
        critic: parameters; may be empty.
        critic_lr: learning rate of the critic; None for that of the optimizer.

    Returns:
        The optimizer.

    Raises:
        ValueError: it did not keep the two groups.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(policy), "name": "policy"},
        {"params": list(critic), "name": "critic"},
    ]
    if critic_lr is not None:
        groups[1]["lr"] = critic_lr
    optimizer = make(groups)
    names = [group.get("name") for group in optimizer.param_groups]
    if names != ["policy", "critic"]:
        raise ValueError(
            f"model.optimizer made the parameter groups {names} of policy and critic: keep the "
            "two that it is given"
        )
    return optimizer


def make_lr_scheduler(
    optimizer: Optimizer, name: LRSchedule, *, num_warmup_steps: int, num_steps: float
) -> LRScheduler:
    """Make the schedule of transformers by that name, stepped with every step of the policy.

    It is the policy's: the learning rate of the critic stays as it is.

    Args:
        optimizer: with the groups policy and critic.
        name: constant, or falling to 0 as a line or a half cosine, after the warm-up.
        num_warmup_steps: optimizer steps over which the rate rises from 0.
        num_steps: steps of the policy in the run; infinite when it has no end.

    Returns:
        The schedule.

    Raises:
        ValueError: the schedule needs an end and the run has none.
    """
    schedule: LRScheduler
    if name == "constant":
        schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps)
        return _only_for_policy(schedule)
    if math.isinf(num_steps):
        raise ValueError(
            f"model.lr_schedule {name!r} ends with the run, but the run has no end: set "
            "trainer.max_steps or trainer.max_epochs"
        )
    schedule = get_scheduler(name, optimizer, num_warmup_steps, int(num_steps))
    return _only_for_policy(schedule)


def _only_for_policy(schedule: LRScheduler) -> LRScheduler:
    assert isinstance(schedule, LambdaLR)
    critic = schedule.optimizer.param_groups[1]
    schedule.lr_lambdas[1] = _always_one
    critic["lr"] = critic["initial_lr"]
    return schedule


def _always_one(step: int) -> float:
    return 1.0


def clip_gradients(
    optimizer: Optimizer,
    *,
    policy_clip: float | None,
    is_clipped_by_value: bool,
    critic_max_norm: float | None,
) -> None:
    """Clip the gradients of policy and critic, each by itself.

    Args:
        optimizer: with the groups policy and critic.
        policy_clip: norm, or value, that the policy's gradient is clipped to; None or 0 for no
            clipping.
        is_clipped_by_value: clip each element of the policy's gradient, not its norm.
        critic_max_norm: norm that the critic's gradient is clipped to; None for no clipping.
    """
    policy, critic = (group["params"] for group in optimizer.param_groups)
    if policy_clip and is_clipped_by_value:
        clip_grad_value_(policy, policy_clip)
    elif policy_clip:
        clip_grad_norm_(policy, policy_clip)
    if critic_max_norm is not None and critic:
        clip_grad_norm_(critic, critic_max_norm)


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """Norm of the gradients of some parameters over all ranks; 0 when there are none.

    Args:
        parameters: sharded or not; every rank has to call it.

    Returns:
        The norm.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
