"""Rewards per token, and advantages from a critic: generalized advantage estimation.

The value of a token is that of the state *before* it was sampled: the prompt and the tokens before
it. A mask may have holes, tokens that the environment wrote: no state of theirs is valued, and
what comes after them reaches the token before them as if they were not there.

Everything here is a constant of the update: no gradient flows through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grpo.kl import kl_estimate
from lightning_grpo.masking import check_mask


@torch.no_grad()
def token_rewards(
    rewards: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """Reward of each token: the score on the last one, less the KL to the reference on each.

    r[b,t] = rewards[b] * (t is the last True of row b) - beta * (old[b,t] - ref[b,t])

    Source: Ziegler et al. (arXiv:1909.08593) eq. 2 and InstructGPT (arXiv:2203.02155) eq. 2, per
    token; the KL is k1, under the policy that acted, and not a loss. With gamma 1 its gradient is
    that of the KL between whole sequences.

    Args:
        rewards: (B,) score of each completion, reward units. NaN only where a row has no token.
        mask: (B, C) bool, True where the policy chose the token.
        old_logprobs: (B, C) log-probs under the policy that acted, nats; read when beta > 0.
        ref_logprobs: (B, C) the same under the reference, nats; read when beta > 0.
        beta: weight of the KL, reward units per nat, >= 0.

    Returns:
        (B, C) in the dtype of `rewards`, 0 under the mask; a row without tokens has no reward.

    Raises:
        ValueError: shapes that differ, a score that is not finite on a row with tokens, a negative
            beta, or log-probs missing for the KL.
    """
    check_mask(mask)
    if mask.ndim != 2 or rewards.shape != mask.shape[:1]:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and mask {tuple(mask.shape)} must be (B,) and (B, C)"
        )
    is_bad = mask.any(dim=1) & ~rewards.isfinite()
    if bool(is_bad.any()):
        raise ValueError(
            f"the reward of row {int(is_bad.nonzero()[0])} is not finite; mask its tokens"
        )
    # From here on there is one token: this is the last. An argmax would find one in an empty row.
    is_last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    scores = torch.where(is_last, rewards.unsqueeze(1), 0.0)
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; it must be at least 0")
    if beta == 0:
        return scores
    if old_logprobs is None or ref_logprobs is None:
        raise ValueError("a KL in the reward needs old_logprobs and ref_logprobs")
    return scores - beta * kl_estimate(old_logprobs, ref_logprobs, mask, "k1").to(scores.dtype)


@torch.no_grad()
def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    final_values: Tensor | None = None,
) -> Tensor:
    """Advantage of each token over the critic's value of the state it was sampled in.

    delta[t] = r[t] + gamma * V[next t] - V[t]
    A[t] = delta[t] + gamma * lambda * A[next t]

    where `next t` is the next True of the row; after the last one V is `final_values` and A is 0.
    lambda 1 is the return less the value: no bias, and the variance of all that follows; lambda 0
    is delta, with the bias of the critic.

    Source: GAE (arXiv:1506.02438) eqs. 11, 12, 16. Departs: masked positions are left out, instead
    of being states.

    Args:
        token_rewards: (B, C) reward for each token, reward units.
        values: (B, C) value of the state before each token, reward units.
        mask: (B, C) bool, True where the policy chose the token; holes are allowed.
        gamma: discount per True token, in [0, 1].
        gae_lambda: in [0, 1]; a tensor gives one to each row, (B,).
        final_values: (B,) value of the state after the last token; None means that every row ended
            there, with nothing to follow.

    Returns:
        (B, C) in the wider dtype of rewards and values, 0 under the mask.

    Raises:
        ValueError: shapes that differ, or gamma or lambda out of [0, 1].
    """
    check_mask(mask, token_rewards=token_rewards, values=values)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must be in [0, 1]")
    num_rows = mask.shape[0]
    if final_values is None:
        final_values = values.new_zeros(num_rows)
    if final_values.shape != (num_rows,):
        raise ValueError(f"final_values has shape {tuple(final_values.shape)}; pass (B,)")

    next_values = torch.cat([values, final_values.unsqueeze(1)], dim=1)
    next_values = next_values.gather(1, _next_position(mask))
    delta = torch.where(mask, token_rewards + gamma * next_values - values, 0.0)
    rate = torch.as_tensor(gae_lambda, dtype=delta.dtype, device=delta.device)
    if rate.ndim and rate.shape != (num_rows,):
        raise ValueError(f"gae_lambda has shape {tuple(rate.shape)}; pass one number, or (B,)")
    if not bool(((rate >= 0) & (rate <= 1)).all()):
        raise ValueError(f"gae_lambda is {gae_lambda}; it must be in [0, 1]")
    # A hole adds nothing and forgets nothing, so that what follows it passes through unchanged.
    decay = torch.where(mask, gamma * rate.expand(num_rows).unsqueeze(1), 1.0)
    advantages = torch.zeros_like(delta)
    following = delta.new_zeros(num_rows)
    for t in reversed(range(mask.shape[1])):
        following = delta[:, t] + decay[:, t] * following
        advantages[:, t] = following
    return torch.where(mask, advantages, 0.0)


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Lambda of each row such that credit reaches a fixed share of the row's length.

    lambda = clip(1 - 1 / (alpha * l), 0, 1)            l tokens in the row

    The weights lambda^i of an endless row then sum to alpha * l.

    Source: VAPO (arXiv:2504.05118) sec. 4.2. Departs: clamped, as it is negative for rows shorter
    than 1 / alpha.

    Args:
        mask: (B, C) bool, True where the policy chose the token.
        alpha: share of the length, > 0; the paper's is 0.05.

    Returns:
        (B,) float64 in [0, 1]; 0 for a row without tokens.

    Raises:
        ValueError: a mask that is not bool, or an alpha that is not positive.
    """
    check_mask(mask)
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be positive")
    lengths = mask.sum(dim=1).to(torch.float64)
    return (1 - 1 / (alpha * lengths)).clamp(min=0, max=1)


def _next_position(mask: Tensor) -> Tensor:
    """(B, C) int64: where the next True after each position is, C when there is none."""
    num_columns = mask.shape[1]
    columns = torch.arange(num_columns, device=mask.device)
    here = torch.where(mask, columns, num_columns)
    # The first True from each position on; shifted by one, the first True after it.
    from_here = here.flip(1).cummin(dim=1).values.flip(1)
    none = from_here.new_full((mask.shape[0], 1), num_columns)
    return torch.cat([from_here, none], dim=1)[:, 1:]
