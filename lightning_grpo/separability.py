"""Whether the rewards tell siblings apart, and what a critic could gain over comparing them.

At sequence level (no discount, lambda 1) every token of completion i gets r_i - b. Around the
expectation of its prompt, r_i has the variance `within`, and the mean square of r_i - b, to which
the variance of the gradient is proportional, is `within` times

    G / (G - 1)            b = the mean of the other G - 1 completions
    1 + mse_V / within     b = V(prompt), mse_V = E[(V - E[r | prompt])^2]

so a critic is the better baseline only when mse_V < within / (G - 1), and never by more than a
factor G / (G - 1). What it can win beyond that is credit per token (lambda < 1), which no
statistic of this module sees.

All functions take the rows of all ranks at once, in any order, in groups of any size, and compute
in float64. A reward of NaN means not scored. What too few rows leave undefined is NaN, and its
interval everything that is possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.advantages import group_statistics
from lightning_grpo.intervals import Interval, binomial_interval, check_level, jackknife_interval


@dataclass(frozen=True)
class DeadGroups:
    """How many groups cannot teach anything, because all their rewards are equal."""

    num_dead: int
    """Groups whose scored rewards are equal."""
    num_groups: int
    """Groups with at least two scored rows."""
    share: float
    """num_dead / num_groups; NaN without groups."""
    interval: Interval
    """Of the share of dead groups among all prompts, as if these were a random sample."""


@dataclass(frozen=True)
class RewardVariance:
    """The variance of the rewards, split into that of siblings and that between prompts."""

    within: float
    """Variance of a prompt's rewards, averaged over prompts, in squared reward units."""
    between: float
    """Variance of the prompts' expected rewards, >= 0."""
    between_unclamped: float
    """The same without bias; negative by chance when the prompts hardly differ."""
    icc: float
    """Intraclass correlation: between / (between + within), 0 to 1."""
    interval: Interval
    """Of the icc."""
    group_size: float
    """n0, the size of equal groups that would say as much; G when all are of size G."""
    num_groups: int
    """Groups with a scored row."""


@dataclass(frozen=True)
class BaselineErrors:
    """Residual variance of two baselines on the same rows."""

    siblings: float
    """Mean of (r_i - mean of its siblings)^2, in squared reward units."""
    critic: float | None
    """Mean of (r_i - V_i)^2; None without a critic, as the three below."""
    ratio: float | None
    """critic / siblings: below 1 the critic is the better baseline."""
    interval: Interval | None
    """Of the ratio."""
    explained_var: float | None
    """1 - critic / variance of the rewards over all rows; at most 1, negative if V is useless."""
    num_rows: int
    """Scored rows that have a scored sibling."""


def dead_groups(rewards: Tensor, group_ids: Tensor, *, level: float = 0.9) -> DeadGroups:
    """Count the groups whose rewards are all equal, among those that could differ.

    dead_g = max_g - min_g <= 1e-6 * max_g |r|

    Source: own. Departs from `advantages.zero_std_fraction`, which counts a group with a single
    scored row as equal: it has nothing to differ from and is left out here.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        level: of the interval, (0, 1).

    Returns:
        Counts, their ratio, and its exact interval.

    Raises:
        ValueError: shapes that differ, an infinite reward, or a level out of range.
    """
    rows = _scored_rows(rewards, group_ids, at_least=2)
    ids = group_ids[rows]
    num_groups = len(ids.unique())
    num_dead = len(ids[group_statistics(rewards[rows], ids).is_equal].unique())
    return DeadGroups(
        num_dead=num_dead,
        num_groups=num_groups,
        share=num_dead / num_groups if num_groups else math.nan,
        interval=binomial_interval(num_dead, num_groups, level=level),
    )


