"""Group-relative advantages: how much better a completion is than the other answers to its prompt.

Groups are given by explicit ids, in any row order: neither the text of a prompt nor the position of
a row says which group it is in. A reward of NaN means that no reward function scored the row; such
a row takes no part in its group's statistics and gets no advantage. Everything is computed in
float64.

Differs from the GRPO paper in: sample standard deviation (the paper does not say which); a group
whose rewards differ by less than one part in a million counts as equal and gets exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["group_mean", "leave_one_out"]
Scale = Literal["std", "none"]

# Rewards of a group that differ by no more than this part of the largest |reward| are rounding
# noise, which a division by the standard deviation would blow up to advantages of one.
EQUAL_RELATIVE_SPREAD = 1e-6


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of the group that each row is in, over the scored rows of the group."""

    mean: Tensor
    """(B,) float64, reward units; 0 where no row of the group is scored."""
    std: Tensor
    """(B,) float64, sample standard deviation (ddof 1), reward units; 0 below two scored rows."""
    count: Tensor
    """(B,) float64, number of scored rows."""
    is_equal: Tensor
    """(B,) bool, True where the scored rewards of the group are equal, or fewer than two."""


def group_statistics(rewards: Tensor, group_ids: Tensor) -> GroupStatistics:
    """Mean, standard deviation and number of the scored rewards of each row's group.

    mean_g = sum_i r_i / n_g                            i over the scored rows of g
    std_g = sqrt(sum_i (r_i - mean_g)^2 / (n_g - 1))
    equal_g = max_g - min_g <= 1e-6 * max_g |r|

    Source: own. The variance takes two passes: mean of squares minus square of mean loses all
    digits for small spreads around a large mean.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.

    Returns:
        The statistics, one entry per row.

    Raises:
        ValueError: shapes that differ, or an infinite reward.
    """
    per_group, index = _per_group(rewards, group_ids)
    return GroupStatistics(
        mean=per_group.mean[index],
        std=per_group.std[index],
        count=per_group.count[index],
        is_equal=per_group.is_equal[index],
    )


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "std",
    eps: float = 1e-8,
) -> Tensor:
    """Advantage of each completion over the other answers to its prompt.

    A_i = r_i - mean_g                         baseline group_mean, scale none (Dr. GRPO)
    A_i = (r_i - mean_g) / (std_g + eps)       baseline group_mean, scale std (GRPO)
    A_i = r_i - mean_{j in g, j != i} r_j      baseline leave_one_out, scale none (RLOO)

    Source: DeepSeekMath (arXiv:2402.03300) sec. 4.1; Dr. GRPO (arXiv:2503.20783); RLOO
    (arXiv:2402.14740).
    Departs: sample standard deviation (ddof 1); a group of equal rewards, up to 1e-6 of the
    largest, gives exactly 0; unscored rows take no part.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        baseline: what is subtracted: the mean of the group, or of the other rows of the group.
        scale: divide by the group's standard deviation, or not.
        eps: added to the standard deviation, in reward units, >= 0.

    Returns:
        (B,) float64, mean zero over the scored rows of a group; 0 for rows that are not scored, are
        alone in their group, or are in a group of equal rewards.

    Raises:
        ValueError: shapes that differ, an infinite reward, a negative eps, or an unknown option.
    """
    if baseline not in ("group_mean", "leave_one_out"):
        raise ValueError(f"unknown baseline {baseline!r}; choose group_mean or leave_one_out")
    if scale not in ("std", "none"):
        raise ValueError(f"unknown scale {scale!r}; choose std or none")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    group = group_statistics(rewards, group_ids)
    advantages = rewards.to(torch.float64) - group.mean
    if baseline == "leave_one_out":
        # r_i - (n * mean - r_i) / (n - 1) = n / (n - 1) * (r_i - mean)
        advantages = advantages * group.count / (group.count - 1).clamp(min=1)
    if scale == "std":
        advantages = advantages / (group.std + eps)
    return torch.where(rewards.isnan() | group.is_equal, 0.0, advantages)


def zero_std_fraction(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of groups of equal rewards, which teach nothing, and number of groups.

    Source: own.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row; whole groups, so that no group is counted on two
            ranks.

    Returns:
        () float64 groups whose rewards count as equal, and () float64 groups with a scored row.

    Raises:
        ValueError: shapes that differ, or an infinite reward.
    """
    per_group, _ = _per_group(rewards, group_ids)
    is_scored = per_group.count > 0
    num_equal = (per_group.is_equal & is_scored).sum().to(torch.float64)
    return num_equal, is_scored.sum().to(torch.float64)


def _per_group(rewards: Tensor, group_ids: Tensor) -> tuple[GroupStatistics, Tensor]:
    """Statistics with one entry per group, and the entry of each row."""
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} "
            "must both be (B,)"
        )
    if bool(rewards.isinf().any()):
        row = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"the reward of row {row} is infinite; return a finite number, or None")
    is_scored = ~rewards.isnan()
    r = torch.where(is_scored, rewards.to(torch.float64), 0.0)
    ids, index = torch.unique(group_ids, return_inverse=True)
    zeros = r.new_zeros(len(ids))  # one entry per group

    count = zeros.index_add(0, index, is_scored.to(torch.float64))
    mean = zeros.index_add(0, index, r) / count.clamp(min=1)
    deviation = torch.where(is_scored, r - mean[index], 0.0)
    variance = zeros.index_add(0, index, deviation.square()) / (count - 1).clamp(min=1)

    scored_index, scored_r = index[is_scored], r[is_scored]
    largest = zeros.scatter_reduce(0, scored_index, scored_r, "amax", include_self=False)
    smallest = zeros.scatter_reduce(0, scored_index, scored_r, "amin", include_self=False)
    magnitude = torch.maximum(largest.abs(), smallest.abs())
    is_equal = largest - smallest <= EQUAL_RELATIVE_SPREAD * magnitude
    return GroupStatistics(mean=mean, std=variance.sqrt(), count=count, is_equal=is_equal), index
