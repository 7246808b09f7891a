"""The clipped policy loss, per token and unreduced, with the sums that make its metrics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_grpo.kl import kl_estimate
from lightning_grpo.masking import check_mask
from lightning_grpo.types import LossOutput


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossOutput:
    """Clipped surrogate loss of PPO and GRPO at each token.

    r = exp(logprobs - old_logprobs)
    loss = -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)
    loss = min(loss, -dual_clip * A)       where A < 0 and dual_clip is given

    The gradient to logprobs is -r * A where no bound binds, else 0; at r = 1 it is that of
    REINFORCE.

    Source: PPO (arXiv:1707.06347) eq. 7; separate bounds: DAPO (arXiv:2503.14476) sec. 3.1; dual
    clip: arXiv:1912.09729. Departs: written as a bound on log r, chosen by the sign of A (high for
    A > 0, low for A < 0). It is the same function, but exp never sees a ratio that the bound
    discards, whose overflow would make the gradient 0 * inf = NaN.

    Args:
        logprobs: (B, C) log-probs of the sampled tokens under the policy in training, nats, float32
            or float64.
        old_logprobs: (B, C) the same under the policy that acted, nats; a constant, no gradient
            flows here.
        advantages: (B, C) advantage of each token; a constant.
        mask: (B, C) bool, True where a token counts.
        clip_low: how far below 1 the ratio may go for A < 0, in [0, 1).
        clip_high: how far above 1 the ratio may go for A > 0, >= 0.
        dual_clip: ratio at which the loss of a token with A < 0 stops growing, > 1; None for no
            such bound.

    Returns:
        The loss of each token, 0 under the mask, and per-token metrics over the masked-in tokens:
        policy/clip_frac, the share at which min picks the clipped term (the dual clip is not
        counted), and policy/approx_kl, k3 of KL(old || new) in nats per token, from unclipped
        ratios.

    Raises:
        ValueError: shapes that differ, log-probs in half precision, or a bound out of its range.
    """
    check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _check_bounds(clip_low, clip_high, dual_clip)
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprobs is {logprobs.dtype}; ratios need float32, in which token_logprobs computes"
        )
    old_logprobs = old_logprobs.detach()
    # Before exp: a mask applied after it leaves 0 * inf = NaN in the gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(mask, advantages.detach(), 0.0)
    log_low, log_high = math.log1p(-clip_low), math.log1p(clip_high)
    log_dual = math.inf if dual_clip is None else math.log(dual_clip)

    bounded = torch.where(
        advantages < 0,
        log_ratio.clamp(min=log_low, max=log_dual),
        log_ratio.clamp(max=log_high),
    )
    per_token = -advantages * bounded.exp()

    with torch.no_grad():
        is_clipped = ((advantages > 0) & (log_ratio > log_high)) | (
            (advantages < 0) & (log_ratio < log_low)
        )
        approx_kl = kl_estimate(old_logprobs, logprobs, mask, "k3")
        count = mask.sum().to(per_token.dtype)
        metrics = {
            "policy/clip_frac": (is_clipped.sum().to(per_token.dtype), count),
            "policy/approx_kl": (approx_kl.sum(), count),
        }
    return LossOutput(per_token=per_token, metrics=metrics)


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low is {clip_low}; it must be in [0, 1)")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}; it must be at least 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1, or None to switch it off")