def reward_variance(rewards: Tensor, group_ids: Tensor, *, level: float = 0.9) -> RewardVariance:
    """Split the variance of the rewards by one-way analysis of variance with random effects.

    within = sum_g sum_{i in g} (r_i - mean_g)^2 / (B - N)
    between = (sum_g n_g (mean_g - mean)^2 / (N - 1) - within) / n0
    n0 = (B - sum_g n_g^2 / B) / (N - 1)
    icc = between / (between + within)

    Source: Searle, Casella, McCulloch, Variance Components (1992), sec. 3.6; the interval is a
    jackknife over groups of log(1 + n0 between / within), Arvesen and Schmitz, Biometrics 26
    (1970), 677-686.
    Departs: `between` and `icc` are clamped at 0; where a resample has no variance within, as
    happens with few groups and rewards of 0 and 1, the interval is (0, 1).

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        level: of the interval of the icc, (0, 1).

    Returns:
        The estimates; NaN where there are fewer than two groups, no siblings, or, for the icc,
        no variance.

    Raises:
        ValueError: shapes that differ, an infinite reward, or a level out of range.
    """
    rows = _scored_rows(rewards, group_ids, at_least=1)
    r, ids = rewards[rows].double(), group_ids[rows]
    # Equal rewards become exact zeros, and a large offset costs the means no digits.
    r = r - r.min() if len(r) else r
    from_own_mean = r - group_statistics(r, ids).mean
    ss_within, total, size = _sums_by_group(
        ids, from_own_mean.square(), r, torch.ones_like(r)
    ).unbind(1)
    sums = torch.stack(
        [ss_within, total.square() / size, total, size, size.square(), torch.ones_like(size)], dim=1
    )
    within, between, group_size = _variance_components(sums.sum(0))
    left_within, left_between, _ = _variance_components(sums.sum(0) - sums)
    log_interval = jackknife_interval(
        torch.log1p(group_size * between / within),
        torch.log1p(group_size * left_between / left_within),
        level=level,
    )
    # Back to between / within, then to between / (between + within), which 1 - 1 / (1 + x) is.
    ends = torch.tensor(log_interval, dtype=torch.float64).expm1().clamp(min=0) / group_size
    low, high = (1 - 1 / (1 + ends)).tolist()
    clamped = between.clamp(min=0)
    return RewardVariance(
        within=float(within),
        between=float(clamped),
        between_unclamped=float(between),
        icc=float(clamped / (clamped + within)),
        interval=Interval(low, high) if math.isfinite(low) else Interval(0.0, 1.0),
        group_size=float(group_size),
        num_groups=len(sums),
    )


def baseline_errors(
    rewards: Tensor,
    group_ids: Tensor,
    prompt_values: Tensor | None = None,
    *,
    level: float = 0.9,
) -> BaselineErrors:
    """Compare the siblings' mean with a critic's value of the prompt, as baselines.

    siblings = mean_i (r_i - mean_{j in g, j != i} r_j)^2,   expectation within * G / (G - 1)
    critic = mean_i (r_i - V_i)^2,                           expectation within + mse_V
    explained_var = 1 - critic / mean_i (r_i - mean r)^2

    The critic must come from earlier iterations: one that was fitted on these very rewards
    remembers them, and looks better than it is.

    Source: own; the interval is a jackknife over groups of the log of the ratio.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        prompt_values: (B,) the critic's value at the end of each row's prompt, in reward units.
        level: of the interval of the ratio, (0, 1).

    Returns:
        Both errors on the rows that have a scored sibling; NaN when there are none.

    Raises:
        ValueError: shapes that differ, an infinite reward, a value that is not finite, or a level
            out of range.
    """
    check_level(level)
    rows = _scored_rows(rewards, group_ids, at_least=2)
    r, ids = rewards[rows].double(), group_ids[rows]
    group = group_statistics(r, ids)
    # r_i - (n * mean - r_i) / (n - 1) = n / (n - 1) * (r_i - mean)
    sibling_residual = (r - group.mean) * group.count / (group.count - 1)
    siblings = float(sibling_residual.square().mean())
    if prompt_values is None:
        return BaselineErrors(siblings, None, None, None, None, len(r))
    if prompt_values.shape != rewards.shape:
        raise ValueError(
            f"prompt_values {tuple(prompt_values.shape)} must be (B,), as rewards are: "
            f"{tuple(rewards.shape)}"
        )
    values = prompt_values[rows].double()
    if not bool(values.isfinite().all()):
        raise ValueError("prompt_values has a value that is not finite")
    critic_residual = r - values
    critic = critic_residual.square().mean()
    variance = (r - r.mean()).square().mean()
    sums = _sums_by_group(ids, critic_residual.square(), sibling_residual.square())
    total, left_out = sums.sum(0), sums.sum(0) - sums
    log_interval = jackknife_interval(
        (total[0] / total[1]).log(), (left_out[:, 0] / left_out[:, 1]).log(), level=level
    )
    low, high = torch.tensor(log_interval, dtype=torch.float64).exp().tolist()
    return BaselineErrors(
        siblings=siblings,
        critic=float(critic),
        ratio=float(total[0] / total[1]),
        interval=Interval(low, high),
        explained_var=float(1 - critic / variance),
        num_rows=len(r),
    )


