"""GRPO, and what its options make of it: Dr. GRPO, DAPO, RLOO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_grpo.advantages import Baseline, Scale
from lightning_grpo.algorithms.composition import (
    check_at_least_zero,
    check_choices,
    check_clip,
    check_has_siblings,
    clipped_loss,
    with_group_advantages,
)
from lightning_grpo.kl import KLKind
from lightning_grpo.masking import Reduction
from lightning_grpo.types import LossOutput, Rollout, SumOverRanks


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimization: the group's own statistics in place of a critic.

    loss[b,t] = -min(ratio * A[b], clip(ratio, 1 - clip_low, 1 + clip_high) * A[b])
                + beta * KL(policy || reference)[b,t] - entropy_coef * H[b,t]
    A[b] = (r[b] - mean of its group) / (std of its group + 1e-8)

    Source: DeepSeekMath (arXiv:2402.03300), eqs. 3 and 4. Others are sets of its options:
    DAPO (arXiv:2503.14476) is `clip_high: 0.28`, `reduction: token` and, in its first form,
    `mask_truncated`; Dr. GRPO (arXiv:2503.20783) is `scale: none`, `reduction: constant`; RLOO
    (arXiv:2402.14740) is `baseline: leave_one_out`, `scale: none`; `dual_clip` is eq. 5 of
    arXiv:1912.09729.
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
        entropy_coef: weight of an entropy bonus, >= 0.
        mask_truncated: leave completions that the token limit cut off out of the loss, as DAPO's
            overlong filtering does. They still count in their group's mean and std.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    baseline: Baseline = "group_mean"
    scale: Scale = "std"
    reduction: Reduction = "completion"
    kl_estimator: KLKind = "k3"
    entropy_coef: float = 0.0
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        check_at_least_zero(entropy_coef=self.entropy_coef)
        check_choices(
            baseline=(self.baseline, Baseline),
            scale=(self.scale, Scale),
            reduction=(self.reduction, Reduction),
            kl_estimator=(self.kl_estimator, KLKind),
        )

    def check_group_size(self, group_size: int) -> None:
        """Refuse a group that has no sibling to compare with."""
        check_has_siblings(group_size, "GRPO")

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
        """Clipped policy loss, KL and entropy bonus per token; see `Algorithm.loss`."""
        return clipped_loss(self, logprobs, rollout, beta=beta, entropy=entropy)
