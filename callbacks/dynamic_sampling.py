"""DynamicSampling: replace the groups whose completions all got the same reward."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_grpo.advantages import group_statistics
from lightning_grpo.callbacks.reward import reward_rollout
from lightning_grpo.callbacks.rollout import next_rollout
from lightning_grpo.loaders import Slot
from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Rollout, join_rollouts, select_rows

# So many iterations in a row that stay short of groups are worth a warning.
SHORT_ITERATIONS = 3


class DynamicSampling(L.Callback):
    """Drop groups of equal rewards, which teach nothing, and complete further prompts for them.

    The next prompts of the stream are completed and scored, a whole round of them on every rank,
    until each rank holds as many groups as it began with or `max_refills` rounds are over. What is
    still missing then is filled with dropped groups that the loss does not count. `on_rollout_end`
    and `on_rewards_end` are called for every round; `reward/*`, `group/*` and `completion/*` are
    those of the first, in which nothing has been selected. Rests when the algorithm at work does
    not compare the completions of a prompt.

    Source: DAPO (arXiv:2503.14476), sec. 3.2.
    Departs: refills are bounded; the reward that judges need not be 0 or 1.

    Args:
        max_refills: most rounds of further prompts per iteration; 0 keeps every group.
        function: name of the reward function that says whether a group's rewards are equal, so
            that shaping keeps no group alive; reward.success_function when null, or the first.
    """

    def __init__(self, max_refills: int = 0, function: str | None = None) -> None:
        if max_refills < 0:
            raise ValueError(f"dynamic_sampling.max_refills must not be negative: {max_refills}")
        self.max_refills = max_refills
        self.function = function
        self._num_short = 0

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Check that the reward function is there."""
        names = module.required_scorer.names
        if self.function is not None and self.function not in names:
            raise ValueError(
                f"dynamic_sampling.function {self.function!r} is not one of the reward functions "
                f"{names}"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        """Select among the groups of a rollout that has just been scored, and refill."""
        # A critic, which PPO or the way to it has, is to learn from the prompts as they come.
        if not self.max_refills or module.queue or module.critic is not None:
            return
        rollout = module.rollout
        assert rollout is not None and rollout.rewards is not None
        num_wanted = len(rollout.group_ids.unique())
        living, dead = self._split(module, rollout)
        counts = torch.tensor([len(rollout.group_ids.unique()), len(dead.group_ids.unique())])
        num_refills = 0
        while self._is_any_short(module, living, num_wanted) and num_refills < self.max_refills:
            num_refills += 1
            made = next_rollout(trainer, module, refill=num_refills)
            fresh = reward_rollout(trainer, module, made.rollout).rollout
            fresh_living, fresh_dead = self._split(module, fresh)
            counts += torch.tensor(
                [len(fresh.group_ids.unique()), len(fresh_dead.group_ids.unique())]
            )
            living = join_rollouts([living, fresh_living], pad_token_id(module))
        self._warn(self._is_any_short(module, living, num_wanted))
        module.rollout = exactly(living, dead, num_wanted, pad_token_id(module))
        num_groups, num_dropped = module.sum_over_ranks(counts.double()).tolist()
        module.log_dict(
            {
                "sampling/refills": float(num_refills),
                "sampling/dropped_frac": num_dropped / max(num_groups, 1.0),
            },
            batch_size=1,
        )

    def state_dict(self) -> dict[str, Any]:
        """How often in a row groups were missing."""
        return {"num_short": self._num_short}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._num_short = state_dict["num_short"]

    def _split(self, module: GRPOModule, rollout: Rollout) -> tuple[Rollout, Rollout]:
        """The groups whose judging rewards differ, and the others."""
        name = self.function or module.judge.function or next(iter(rollout.function_rewards))
        is_dead = group_statistics(rollout.function_rewards[name], rollout.group_ids).is_equal
        rows = (~is_dead).nonzero().flatten(), is_dead.nonzero().flatten()
        return select_rows(rollout, rows[0]), select_rows(rollout, rows[1])

    def _is_any_short(self, module: GRPOModule, living: Rollout, num_wanted: int) -> bool:
        """Whether any rank lacks groups; the same on all, so that all make the same rounds."""
        is_short = len(living.group_ids.unique()) < num_wanted
        return float(module.sum_over_ranks(torch.tensor(float(is_short)))) > 0

    def _warn(self, is_short: bool) -> None:
        self._num_short = self._num_short + 1 if is_short else 0
        if self._num_short == SHORT_ITERATIONS:
            rank_zero_warn(
                f"{SHORT_ITERATIONS} iterations in a row stayed short of groups with different "
                f"rewards after dynamic_sampling.max_refills = {self.max_refills} rounds, and "
                "train on fewer: raise it, or use prompts that the model solves sometimes"
            )


def exactly(living: Rollout, dead: Rollout, num_groups: int, pad_token_id: int) -> Rollout:
    """The first living groups, and dead ones where they are too few, outside of the loss.

    Args:
        living: groups that train.
        dead: groups that can stand in, so that the rollout splits as it should; their
            `action_mask` becomes False throughout, which takes them out of loss and denominator.
        num_groups: how many groups to return; there are at least so many of both together.
        pad_token_id: fills the padding.

    Returns:
        A rollout of `num_groups` groups.
    """
    living = first_groups(living, num_groups)
    num_missing = num_groups - len(living.group_ids.unique())
    if not num_missing:
        return living
    filler = first_groups(dead, num_missing)
    filler = filler.replace(action_mask=torch.zeros_like(filler.action_mask))
    return join_rollouts([living, filler], pad_token_id)


def first_groups(rollout: Rollout, num_groups: int) -> Rollout:
    """The first groups of a rollout, in the order of their first rows.

    Args:
        rollout: B rows.
        num_groups: how many groups at most.

    Returns:
        The rows of these groups in their order.
    """
    kept = set(list(dict.fromkeys(rollout.group_ids.tolist()))[:num_groups])
    rows = [row for row, group in enumerate(rollout.group_ids.tolist()) if group in kept]
    return select_rows(rollout, torch.tensor(rows, dtype=torch.int64))


def pad_token_id(module: GRPOModule) -> int:
    """The id that fills padding, 0 for a tokenizer that has none."""
    return int(module.tokenizer.pad_token_id or 0)