def break_even_mse(within: float, group_size: float) -> float:
    """Mean squared error below which a critic beats the siblings' mean as a baseline.

    1 + mse_V / within < G / (G - 1)   <=>   mse_V < within / (G - 1)

    Source: own; see the head of this module.

    Args:
        within: variance of a prompt's rewards, squared reward units.
        group_size: G, > 1; n0 for groups of unequal size.

    Returns:
        The bound on the error against the prompt's true mean reward, in squared reward units.

    Raises:
        ValueError: a group size of 1 or less.
    """
    _check_group_size(group_size)
    return within / (group_size - 1)


def break_even_explained_var(icc: float, group_size: float) -> float:
    """Explained variance above which a critic beats the siblings' mean as a baseline.

    1 - (1 - icc) * G / (G - 1)

    The same condition as `break_even_mse`, for 1 - (within + mse_V) / (within + between), which
    is what a critic's explained variance on single rewards estimates.

    Source: own; see the head of this module.

    Args:
        icc: between / (between + within), 0 to 1.
        group_size: G, > 1; n0 for groups of unequal size.

    Returns:
        The bound; negative when comparing siblings is worse than no baseline but a constant.

    Raises:
        ValueError: a group size of 1 or less.
    """
    return 1 - (1 - icc) * largest_gain(group_size)


def largest_gain(group_size: float) -> float:
    """Factor by which a perfect critic of the prompt would lower the variance.

    G / (G - 1)

    Source: own; see the head of this module.

    Args:
        group_size: G, > 1; n0 for groups of unequal size.

    Returns:
        Variance with the siblings' mean over that with the prompt's true mean.

    Raises:
        ValueError: a group size of 1 or less.
    """
    _check_group_size(group_size)
    return group_size / (group_size - 1)


def _scored_rows(rewards: Tensor, group_ids: Tensor, *, at_least: int) -> Tensor:
    """Mark the scored rows of groups with at least so many of them; checks the two tensors."""
    return ~rewards.isnan() & (group_statistics(rewards, group_ids).count >= at_least)


def _variance_components(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Within, between (unclamped) and n0 from the sums over groups in the last dimension."""
    ss_within, ss_means, totals, num_rows, squared_sizes, num_groups = sums.unbind(-1)
    within = ss_within / (num_rows - num_groups)
    mean_square = (ss_means - totals.square() / num_rows) / (num_groups - 1)
    group_size = (num_rows - squared_sizes / num_rows) / (num_groups - 1)
    return within, (mean_square - within) / group_size, group_size


def _sums_by_group(group_ids: Tensor, *per_row: Tensor) -> Tensor:
    """Sum of each (B,) tensor over the rows of each group, (N, number of tensors)."""
    ids, index = torch.unique(group_ids, return_inverse=True)
    columns = torch.stack(per_row, dim=1)
    return columns.new_zeros(len(ids), len(per_row)).index_add(0, index, columns)


def _check_group_size(group_size: float) -> None:
    if not group_size > 1:
        raise ValueError(f"group_size is {group_size}; a row alone has no siblings: pass > 1")
