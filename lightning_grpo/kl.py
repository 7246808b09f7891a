"""KL estimators per token, and the controller that adapts the weight of the KL.

Each estimator is a number per token whose mean over samples estimates a KL; what its *gradient*
estimates is another matter, and the reason for having several. See `kl_estimate`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_grpo.masking import check_mask

KLKind = Literal["k1", "k2", "k3", "reverse"]


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor, kind: KLKind) -> Tensor:
    """Estimate KL(p || q) at each token, for tokens drawn from p.

    d = log q - log p
    k1 = -d                     unbiased, high variance, can be negative
    k2 = d^2 / 2                biased, low variance
    k3 = exp(d) - 1 - d         unbiased, low variance, never negative
    reverse = k3 in value, k2 in gradient

    What minimising the mean over samples from p does, the gradient taken through log p:

    k1         nothing: its expected gradient is zero. It is meant for rewards, detached.
    k2         descends KL(p || q), the reverse KL, which a penalty is meant to be.
    k3         descends KL(q || p), the forward KL; the term of the GRPO paper.
    reverse    descends KL(p || q), and reads as the unbiased k3.

    This is per token, given the tokens before it, and while the tokens come from p itself: no
    estimator inside a loss sees that a token changes the contexts of later tokens (only k1 in the
    reward does), and inner epochs move p away from the policy that sampled.

    Source: J. Schulman, Approximating KL Divergence (2020); k3 in a loss: DeepSeekMath
    (arXiv:2402.03300) eq. 4; gradients: arXiv:2506.09477, arXiv:2512.21852. Departs: nothing is
    clamped.

    Args:
        logprobs: (B, C) log p of the tokens, nats; the policy for the KL to the reference.
        other_logprobs: (B, C) log q of the same tokens, nats.
        mask: (B, C) bool, True where a token counts.
        kind: the estimator.

    Returns:
        (B, C) nats; exactly 0, with zero gradient, under the mask.

    Raises:
        ValueError: shapes that differ, a mask that is not bool, or an unknown kind.
    """
    check_mask(mask, logprobs=logprobs, other_logprobs=other_logprobs)
    # Before exp: a mask applied after it leaves 0 * inf = NaN in the gradient.
    d = torch.where(mask, other_logprobs - logprobs, 0.0)
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(d) - d
    if kind == "reverse":
        k2 = d.square() / 2
        return (torch.expm1(d) - d).detach() + (k2 - k2.detach())
    raise ValueError(f"unknown KL kind {kind!r}; choose k1, k2, k3 or reverse")


def adaptive_beta(
    beta: float,
    kl_nats_per_completion: float,
    *,
    target_nats_per_completion: float,
    horizon_completions: float,
    num_completions: int,
) -> float:
    """Move the weight of the KL towards the value that holds the KL at a target.

    error = clip(KL / target - 1, -0.2, 0.2)
    beta' = beta * (1 + error * min(1, num_completions / horizon))

    Source: Ziegler et al. (arXiv:1909.08593) sec. 2.2. Departs: a KL that is not finite leaves beta
    alone, and a batch larger than the horizon counts as one horizon, so that beta cannot turn
    negative.

    Args:
        beta: present weight, >= 0.
        kl_nats_per_completion: KL summed over the tokens of a completion, mean over the completions
            of all ranks. A mean per token is smaller by the length, and would never reach a target
            meant for this.
        target_nats_per_completion: KL to hold, in the same unit, > 0.
        horizon_completions: completions over which a constant error of 20 % changes beta by about
            20 %, > 0.
        num_completions: completions that the KL was measured on, over all ranks.

    Returns:
        The new weight.

    Raises:
        ValueError: a target or a horizon that is not positive.
    """
    if not target_nats_per_completion > 0:
        raise ValueError(
            f"target_nats_per_completion is {target_nats_per_completion}; it must be positive"
        )
    if not horizon_completions > 0:
        raise ValueError(f"horizon_completions is {horizon_completions}; it must be positive")
    if not math.isfinite(kl_nats_per_completion):
        return beta
    error = kl_nats_per_completion / target_nats_per_completion - 1
    clipped = min(max(error, -0.2), 0.2)
    return beta * (1 + clipped * min(1.0, num_completions / horizon_completions))
