"""From logits to the log-probability of sampled tokens and to entropy, at the sampling temperature.

Both compute in float32 at least, whatever the dtype of the logits: in bfloat16 a log-softmax is off
by up to 0.1 nats, which is more than a policy moves in one step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of given tokens under temperature-scaled logits.

    lp[i,t] = z[i,t,y] - log sum_v exp z[i,t,v],    z = logits / temperature,  y = token_ids[i,t]

    Source: own; the temperature belongs to the policy, since it is the distribution that was
    sampled from (N Implementation Details of RLHF with PPO, policy training).

    The logits are not changed. A float32 or float64 input at temperature 1 is not copied either;
    otherwise one (B, C, V) copy is made, so long sequences are best passed in chunks.

    Args:
        logits: (B, C, V), row t predicts token t of `token_ids` (the caller shifts); finite also at
            positions that a mask will drop, since a NaN here has a NaN derivative.
        token_ids: (B, C) int64 in [0, V), also under a mask.
        temperature: divides the logits, > 0; the same in rollout, scoring and update.

    Returns:
        (B, C) nats, float32, or float64 for float64 logits.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if logits.ndim != 3 or token_ids.shape != logits.shape[:2]:
        raise ValueError(
            f"logits {tuple(logits.shape)} do not fit token_ids {tuple(token_ids.shape)}; "
            "pass (B, C, V) and (B, C)"
        )
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (B, C)
    return chosen - scaled.logsumexp(dim=-1)


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution at each position.

    H[i,t] = - sum_v p[i,t,v] * log p[i,t,v],    p = softmax(logits / temperature),  0 log 0 = 0

    Source: own. As a bonus it enters a loss as -coefficient * H.

    Args:
        logits: (B, C, V); -inf marks a token that cannot be drawn and adds neither entropy nor
            gradient.
        temperature: divides the logits, > 0.

    Returns:
        (B, C) nats in [0, log V], float32, or float64 for float64 logits.

    Raises:
        ValueError: logits that are not (B, C, V), or a temperature that is not positive.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; pass (B, C, V)")
    logp = _scaled(logits, temperature).log_softmax(dim=-1)
    finite_logp = logp.masked_fill(logp == -math.inf, 0.0)  # 0 * -inf is NaN
    return -(logp.exp() * finite_logp).sum(dim=-1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a positive number")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature
