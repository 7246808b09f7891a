"""The evidence of one iteration on whether a critic or the group is the better baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_grpo.separability import (
    BaselineErrors,
    DeadGroups,
    RewardVariance,
    baseline_errors,
    break_even_explained_var,
    dead_groups,
    largest_gain,
    reward_variance,
)
from lightning_grpo.stages import Stage


@dataclass(frozen=True)
class Evidence:
    """What one iteration has shown; a switch rule gets it, the same on all ranks."""

    iteration: int
    """The iteration that has just ended, from 0."""
    stage: Stage
    """grpo, handover, warmup or ppo: see stages.py."""
    dead: DeadGroups
    """Groups without spread."""
    variance: RewardVariance
    """Variance of the rewards within and between prompts."""
    errors: BaselineErrors
    """Errors of the siblings' mean and of the critic at the prompt, as predictions of a reward."""
    value_explained_var: float | None
    """Share of the variance of the returns that the critic explains, over all tokens; it had not
    learned from these rows yet. None without a critic."""

    @property
    def largest_gain(self) -> float:
        """Factor that a perfect critic of the prompt could gain; NaN with one row per group."""
        size = self.variance.group_size
        return largest_gain(size) if size > 1 else math.nan

    @property
    def break_even_explained_var(self) -> float:
        """Explained variance at the prompt above which a critic beats the siblings' mean."""
        size = self.variance.group_size
        return break_even_explained_var(self.variance.icc, size) if size > 1 else math.nan

    def numbers(self) -> dict[str, float]:
        """Name -> value of what is logged; what could not be measured is left out."""
        found: dict[str, float | None] = {
            "evidence/zero_std_frac": self.dead.share,
            "evidence/zero_std_frac_low": self.dead.interval.low,
            "evidence/zero_std_frac_high": self.dead.interval.high,
            "evidence/within_var": self.variance.within,
            "evidence/between_var": self.variance.between,
            "evidence/icc": self.variance.icc,
            "evidence/siblings_mse": self.errors.siblings,
            "evidence/critic_mse": self.errors.critic,
            "evidence/mse_ratio": self.errors.ratio,
            "evidence/critic_explained_var": self.errors.explained_var,
            "evidence/break_even_explained_var": self.break_even_explained_var,
        }
        return {k: v for k, v in found.items() if v is not None and math.isfinite(v)}

    def __str__(self) -> str:
        dead, low, high = self.dead, *self.dead.interval
        parts = [
            f"{dead.num_dead} of {dead.num_groups} groups without spread (in "
            f"{low:.0%} to {high:.0%} of the prompts)",
            f"variance of the reward {self.variance.within:.3g} within prompts and "
            f"{self.variance.between:.3g} between them",
        ]
        if self.errors.ratio is not None and self.errors.interval is not None:
            low, high = self.errors.interval
            parts.append(
                f"squared error of the critic at the prompt {self.errors.ratio:.2f} times that of "
                f"the siblings' mean ({low:.2f} to {high:.2f})"
            )
        if self.value_explained_var is not None:
            explained = f"{self.value_explained_var:.2f}"
            parts.append(f"explained variance of the returns {explained}")
        return "; ".join(parts)


def measure_evidence(
    *,
    iteration: int,
    stage: Stage,
    rewards: Tensor,
    group_ids: Tensor,
    baseline_rewards: Tensor,
    baseline_group_ids: Tensor,
    prompt_values: Tensor | None,
    value_explained_var: float | None,
) -> Evidence:
    """Measure one iteration.

    Args:
        iteration: from 0.
        stage: in which its minibatches were learned from.
        rewards: (B,) of everything that was sampled at first, over all ranks.
        group_ids: (B,).
        baseline_rewards: (b,) of the rows that were learned from.
        baseline_group_ids: (b,).
        prompt_values: (b,) of the critic before it learned from these rows; None without one.
        value_explained_var: over the tokens.

    Returns:
        The evidence.
    """
    return Evidence(
        iteration=iteration,
        stage=stage,
        dead=dead_groups(rewards, group_ids),
        variance=reward_variance(rewards, group_ids),
        errors=baseline_errors(baseline_rewards, baseline_group_ids, prompt_values),
        value_explained_var=value_explained_var,
    )
