"""Algorithms: small objects that compose the pure functions into advantages and a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_grpo.advantages import Baseline, Scale, group_advantages
from lightning_grpo.kl import KLKind, kl_estimate
from lightning_grpo.losses import clipped_policy_loss
from lightning_grpo.masking import Reduction
from lightning_grpo.types import LossOutput, Rollout


class Algorithm(Protocol):
    """What the LightningModule asks of an algorithm."""

    @property
    def reduction(self) -> Reduction:
        """How token losses are averaged: see `masking.reduction_count`."""
        ...

    def check_group_size(self, group_size: int) -> None:
        """Raise a ValueError when the algorithm cannot work with groups of this size."""
        ...

    def advantages(self, rollout: Rollout) -> Tensor:
        """Advantages (B, C) of a scored rollout."""
        ...

    def loss(self, logprobs: Tensor, rollout: Rollout, *, beta: float) -> LossOutput:
        """Loss of each token, (B, C), and the sums of its metrics."""
        ...


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimization: the group's own statistics in place of a critic.

    loss[b,t] = -min(ratio * A[b], clip(ratio, 1 - clip_low, 1 + clip_high) * A[b])
                + beta * KL(policy || reference)[b,t]
    A[b] = (r[b] - mean of its group) / (std of its group + 1e-8)

    Source: DeepSeekMath (arXiv:2402.03300), eqs. 3 and 4; `clip_high` is DAPO's
    (arXiv:2503.14476), `scale: none` and `reduction: constant` are Dr. GRPO's
    (arXiv:2503.20783), `baseline: leave_one_out` is RLOO's (arXiv:2402.14740), `dual_clip` is
    eq. 5 of arXiv:1912.09729.
    Departs: the std is the sample std (ddof 1), which the paper leaves open; a group whose
    rewards are all equal has advantage exactly 0.

    Args:
        clip_low: how far below 1 the ratio counts, (0, 1).
        clip_high: how far above 1 the ratio counts, > 0.
        dual_clip: caps the loss at this multiple of |A| where A < 0, > 1; null for no cap.
        baseline: mean of the whole group, or of the siblings only.
        scale: divide by the group's std, or not.
        reduction: average over the tokens of a completion, then over completions (completion);
            over all tokens (token); sum over tokens divided by the number of completions times
            max_completion_tokens (constant).
        kl_estimator: how the KL to the reference enters the loss. k3 is the paper's; its
            gradient is that of the forward KL. reverse has the gradient of the reverse KL.
            k1 has no gradient in expectation and is there for comparison.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    baseline: Baseline = "group_mean"
    scale: Scale = "std"
    reduction: Reduction = "completion"
    kl_estimator: KLKind = "k3"

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low must lie in (0, 1), got {self.clip_low}")
        if self.clip_high <= 0:
            raise ValueError(f"clip_high must be positive, got {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")

    def check_group_size(self, group_size: int) -> None:
        """Refuse a group that has no sibling to compare with."""
        if group_size < 2:
            raise ValueError(
                f"rollout.group_size is {group_size}, but GRPO compares the completions of a "
                "prompt with each other: set it to 2 or more (8 is usual)"
            )

    def advantages(self, rollout: Rollout) -> Tensor:
        """Broadcast each completion's group advantage over its tokens.

        Args:
            rollout: B rows with rewards.

        Returns:
            (B, C) float32, 0 where the policy did not act.
        """
        if rollout.rewards is None:
            raise ValueError("the rollout has no rewards yet: score it first")
        per_row = group_advantages(
            rollout.rewards, rollout.group_ids, baseline=self.baseline, scale=self.scale
        )
        return torch.where(rollout.action_mask, per_row.float().unsqueeze(1), 0.0)

    def loss(self, logprobs: Tensor, rollout: Rollout, *, beta: float) -> LossOutput:
        """Clipped policy loss plus beta times the KL to the reference, per token.

        Args:
            logprobs: (B, C) under the current policy, nats.
            rollout: the same rows, with advantages.
            beta: weight of the KL, >= 0.

        Returns:
            Token losses (B, C) and metrics.
        """
        old_logprobs = rollout.old_logprobs
        if old_logprobs is None:
            old_logprobs = logprobs.detach()
        if rollout.advantages is None:
            raise ValueError("the rollout has no advantages yet")
        mask = rollout.action_mask
        policy = clipped_policy_loss(
            logprobs,
            old_logprobs,
            rollout.advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        if rollout.ref_logprobs is None:
            return policy
        kl = kl_estimate(logprobs, rollout.ref_logprobs, mask, kind=self.kl_estimator)
        with torch.no_grad():
            ref_kl = kl_estimate(logprobs, rollout.ref_logprobs, mask, kind="k3").double().sum()
        num_completions = mask.any(dim=1).sum()
        metrics = policy.metrics | {
            "ref/kl": (ref_kl, mask.sum()),
            "ref/kl_per_completion": (ref_kl, num_completions),
        }
        return LossOutput(policy.per_token + beta * kl, metrics)
