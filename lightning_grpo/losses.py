"""Policy losses, per token and unreduced, with the sums that make their metrics.

They differ in what they bound. `clipped_policy_loss` (PPO, GRPO) bounds the ratio of each token,
`sequence_clipped_policy_loss` (GSPO) that of the whole completion, and `cispo_policy_loss` bounds
the weight of a token's gradient, so that no token is left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_grpo.kl import kl_estimate
from lightning_grpo.masking import check_mask, masked_mean
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
    _check_bounds(clip_low, clip_high, dual_clip)
    log_ratio, advantages = _masked_inputs(logprobs, old_logprobs, advantages, mask)
    per_token, is_clipped = _surrogate(log_ratio, advantages, clip_low, clip_high, dual_clip)
    return LossOutput(per_token, _metrics(logprobs, old_logprobs, mask, is_clipped))


def sequence_clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> LossOutput:
    """Clipped surrogate loss of GSPO, with one ratio for all tokens of a completion.

    s = exp(mean_t(logprobs - old_logprobs))
    loss[t] = -min(s * A[t], clip(s, 1 - clip_low, 1 + clip_high) * A[t])

    For the reduction `completion` alone: the mean over the tokens of a completion is then the
    paper's loss of the completion, and the gradient to the log-prob of each token is
    -s * A[t] / |y| where no bound binds, else 0. A sum over tokens would count s once per token.

    Source: GSPO (arXiv:2507.18071) eqs. 5 and 7, with the gradients of GSPO-token, eqs. 13 and 14:
    the same where all tokens of a completion have one advantage.

    Args:
        logprobs: (B, C) log-probs of the sampled tokens under the policy in training, nats, float32
            or float64.
        old_logprobs: (B, C) the same under the policy that acted, nats; a constant.
        advantages: (B, C) advantage of each token; a constant.
        mask: (B, C) bool, True where a token counts.
        clip_low: how far below 1 the ratio may go for A < 0, in [0, 1). A ratio per completion
            moves far less than one per token.
        clip_high: how far above 1 the ratio may go for A > 0, >= 0.

    Returns:
        The loss of each token, 0 under the mask, and per-token metrics over the masked-in tokens:
        policy/clip_frac, the share in completions whose clip binds, and policy/approx_kl, k3 of
        KL(old || new) in nats per token, from the ratios of tokens.

    Raises:
        ValueError: shapes that differ, log-probs in half precision, or a bound out of its range.
    """
    _check_bounds(clip_low, clip_high, None)
    log_ratio, advantages = _masked_inputs(logprobs, old_logprobs, advantages, mask)
    mean = masked_mean(log_ratio.detach(), mask, dim=1).unsqueeze(1)
    # In value the mean of the completion, in gradient the log-prob of each token. Under the mask
    # the advantage is 0.
    sequence = mean + (log_ratio - log_ratio.detach())
    per_token, is_clipped = _surrogate(sequence, advantages, clip_low, clip_high, None)
    return LossOutput(per_token, _metrics(logprobs, old_logprobs, mask, is_clipped))


def cispo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_high: float = 4.0,
) -> LossOutput:
    """REINFORCE with a bounded importance weight at each token, which no token drops out of.

    w = min(exp(logprobs - old_logprobs), 1 + clip_high)            a constant
    loss = -w * A * logprobs

    The gradient to logprobs is -w * A everywhere.

    Source: CISPO, MiniMax-M1 (arXiv:2506.13585) eqs. 4 and 5, with the upper bound alone, as run
    there. A bound of 4 to 8 is that of ScaleRL (arXiv:2510.13786).

    Args:
        logprobs: (B, C) log-probs of the sampled tokens under the policy in training, nats, float32
            or float64.
        old_logprobs: (B, C) the same under the policy that acted, nats; a constant.
        advantages: (B, C) advantage of each token; a constant.
        mask: (B, C) bool, True where a token counts.
        clip_high: how far above 1 the weight may go, >= 0.

    Returns:
        The loss of each token, 0 under the mask, and per-token metrics over the masked-in tokens:
        policy/clip_frac, the share whose weight is bounded, and policy/approx_kl, k3 of
        KL(old || new) in nats per token, from unbounded ratios.

    Raises:
        ValueError: shapes that differ, log-probs in half precision, or a bound out of its range.
    """
    _check_bounds(0.0, clip_high, None)
    log_ratio, advantages = _masked_inputs(logprobs, old_logprobs, advantages, mask)
    log_bound = math.log1p(clip_high)
    # The bound goes before exp, which could overflow.
    weight = log_ratio.detach().clamp(max=log_bound).exp()
    per_token = -weight * advantages * torch.where(mask, logprobs, 0.0)
    is_clipped = log_ratio > log_bound
    return LossOutput(per_token, _metrics(logprobs, old_logprobs, mask, is_clipped))


def _masked_inputs(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-ratio and advantages of each token, 0 under the mask; the latter without a gradient."""
    check_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"logprobs is {logprobs.dtype}; ratios need float32, in which token_logprobs computes"
        )
    # Before exp: a mask applied after it leaves 0 * inf = NaN in the gradient.
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    return log_ratio, torch.where(mask, advantages.detach(), 0.0)


def _surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """The clipped loss of each token, and whether min picks its clipped term."""
    log_low, log_high = math.log1p(-clip_low), math.log1p(clip_high)
    log_dual = math.inf if dual_clip is None else math.log(dual_clip)
    bounded = torch.where(
        advantages < 0,
        log_ratio.clamp(min=log_low, max=log_dual),
        log_ratio.clamp(max=log_high),
    )
    is_clipped = ((advantages > 0) & (log_ratio > log_high)) | (
        (advantages < 0) & (log_ratio < log_low)
    )
    return -advantages * bounded.exp(), is_clipped


@torch.no_grad()
def _metrics(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, is_clipped: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over the masked-in tokens, and their number."""
    approx_kl = kl_estimate(old_logprobs, logprobs, mask, "k3")
    count = mask.sum().to(logprobs.dtype)
    return {
        "policy/clip_frac": (is_clipped.sum().to(logprobs.dtype), count),
        "policy/approx_kl": (approx_kl.sum(), count),
    }


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low is {clip_low}; it must be in [0, 1)")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}; it must be at least 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1, or None to switch it off")
