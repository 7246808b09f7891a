"""The critic's loss, per token and unreduced, and how much of the returns it explains."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grpo.masking import check_mask, masked_sum
from lightning_grpo.types import LossOutput, SumOverRanks

# Returns whose spread is below this part of their size are equal up to rounding.
EQUAL_RELATIVE_SPREAD = 1e-6


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
) -> LossOutput:
    """Squared error of the critic at each token, which holds it near where the rollout found it.

    v' = old + clip(v - old, -clip, clip)
    loss = max((v - R)^2, (v' - R)^2) / 2

    The gradient to values is v - R, and 0 where the second term is the larger: where the value has
    already moved by more than `clip` towards the return.

    Source: the PPO (arXiv:1707.06347) code of OpenAI baselines, ppo2; the text has no clip.

    Args:
        values: (B, C) value of the state before each token, by the critic in training, reward
            units, float32 or float64.
        old_values: (B, C) the same by the critic at the time of the rollout; a constant.
        returns: (B, C) what the values are to predict, reward units; a constant.
        mask: (B, C) bool, True where a token counts.
        clip: how far a value may move from the old one, reward units, > 0; None for no bound,
            old_values are then not read.

    Returns:
        The loss of each token, 0 under the mask, and per-token metrics over the masked-in tokens:
        value/loss, and value/clip_frac, the share at which the clipped term is the larger.

    Raises:
        ValueError: shapes that differ, values in half precision, or a clip that is not positive.
    """
    check_mask(mask, values=values, old_values=old_values, returns=returns)
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"values is {values.dtype}; squared errors need float32")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; it must be positive, or None to switch it off")
    # Before the squares: a mask applied after them leaves 0 * inf = NaN in the gradient.
    values = torch.where(mask, values, 0.0)
    targets = torch.where(mask, returns.detach(), 0.0)
    error = (values - targets).square()
    is_clipped = torch.zeros_like(mask)
    if clip is not None:
        old = torch.where(mask, old_values.detach(), 0.0)
        clipped_error = (old + (values - old).clamp(-clip, clip) - targets).square()
        is_clipped = ((values - old).abs() > clip) & (clipped_error > error)
        error = torch.where(is_clipped, clipped_error, error)
    per_token = error / 2
    count = mask.sum().to(per_token.dtype)
    metrics = {
        "value/loss": (per_token.detach().sum(), count),
        "value/clip_frac": (is_clipped.sum().to(per_token.dtype), count),
    }
    return LossOutput(per_token=per_token, metrics=metrics)


@torch.no_grad()
def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, *, sum_over_ranks: SumOverRanks
) -> float:
    """Share of the variance of the returns that the values account for.

    explained = 1 - Var(R - V) / Var(R)

    over the masked-in tokens of all ranks. 1 is a perfect critic up to a constant, 0 one that is no
    better than a constant, and below 0 one that is worse.

    Source: own, the usual definition. Departs: 0 where the returns do not vary (by more than a
    millionth of their size, which is rounding), and without tokens: there is nothing to explain.

    Args:
        values: (B, C) predictions, reward units.
        returns: (B, C) what they predict, reward units.
        mask: (B, C) bool, True where a token counts.
        sum_over_ranks: adds a tensor over the ranks. Called twice on every rank.

    Returns:
        At most 1, the same on every rank.

    Raises:
        ValueError: shapes that differ, or a mask that is not bool.
    """
    check_mask(mask, values=values, returns=returns)
    target = torch.where(mask, returns, 0.0).to(torch.float64)
    residual = target - torch.where(mask, values, 0.0).to(torch.float64)
    count = mask.sum().to(torch.float64)
    # Two passes, as in whitening: the spread may be small around a large mean.
    sums = torch.stack([count, target.sum(), residual.sum(), target.square().sum()])
    num_tokens, target_sum, residual_sum, size = sum_over_ranks(sums)
    num_tokens = num_tokens.clamp(min=1)
    target_squares = masked_sum((target - target_sum / num_tokens).square(), mask)
    residual_squares = masked_sum((residual - residual_sum / num_tokens).square(), mask)
    target_spread, residual_spread = sum_over_ranks(
        torch.stack([target_squares, residual_squares])
    ).tolist()
    if target_spread <= EQUAL_RELATIVE_SPREAD**2 * float(size):
        return 0.0
    return float(1 - residual_spread / target_spread)
