"""GSPO: one ratio for a whole completion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_grpo.advantages import Baseline, Scale
from lightning_grpo.algorithms.composition import (
    check_at_least_zero,
    check_choices,
    check_clip,
    check_has_siblings,
    policy_inputs,
    regularized,
    with_group_advantages,
)
from lightning_grpo.kl import KLKind
from lightning_grpo.losses import sequence_clipped_policy_loss
from lightning_grpo.masking import Reduction
from lightning_grpo.types import LossOutput, Rollout, SumOverRanks


@dataclass(frozen=True)
class GSPO:
    """Group sequence policy optimization: GRPO with the ratio, and the clip, of completions.

    loss[b] = -min(s[b] * A[b], clip(s[b], 1 - sequence_clip_low, 1 + sequence_clip_high) * A[b])
    s[b] = exp(mean over the tokens of b of (logprobs - old_logprobs))

    averaged over completions; KL and entropy bonus as in GRPO.

    Source: GSPO (arXiv:2507.18071), eqs. 5 and 7.
    Departs: as GRPO.

    Args:
        sequence_clip_low: how far below 1 the ratio of a completion counts, (0, 1); much less
            than for tokens.
        sequence_clip_high: how far above 1 it counts, > 0.
        baseline: mean of the whole group, or of the siblings only.
        scale: divide by the group's std, or not.
        kl_estimator: how the KL to the reference enters the loss, as in GRPO.
        entropy_coef: weight of an entropy bonus, >= 0.
        mask_truncated: leave completions that the token limit cut off out of the loss.
    """

    sequence_clip_low: float = 3e-4
    sequence_clip_high: float = 4e-4
    baseline: Baseline = "group_mean"
    scale: Scale = "std"
    kl_estimator: KLKind = "k3"
    entropy_coef: float = 0.0
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        check_clip(self.sequence_clip_low, self.sequence_clip_high, prefix="sequence_")
        check_at_least_zero(entropy_coef=self.entropy_coef)
        check_choices(
            baseline=(self.baseline, Baseline),
            scale=(self.scale, Scale),
            kl_estimator=(self.kl_estimator, KLKind),
        )

    @property
    def reduction(self) -> Reduction:
        """Over completions: the loss of a completion counts once, not once per token."""
        return "completion"

    def check_group_size(self, group_size: int) -> None:
        """Refuse a group that has no sibling to compare with."""
        check_has_siblings(group_size, "GSPO")

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
        """Sequence-clipped policy loss, KL and entropy bonus per token; see `Algorithm.loss`."""
        policy = sequence_clipped_policy_loss(
            *policy_inputs(logprobs, rollout),
            clip_low=self.sequence_clip_low,
            clip_high=self.sequence_clip_high,
        )
        return regularized(
            policy,
            logprobs,
            rollout,
            beta=beta,
            kl_estimator=self.kl_estimator,
            entropy=entropy,
            entropy_coef=self.entropy_coef,
        )
