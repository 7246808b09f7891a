"""One forward with gradients: some rows of a minibatch become their part of the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.algorithms import Algorithm
from lightning_grpo.masking import masked_sum, reduce_loss, reduction_count
from lightning_grpo.nonfinite import row_is_finite
from lightning_grpo.policy import Policy
from lightning_grpo.scoring import microbatch
from lightning_grpo.types import Minibatch, Rollout


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
    policy: Policy,
    algorithm: Algorithm,
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
        policy: with gradients.
        algorithm: the loss of each token.
        minibatch: B rows.
        rows: indices of b of them; none makes a forward that counts nothing, because other
            ranks may wait in it.
        beta: weight of the KL to the reference.
        temperature: the sampling temperature.
        max_completion_tokens: longest completion, for the constant normaliser.

    Returns:
        Loss, metrics and rows.
    """
    part = microbatch(minibatch.rollout, rows)
    output = policy(
        part.prompt_ids,
        part.prompt_mask,
        part.completion_ids,
        part.completion_mask,
        temperature=temperature,
        with_entropy=True,
    )
    mask = part.action_mask if len(rows) else torch.zeros_like(part.action_mask)
    part = part.replace(action_mask=mask)
    loss = algorithm.loss(output.logprobs, part, beta=beta)
    loss_sum = reduce_loss(loss.per_token, mask, algorithm.reduction, denominator=1.0)
    num_tokens = mask.sum()
    # Only before the first step on a rollout do both see the same weights.
    num_comparable = num_tokens if minibatch.index == 0 else torch.zeros_like(num_tokens)
    mismatch = (output.logprobs.detach() - part.sampler_logprobs).abs()
    metrics = loss.metrics | {
        "policy/loss": (
            loss_sum,
            reduction_count(mask, algorithm.reduction, max_completion_tokens),
        ),
        "policy/entropy": (masked_sum(output.entropy, mask), num_tokens),
        "policy/sampler_mismatch": (masked_sum(mismatch, mask), num_comparable),
    }
    is_finite = row_is_finite(output.logprobs, loss.per_token, mask)
    return MicrobatchLoss(loss_sum, metrics, part, is_finite)
