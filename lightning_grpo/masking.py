"""Masks, positions, and sums over masked-in tokens, up to the reduction of a loss.

A mask is True where a value counts. What lies under a mask (False) may be NaN, inf or anything
else: it is replaced by zero before any arithmetic that could spread it, so it reaches neither a
value nor a gradient.

The reduction of a loss is split in three, so that it can be spread over micro-batches, accumulation
and ranks:

    loss = sum_ij weights[i,j] * per_token[i,j] / denominator,    denominator = sum of counts

where the sum and the count both run over the whole optimizer step. Weights depend on a row alone
and counts add up, so no way of cutting the step into pieces changes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["completion", "token", "constant"]


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse a mask that is not bool, or tensors of another shape than the mask.

    Args:
        mask: True where a value counts.
        **tensors: what the mask is for, by the name to use in the error.

    Raises:
        ValueError: a mask of another dtype than bool, or a tensor of another shape.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}; pass a bool tensor, True where a value counts")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and the mask {tuple(mask.shape)}; "
                "pass one value per position of the mask"
            )


def eos_mask(completion_ids: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Mark the tokens of each completion up to and including its first end-of-sequence token.

    mask[i,t] = no EOS at any position before t

    The EOS itself counts: ending is a choice of the policy. Decided by position, never by comparing
    with the pad id, which is often the EOS id. A row without EOS counts to its end.

    Source: own.

    Args:
        completion_ids: (B, C) sampled token ids, right-padded.
        eos_token_ids: every id that ends a completion; may be empty.

    Returns:
        (B, C) bool.

    Raises:
        ValueError: ids that are not (B, C).
    """
    if completion_ids.ndim != 2:
        raise ValueError(f"completion_ids has shape {tuple(completion_ids.shape)}; pass (B, C)")
    stops = torch.tensor(
        list(eos_token_ids), dtype=completion_ids.dtype, device=completion_ids.device
    )
    is_eos = torch.isin(completion_ids, stops).long()
    return (is_eos.cumsum(dim=1) - is_eos) == 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of each token in its sequence, counted from the first real token.

    position[i,t] = max(0, sum_{s<=t} attention_mask[i,s] - 1)

    Source: own. Needed on every forward of a left-padded batch: without it, models with learned
    positions (GPT-2) are wrong by more than one nat.

    Args:
        attention_mask: (B, T) bool or 0/1, true for real tokens, padded on either side.

    Returns:
        (B, T) int64; 0 on left padding.

    Raises:
        ValueError: a mask that is not (B, T).
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; pass (B, T)")
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the values under a True mask.

    Source: own. The gradient at masked-out positions is exactly 0; it is the caller's part to mask
    again before a function whose own derivative is not finite there (exp, log).

    Args:
        x: values, any shape.
        mask: bool, the shape of `x`.
        dim: dimension to sum over; all of them when None.

    Returns:
        The sum, 0 where the mask is empty.

    Raises:
        ValueError: a mask that is not bool or has another shape.
    """
    check_mask(mask, x=x)
    kept = torch.where(mask, x, 0.0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values under a True mask.

    mean = sum_i mask_i * x_i / max(1, sum_i mask_i)

    Source: own.

    Args:
        x: values, any shape.
        mask: bool, the shape of `x`.
        dim: dimension to average over; all of them when None.

    Returns:
        The mean, 0 where the mask is empty.

    Raises:
        ValueError: a mask that is not bool or has another shape.
    """
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def reduction_weights(
    mask: Tensor, reduction: Reduction, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weight of each token in the summed loss.

    weights[i,t] = 1 / |o_i|    completion: the mean over the tokens of a completion
    weights[i,t] = 1            token and constant: every token weighs the same

    Source: completion: DeepSeekMath (arXiv:2402.03300) eq. 3; token: DAPO (arXiv:2503.14476)
    sec. 3.3; constant: Dr. GRPO (arXiv:2503.20783).

    Args:
        mask: (B, C) bool, True for the tokens of the loss.
        reduction: how tokens are averaged.
        dtype: floating type of the weights; that of the loss keeps the product in it.

    Returns:
        (B, C) weights, 0 under the mask.

    Raises:
        ValueError: a mask that is not bool, or an unknown reduction.
    """
    check_mask(mask)
    _check_reduction(reduction)
    ones = mask.to(dtype)
    if reduction != "completion":
        return ones
    return ones / ones.sum(dim=1, keepdim=True).clamp(min=1)


def reduction_count(mask: Tensor, reduction: Reduction, max_completion_tokens: int) -> Tensor:
    """What these rows add to the denominator of the loss.

    count = number of rows with a token                                completion
    count = number of tokens                                           token
    count = number of rows with a token * max_completion_tokens        constant

    Rows without any token count nowhere, so that filtering a row is the same as never having
    sampled it. The sum of counts over micro-batches, accumulated minibatches and ranks is the
    denominator of `reduce_loss`.

    Source: as `reduction_weights`.

    Args:
        mask: (B, C) bool, True for the tokens of the loss.
        reduction: how tokens are averaged.
        max_completion_tokens: the token limit of a completion, >= 1; used by constant alone. A
            limit, not the longest completion of a batch, which would make the gradient depend on
            what else is in the batch.

    Returns:
        () float64.

    Raises:
        ValueError: a mask that is not bool, an unknown reduction, or a token limit below 1.
    """
    check_mask(mask)
    _check_reduction(reduction)
    if max_completion_tokens < 1:
        raise ValueError(f"max_completion_tokens is {max_completion_tokens}; it must be at least 1")
    if reduction == "token":
        return mask.sum().to(torch.float64)
    num_rows = mask.any(dim=1).sum().to(torch.float64)
    return num_rows * max_completion_tokens if reduction == "constant" else num_rows


def reduce_loss(
    per_token: Tensor, mask: Tensor, reduction: Reduction, *, denominator: float
) -> Tensor:
    """Share of these rows in the loss of the whole optimizer step.

    loss = sum_ij weights[i,j] * per_token[i,j] / denominator

    Source: as `reduction_weights`.

    Args:
        per_token: (B, C) loss of each token, unreduced.
        mask: (B, C) bool, True for the tokens of the loss.
        reduction: how tokens are averaged.
        denominator: sum of `reduction_count` over the whole optimizer step, all ranks included.
            0 only when the step has no token at all; the loss is then 0 and still has a graph, so
            that a collective backward runs on every rank.

    Returns:
        () loss in the dtype of `per_token`. Sums over micro-batches and ranks, never means, give
        the step's loss.

    Raises:
        ValueError: shapes that differ, an unknown reduction, a denominator that is negative or not
            finite, or a denominator of 0 although there are tokens.
    """
    check_mask(mask, per_token=per_token)
    if not (math.isfinite(denominator) and denominator >= 0):
        raise ValueError(f"the denominator is {denominator}; pass the sum of reduction_count")
    if denominator == 0:
        if bool(mask.any()):
            raise ValueError(
                "the denominator is 0 but the mask has tokens; sum reduction_count over all rows"
            )
        denominator = 1.0
    weights = reduction_weights(mask, reduction, dtype=per_token.dtype)
    return masked_sum(weights * per_token, mask) / denominator


def _check_reduction(reduction: str) -> None:
    if reduction not in ("completion", "token", "constant"):
        raise ValueError(f"unknown reduction {reduction!r}; choose completion, token or constant")
