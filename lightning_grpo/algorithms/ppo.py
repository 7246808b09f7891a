"""PPO with a critic: credit for each token from generalized advantage estimation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_grpo.advantages import group_advantages
from lightning_grpo.algorithms.composition import (
    check_at_least_zero,
    check_choices,
    check_clip,
    check_has_siblings,
    clipped_loss,
    kl_terms,
    required,
    scores_of,
    without_unscored,
)
from lightning_grpo.gae import gae, length_adaptive_lambda, token_rewards
from lightning_grpo.kl import KLKind
from lightning_grpo.masking import Reduction
from lightning_grpo.types import LossOutput, Rollout, SumOverRanks
from lightning_grpo.value_loss import clipped_value_loss
from lightning_grpo.whitening import masked_whiten

Truncation = Literal["terminal", "bootstrap"]
RewardBaseline = Literal["none", "leave_one_out"]

NEEDS_CRITIC = "PPO needs the critic's values of the rollout before it is prepared"


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimization: a critic says what each token was worth.

    loss[b,t] = -min(ratio * A[b,t], clip(ratio, 1 - clip_low, 1 + clip_high) * A[b,t])
                + beta * KL(policy || reference)[b,t] - entropy_coef * H[b,t]
    A = whiten(GAE(gamma, gae_lambda)),    returns = GAE(gamma, critic_lambda) + values

    Source: PPO (arXiv:1707.06347), GAE (arXiv:1506.02438), for language InstructGPT
    (arXiv:2203.02155); two lambdas: VC-PPO (arXiv:2503.01491); a lambda per length: VAPO
    (arXiv:2504.05118). `reward_baseline` is own.

    Args:
        clip_low: how far below 1 the ratio counts, (0, 1).
        clip_high: how far above 1 the ratio counts, > 0.
        dual_clip: caps the loss at this multiple of |A| where A < 0, > 1; null for no cap.
        value_clip: how far the critic may move from its values of the rollout, reward units, > 0;
            null for no bound.
        value_coef: weight of the critic's loss, >= 0; applied where the two losses are added.
        entropy_coef: weight of an entropy bonus, >= 0.
        gamma: discount per token, [0, 1].
        gae_lambda: of the policy's advantages, [0, 1]: 1 trusts the rewards alone, 0 the critic.
        critic_lambda: of the critic's targets, [0, 1]. At 1 they do not depend on the critic.
        length_adaptive_alpha: in place of gae_lambda, 1 - 1 / (alpha * tokens) for each
            completion, > 0 (0.05 is usual); null keeps gae_lambda.
        whiten: shift and scale the advantages to mean 0 and variance 1 over the tokens of the
            rollout on all ranks. The returns are never whitened.
        truncation: what follows a completion that the token limit cut off: nothing (terminal), or
            what the critic expects there (bootstrap).
        truncation_penalty: subtracted from the reward of such a completion, reward units, >= 0.
        reward_baseline: leave_one_out subtracts the mean reward of a completion's siblings. Credit
            stays per token, and the critic need not learn how hard each prompt is. It needs groups
            of 2 or more.
        reduction: how tokens are averaged, as in GRPO.
        kl_estimator: how the KL to the reference enters the loss, as in GRPO.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    critic_lambda: float = 1.0
    length_adaptive_alpha: float | None = None
    whiten: bool = True
    truncation: Truncation = "terminal"
    truncation_penalty: float = 0.0
    reward_baseline: RewardBaseline = "none"
    reduction: Reduction = "token"
    kl_estimator: KLKind = "k3"

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        check_at_least_zero(
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            truncation_penalty=self.truncation_penalty,
        )
        for name in ("value_clip", "length_adaptive_alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or null, got {value}")
        for name in ("gamma", "gae_lambda", "critic_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        check_choices(
            truncation=(self.truncation, Truncation),
            reward_baseline=(self.reward_baseline, RewardBaseline),
            reduction=(self.reduction, Reduction),
            kl_estimator=(self.kl_estimator, KLKind),
        )

    def check_group_size(self, group_size: int) -> None:
        """Refuse a group without siblings when their mean is the baseline."""
        if self.reward_baseline == "leave_one_out":
            check_has_siblings(group_size, "PPO with reward_baseline leave_one_out")

    def prepare(self, rollout: Rollout, *, beta: float, sum_over_ranks: SumOverRanks) -> Rollout:
        """Add advantages and returns, and mask rows without a reward; see `Algorithm.prepare`.

        The rollout needs the critic's values, and its final_values to bootstrap.
        """
        gae_lambda: float | Tensor = self.gae_lambda
        if self.length_adaptive_alpha is not None:
            gae_lambda = length_adaptive_lambda(rollout.action_mask, self.length_adaptive_alpha)
        advantages = self._advantages(rollout, beta=beta, gae_lambda=gae_lambda)
        returns = self.returns(rollout, beta=beta)
        rollout = without_unscored(rollout)
        if self.whiten:
            mask = rollout.action_mask
            advantages = masked_whiten(advantages, mask, sum_over_ranks=sum_over_ranks)
        return rollout.replace(advantages=advantages.float(), returns=returns)

    def returns(self, rollout: Rollout, *, beta: float) -> Tensor:
        """What the critic is to predict, also while another algorithm moves the policy.

        returns = values + GAE(gamma, critic_lambda)

        Args:
            rollout: B rows with rewards and values.
            beta: weight of the KL in the reward, >= 0.

        Returns:
            (B, C) float32, 0 where the policy did not act. A row without a reward has no target:
            its values stand in, at which the critic's loss has no gradient at first.
        """
        advantages = self._advantages(rollout, beta=beta, gae_lambda=self.critic_lambda)
        values = required(rollout, "values", NEEDS_CRITIC)
        return torch.where(rollout.action_mask, values + advantages, 0.0).float()

    def at_prompt(self, rollout: Rollout, *, beta: float) -> tuple[Tensor, Tensor]:
        """What each row came to, and what was expected of it at the prompt.

        target = the discounted sum of the row's token rewards,  prediction = V + baseline

        where the baseline is the siblings' mean under `reward_baseline: leave_one_out`, which the
        critic does not see, and else 0.

        Args:
            rollout: B rows with rewards and values.
            beta: weight of the KL in the reward, >= 0.

        Returns:
            Target and prediction, (B,) float64 each; NaN on rows that are not learned from.
        """
        plain = replace(self, reward_baseline="none", critic_lambda=1.0)
        target = plain.returns(rollout, beta=beta)[:, 0].double()
        is_out = ~rollout.action_mask[:, 0] | scores_of(rollout).isnan()
        target = torch.where(is_out, math.nan, target)
        prediction = required(rollout, "values", NEEDS_CRITIC)[:, 0].double()
        if self.reward_baseline == "leave_one_out":
            relative = group_advantages(
                target, rollout.group_ids, baseline="leave_one_out", scale="none"
            )
            prediction = prediction + torch.where(is_out, 0.0, target - relative)
        return target, prediction

    def value_loss(self, values: Tensor, rollout: Rollout) -> LossOutput:
        """The critic's loss at each token, without value_coef.

        Args:
            values: (b, C) by the critic in training, reward units.
            rollout: the same rows, with values and returns.

        Returns:
            Token losses (b, C), value/loss and value/clip_frac.
        """
        return clipped_value_loss(
            values,
            required(rollout, "values", NEEDS_CRITIC),
            required(rollout, "returns", "prepare it first"),
            rollout.action_mask,
            clip=self.value_clip,
        )

    def loss(
        self, logprobs: Tensor, rollout: Rollout, *, beta: float, entropy: Tensor | None = None
    ) -> LossOutput:
        """The policy's loss, without the critic's; see `Algorithm.loss`."""
        return clipped_loss(self, logprobs, rollout, beta=beta, entropy=entropy)

    def _advantages(self, rollout: Rollout, *, beta: float, gae_lambda: float | Tensor) -> Tensor:
        """(B, C) float64 advantages over the values, 0 on rows without a reward."""
        values = required(rollout, "values", NEEDS_CRITIC)
        scores = scores_of(rollout)
        is_truncated = rollout.truncated
        scores = torch.where(is_truncated, scores - self.truncation_penalty, scores)
        if self.reward_baseline == "leave_one_out":
            scores = group_advantages(
                scores, rollout.group_ids, baseline="leave_one_out", scale="none"
            )
        final_values = None
        if self.truncation == "bootstrap":
            after = required(rollout, "final_values", "truncation bootstrap needs them")
            final_values = torch.where(is_truncated, after, 0.0)
        rollout = without_unscored(rollout)
        mask = rollout.action_mask
        return gae(
            token_rewards(scores, mask, **kl_terms(rollout, beta)),
            values,
            mask,
            gamma=self.gamma,
            gae_lambda=gae_lambda,
            final_values=final_values,
        )
