"""Whitening over the tokens of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grpo.masking import check_mask, masked_sum
from lightning_grpo.types import SumOverRanks


@torch.no_grad()
def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    sum_over_ranks: SumOverRanks,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Scale the values under a True mask to variance 1, and shift their mean to 0.

    y = (x - mean) / (std + eps)                shift_mean
    y = (x - mean) / (std + eps) + mean         otherwise: the mean stays where it is

    mean and std are over the masked-in values of all ranks together.

    Source: the advantage normalisation of PPO (arXiv:1707.06347) implementations; shift_mean is
    that of Ziegler et al. (arXiv:1909.08593), whose code whitens rewards without a shift. Departs:
    sample variance (ddof 1); two passes, because mean of squares less square of mean loses all
    digits for small spreads around a large mean.

    Args:
        x: values, any shape; constants, no gradient flows back.
        mask: bool, the shape of `x`, True where a value counts.
        sum_over_ranks: adds a tensor over the ranks. Called twice on every rank, those without a
            value included.
        shift_mean: move the mean to 0.
        eps: added to the std, in units of `x`, > 0, so that no spread gives no NaN.

    Returns:
        The shape and dtype of `x`, computed in float64; 0 under the mask. A single value has no
        spread: it becomes 0, or stays what it is without shift_mean.

    Raises:
        ValueError: a mask that is not bool or has another shape, or an eps that is not positive.
    """
    check_mask(mask, x=x)
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive")
    wide = torch.where(mask, x, 0.0).to(torch.float64)
    count, total = sum_over_ranks(torch.stack([mask.sum().to(torch.float64), wide.sum()]))
    mean = total / count  # 0 / 0 when there is no value, all of it under the mask
    centered = wide - mean
    squares = sum_over_ranks(masked_sum(centered.square(), mask))
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    scaled = centered / (std + eps)
    whitened = scaled if shift_mean else scaled + mean
    return torch.where(mask, whitened, 0.0).to(x.dtype)
