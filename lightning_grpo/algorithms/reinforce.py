"""REINFORCE++: no critic, no group needed, advantages whitened over the whole rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.advantages import group_statistics
from lightning_grpo.algorithms.composition import (
    check_at_least_zero,
    check_choices,
    check_clip,
    check_has_siblings,
    clipped_loss,
    kl_terms,
    scores_of,
    without_unscored,
)
from lightning_grpo.gae import gae, token_rewards
from lightning_grpo.kl import KLKind
from lightning_grpo.masking import Reduction
from lightning_grpo.types import LossOutput, Rollout, SumOverRanks
from lightning_grpo.whitening import masked_whiten


@dataclass(frozen=True)
class ReinforcePlusPlus:
    """REINFORCE++: the reward still to come, whitened over the tokens of all ranks.

    A[b,t] = whiten(r[b] - baseline[b] - sum over tokens i >= t of beta * (old[b,i] - ref[b,i]))

    with PPO's clipped loss, averaged over all tokens; KL and entropy bonus in the loss as in GRPO.

    Source: REINFORCE++ (arXiv:2501.03262); `subtract_group_mean` is its variant with a baseline.
    Departs: whitening by the sample std (ddof 1) plus 1e-8.

    Args:
        clip_low: how far below 1 the ratio counts, (0, 1).
        clip_high: how far above 1 the ratio counts, > 0.
        dual_clip: caps the loss at this multiple of |A| where A < 0, > 1; null for no cap.
        subtract_group_mean: whether the group's mean reward is subtracted before whitening;
            without it one completion per prompt will do.
        kl_estimator: how the KL to the reference enters the loss, as in GRPO.
        entropy_coef: weight of an entropy bonus, >= 0.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    subtract_group_mean: bool = False
    kl_estimator: KLKind = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        check_at_least_zero(entropy_coef=self.entropy_coef)
        check_choices(
            kl_estimator=(self.kl_estimator, KLKind),
        )

    @property
    def reduction(self) -> Reduction:
        """Every token weighs the same."""
        return "token"

    def check_group_size(self, group_size: int) -> None:
        """Refuse a group without siblings when their mean is the baseline."""
        if self.subtract_group_mean:
            check_has_siblings(group_size, "ReinforcePlusPlus with subtract_group_mean")

    def prepare(self, rollout: Rollout, *, beta: float, sum_over_ranks: SumOverRanks) -> Rollout:
        """Add whitened advantages, and mask rows without a reward; see `Algorithm.prepare`."""
        scores = scores_of(rollout)
        if self.subtract_group_mean:
            scores = scores - group_statistics(scores, rollout.group_ids).mean
        rollout = without_unscored(rollout)
        mask = rollout.action_mask
        rewards = token_rewards(scores, mask, **kl_terms(rollout, beta))
        # Over a critic that knows nothing, lambda 1 is the sum of the rewards still to come.
        to_go = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=1.0)
        whitened = masked_whiten(to_go, mask, sum_over_ranks=sum_over_ranks)
        return rollout.replace(advantages=whitened.float())

    def loss(
        self, logprobs: Tensor, rollout: Rollout, *, beta: float, entropy: Tensor | None = None
    ) -> LossOutput:
        """Clipped policy loss, KL and entropy bonus per token; see `Algorithm.loss`."""
        return clipped_loss(self, logprobs, rollout, beta=beta, entropy=entropy)
