"""What an algorithm is to the rest of the project."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_grpo.masking import Reduction
from lightning_grpo.types import LossOutput, Rollout, SumOverRanks


class Algorithm(Protocol):
    """What the LightningModule asks of an algorithm."""

    @property
    def reduction(self) -> Reduction:
        """How token losses are averaged: see `masking.reduction_count`."""
        ...

    @property
    def entropy_coef(self) -> float:
        """Weight of the entropy bonus; above 0 `loss` needs the entropy, with gradients."""
        ...

    def check_group_size(self, group_size: int) -> None:
        """Raise a ValueError when the algorithm cannot work with groups of this size."""
        ...

    def prepare(self, rollout: Rollout, *, beta: float, sum_over_ranks: SumOverRanks) -> Rollout:
        """Turn the rewards of a rollout into advantages, once and before it is cut up.

        Args:
            rollout: B rows with rewards, whole groups; what else is needed, the algorithm says.
            beta: weight of the KL to the reference in the reward, 0 when it is in the loss;
                above 0 the rollout needs old_logprobs and ref_logprobs.
            sum_over_ranks: adds a tensor over the ranks; every rank calls `prepare`.

        Returns:
            The rollout with advantages. Rows that are not to be learned from have an action_mask
            that is False everywhere.
        """
        ...

    def loss(
        self, logprobs: Tensor, rollout: Rollout, *, beta: float, entropy: Tensor | None = None
    ) -> LossOutput:
        """Loss of each token, and the sums of its metrics.

        Args:
            logprobs: (b, C) under the current policy, nats.
            rollout: the same rows, prepared.
            beta: weight of the KL to the reference in the loss, 0 when it is in the reward. The KL
                is logged whenever the rollout has ref_logprobs.
            entropy: (b, C) of the current policy at each token, nats, with gradients.

        Returns:
            Token losses (b, C) and metrics.
        """
        ...
