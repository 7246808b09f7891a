"""CISPO: bounded weights, and no token that drops out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_grpo.advantages import Baseline, Scale
from lightning_grpo.algorithms.composition import (
    check_at_least_zero,
    check_choices,
    check_has_siblings,
    policy_inputs,
    regularized,
    with_group_advantages,
)
from lightning_grpo.kl import KLKind
from lightning_grpo.losses import cispo_policy_loss
from lightning_grpo.masking import Reduction
from lightning_grpo.types import LossOutput, Rollout, SumOverRanks


@dataclass(frozen=True)
class CISPO:
    """Clipped importance sampling: GRPO's advantages, REINFORCE with bounded weights.

    loss[b,t] = -min(ratio, max_weight) * A[b] * logprobs[b,t]            the min a constant

    averaged over all tokens; KL and entropy bonus as in GRPO.

    Source: MiniMax-M1 (arXiv:2506.13585), eqs. 4 and 5, without a lower bound, as run there.
    Departs: advantages as GRPO.

    Args:
        max_weight: what the ratio, as the weight of a token, is bounded at, > 1.
        baseline: mean of the whole group, or of the siblings only.
        scale: divide by the group's std, or not.
        kl_estimator: how the KL to the reference enters the loss, as in GRPO.
        entropy_coef: weight of an entropy bonus, >= 0.
        mask_truncated: leave completions that the token limit cut off out of the loss.
    """

    max_weight: float = 5.0
    baseline: Baseline = "group_mean"
    scale: Scale = "std"
    kl_estimator: KLKind = "k3"
    entropy_coef: float = 0.0
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        if not self.max_weight > 1:
            raise ValueError(f"max_weight must be above 1, got {self.max_weight}")
        check_at_least_zero(entropy_coef=self.entropy_coef)
        check_choices(
            baseline=(self.baseline, Baseline),
            scale=(self.scale, Scale),
            kl_estimator=(self.kl_estimator, KLKind),
        )

    @property
    def reduction(self) -> Reduction:
        """Every token weighs the same."""
        return "token"

    def check_group_size(self, group_size: int) -> None:
        """Refuse a group that has no sibling to compare with."""
        check_has_siblings(group_size, "CISPO")

    def prepare(self, rollout: Rollout, *, beta: float, sum_over_ranks: SumOverRanks) -> Rollout:
        """Add group advantages; see `Algorithm.prepare`."""
        return with_group_advantages(
            rollout,
            beta=beta,
            baseline=self.baseline,
            scale=self.scale,
            mask_truncated=self.mask_truncated,
        )

    def loss(
        self, logprobs: Tensor, rollout: Rollout, *, beta: float, entropy: Tensor | None = None
    ) -> LossOutput:
        """Weighted REINFORCE, KL and entropy bonus per token; see `Algorithm.loss`."""
        policy = cispo_policy_loss(*policy_inputs(logprobs, rollout), clip_high=self.max_weight - 1)
        return regularized(
            policy,
            logprobs,
            rollout,
            beta=beta,
            kl_estimator=self.kl_estimator,
            entropy=entropy,
            entropy_coef=self.entropy_coef,
        )
