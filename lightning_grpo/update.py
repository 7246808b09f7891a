"""One forward with gradients: some rows of a minibatch become their part of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.algorithms import PPO, Algorithm
from lightning_grpo.critic import Critic
from lightning_grpo.forward import Forward, forward_rows, microbatch
from lightning_grpo.masking import masked_sum, reduce_loss, reduction_count
from lightning_grpo.nonfinite import row_is_finite
from lightning_grpo.policy import Policy
from lightning_grpo.stages import Stage, moves_policy, value_gradient_reaches_policy
from lightning_grpo.types import LossOutput, Minibatch, Rollout


@dataclass(frozen=True)
class Learners:
    """What learns now, and from which loss."""

    policy: Policy
    algorithm: Algorithm
    """Whose loss moves the policy, and whose reduction holds for the critic too."""
    critic: Critic | None
    ppo: PPO
    """Whose loss moves the critic."""
    stage: Stage


class MicrobatchLoss(NamedTuple):
    """What the forward of one micro-batch gave."""

    loss_sum: Tensor
    """0-d sum over its tokens; divide it by the minibatch's denominator."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count)."""
    rows: Rollout
    """The rows that were forwarded."""
    is_finite: Tensor
    """(b,) bool per row."""


def microbatch_loss(
    learners: Learners,
    minibatch: Minibatch,
    rows: Tensor,
    *,
    beta: float,
    temperature: float,
    max_completion_tokens: int,
) -> MicrobatchLoss:
    """Forward some rows and sum their losses.

    The sums of all micro-batches of all ranks, divided by the minibatch's denominator, are the
    loss of the optimizer step, however its rows were cut.

    Args:
        learners: policy and critic.
        minibatch: B rows.
        rows: indices of b of them; none makes a forward that counts nothing, because other
            ranks may wait in it.
        beta: weight of the KL to the reference in the loss.
        temperature: the sampling temperature.
        max_completion_tokens: longest completion, for the constant normaliser.

    Returns:
        Loss, metrics and rows.
    """
    algorithm, stage = learners.algorithm, learners.stage
    part = microbatch(minibatch.rollout, rows)
    forward = forward_rows(
        learners.policy,
        learners.critic,
        part,
        temperature=temperature,
        entropy="gradient" if algorithm.entropy_coef else "detached",
        with_logprobs=moves_policy(stage),
        detach_hidden=not value_gradient_reaches_policy(stage),
    )
    if not len(rows):
        part = part.replace(action_mask=torch.zeros_like(part.action_mask))
    mask = part.action_mask
    per_token = torch.zeros_like(mask, dtype=torch.float32)
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    if forward.output is not None:
        policy_loss = policy_part(algorithm, forward, part, minibatch.index == 0, beta=beta)
        loss_sum = reduce_loss(policy_loss.per_token, mask, algorithm.reduction, denominator=1.0)
        count = reduction_count(mask, algorithm.reduction, max_completion_tokens)
        metrics |= policy_loss.metrics | {"policy/loss": (loss_sum, count)}
        per_token = policy_loss.per_token
    if forward.values is not None:
        value_loss = learners.ppo.value_loss(forward.values[:, :-1], part)
        metrics |= value_loss.metrics
        per_token = per_token + learners.ppo.value_coef * value_loss.per_token
    loss_sum = reduce_loss(per_token, mask, algorithm.reduction, denominator=1.0)
    is_finite = row_is_finite(per_token, mask)
    if forward.output is not None:
        is_finite &= row_is_finite(forward.output.logprobs.detach(), mask)
    return MicrobatchLoss(loss_sum, metrics, part, is_finite)


def policy_part(
    algorithm: Algorithm, forward: Forward, rows: Rollout, is_first: bool, *, beta: float
) -> LossOutput:
    """The loss of the policy and what is measured of it.

    Args:
        algorithm: whose loss.
        forward: with the policy's output.
        rows: what was forwarded.
        is_first: whether this is the first minibatch of a rollout, before any step on it.
        beta: weight of the KL to the reference in the loss.

    Returns:
        Token losses (B, C) and metrics.
    """
    output = forward.output
    assert output is not None
    mask = rows.action_mask
    loss = algorithm.loss(output.logprobs, rows, beta=beta, entropy=output.entropy)
    num_tokens = mask.sum()
    # Only before the first step on a rollout do both see the same weights.
    num_comparable = num_tokens if is_first else torch.zeros_like(num_tokens)
    mismatch = (output.logprobs.detach() - rows.sampler_logprobs).abs()
    measured = {
        "policy/entropy": (masked_sum(output.entropy.detach(), mask), num_tokens),
        "policy/sampler_mismatch": (masked_sum(mismatch, mask), num_comparable),
    }
    return LossOutput(loss.per_token, loss.metrics | measured)
