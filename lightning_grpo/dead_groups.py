"""The share of prompts whose completions all get the same reward, over the number G of completions.

For a prompt whose reward takes the value v with probability p_v, a group of G is dead, without
spread, with probability sum_v p_v^G. The share of dead groups is its mean over prompts,

    D(G) = E[sum_v p_v^G],    D(1) = 1

G scores of each prompt say without bias what D is at G and below. Above, D is not known, whatever
the number of prompts: D(1..G) are moments, and many distributions have the same. Bounds hold.

All functions take the rows of all prompts at once, in any order, in groups of any size, and compute
in float64. A reward of NaN means not scored, and is as if the row was not there. What few prompts
leave undefined is NaN, and its interval everything that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.advantages import EQUAL_RELATIVE_SPREAD
from lightning_grpo.intervals import Interval, binomial_interval, clustered_share_interval


@dataclass(frozen=True)
class DeadShare:
    """The share of dead groups at one group size."""

    group_size: int
    """G."""
    share: float
    """D(G)."""
    interval: Interval
    """Of D(G), as if the prompts were a random sample."""
    num_prompts: int
    """Prompts that it was measured on."""


@dataclass(frozen=True)
class DeadBounds:
    """What scores in smaller groups say of the share of dead groups at a larger size."""

    group_size: int
    """G, larger than what was measured."""
    bounds: Interval
    """Between these D(G) lies, if the shares that were measured are exact."""
    interval: Interval
    """The same with what chance may have done to them."""


@dataclass(frozen=True)
class DeadAgain:
    """How many of the prompts that were dead once would be so in a second group as large."""

    num_dead: int
    """Prompts without spread."""
    num_near: int
    """Prompts of which all completions but one are alike."""
    least: float
    """D(2 G) / D(G) is at least this, with the level of confidence asked for."""


def group_values(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count how often each value of the reward occurs in each group.

    Rewards that follow one another in a group's order at no more than 1e-6 of its largest |reward|
    are the same value, as in `advantages`.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row.

    Returns:
        For each value of each group, (V,): its group, counted from 0 in ascending order of the ids
        that have a scored row, the value, and how many rows have it.

    Raises:
        ValueError: shapes that differ, or an infinite reward.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both "
            "have shape (B,)"
        )
    if bool(rewards.isinf().any()):
        row = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"the reward of row {row} is infinite")
    is_scored = ~rewards.isnan()
    _, index = torch.unique(group_ids[is_scored], return_inverse=True)
    r = rewards[is_scored].double()
    largest = r.new_zeros(int(index.max()) + 1 if len(index) else 0)
    largest = largest.scatter_reduce(0, index, r.abs(), "amax")
    # By group, and by reward inside each.
    order = r.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    r, index = r[order], index[order]
    is_new = torch.ones_like(index, dtype=torch.bool)
    is_other = r.diff() > EQUAL_RELATIVE_SPREAD * largest[index[1:]]
    is_new[1:] = is_other | (index.diff() > 0)
    counts = torch.bincount(is_new.cumsum(0) - 1) if len(r) else index
    return index[is_new], r[is_new], counts


def common_group_size(rewards: Tensor, group_ids: Tensor) -> int:
    """The largest G for which at least half of the groups have G scored rows; 0 without rows."""
    groups, _, counts = group_values(rewards, group_ids)
    if not len(groups):
        return 0
    sizes = _sums(groups, counts).sort(descending=True).values
    return int(sizes[(len(sizes) - 1) // 2])


def dead_chances(rewards: Tensor, group_ids: Tensor, group_size: int) -> Tensor:
    """Chance that a random part of each group has no spread.

    sum_v C(c_v, G) / C(n, G)    for n scores, of which c_v have the value v

    Source: own; the hypergeometric distribution.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        group_size: G, the size of the part, >= 1.

    Returns:
        (N,) float64, of the groups that have so many scores, in ascending order of their ids.

    Raises:
        ValueError: shapes that differ, an infinite reward, or a size below 1.
    """
    if group_size < 1:
        raise ValueError(f"a group of {group_size} completions is none: pass at least 1")
    groups, _, counts = group_values(rewards, group_ids)
    sizes = _sums(groups, counts)
    log_chance = _log_choose(counts, group_size) - _log_choose(sizes, group_size)[groups]
    chance = torch.where(counts >= group_size, log_chance.exp(), 0.0)
    return _sums(groups, chance)[sizes >= group_size].clamp(max=1)


def dead_shares(
    rewards: Tensor, group_ids: Tensor, group_sizes: Sequence[int], *, level: float = 0.9
) -> list[DeadShare]:
    """Share of dead groups at the size of the groups and below, from one set of scores.

    The mean over prompts of `dead_chances`, which is D(G) without bias.

    Source: own; the interval is `clustered_share_interval`.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        group_sizes: each G, >= 1; prompts with fewer scores do not count for it.
        level: of each interval by itself, (0, 1).

    Returns:
        One for each G; a share of NaN where no prompt has so many scores.

    Raises:
        ValueError: shapes that differ, an infinite reward, a size below 1, or a level out of range.
    """
    found = []
    for group_size in group_sizes:
        chances = dead_chances(rewards, group_ids, group_size)
        found.append(
            DeadShare(
                group_size=group_size,
                share=float(chances.mean()),
                interval=clustered_share_interval(chances, torch.ones_like(chances), level=level),
                num_prompts=len(chances),
            )
        )
    return found


def dead_bounds(
    rewards: Tensor,
    group_ids: Tensor,
    group_size: int,
    larger_sizes: Sequence[int],
    *,
    level: float = 0.9,
) -> list[DeadBounds]:
    """Bounds of the share of dead groups at sizes above those that were measured.

    D(G) * (D(G) / D(G - 1))^(M - G) <= D(M) <= D(G)    for M > G

    log D is convex in G, as that of every sequence of moments, hence the left one. Both are
    attained when no more is known than D(G - 1) and D(G): by one value of probability
    D(G) / D(G - 1) in all prompts that repeat any, and by prompts that are dead at every size.

    Source: own; convexity by Hoelder's inequality. With t prompts without spread and s prompts with
    all completions but one alike, D(G) / D(G - 1) = t / (t + s / G) in expectation, and t is
    binomial given t + s, so that the interval is exact: half of what may fail is left to D(M) above
    it, a quarter each to D(G) and to the ratio too high.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        group_size: G, >= 2; of each prompt with as many scores the first G count.
        larger_sizes: each M, >= G.
        level: probability, at least, that the interval holds D(M), (0, 1).

    Returns:
        One for each M; (0, 1) without prompts.

    Raises:
        ValueError: shapes that differ, an infinite reward, or a size or a level out of range.
    """
    if group_size < 2 or min(larger_sizes, default=group_size) < group_size:
        raise ValueError(
            f"from groups of {group_size}, at least 2, to {list(larger_sizes)}, at least as large"
        )
    dead, near, num_prompts = _dead_and_near(rewards, group_ids, group_size)
    num_dead, num_near = int(dead.sum()), int(near.sum())
    share = binomial_interval(num_dead, num_prompts, level=level)
    wider = 1 - (1 - level) / 2
    low = binomial_interval(num_dead, num_prompts, level=wider).low
    low_ratio = _ratio_of_chance(
        binomial_interval(num_dead, num_dead + num_near, level=wider).low, group_size
    )
    estimate = num_dead / num_prompts if num_prompts else math.nan
    ratio = _ratio_of_chance(num_dead / max(num_dead + num_near, 1), group_size)
    return [
        DeadBounds(
            group_size=larger,
            bounds=Interval(estimate * ratio ** (larger - group_size), estimate)
            if num_prompts
            else Interval(0.0, 1.0),
            interval=Interval(low * low_ratio ** (larger - group_size), share.high),
        )
        for larger in larger_sizes
    ]


def dead_again(
    rewards: Tensor,
    group_ids: Tensor,
    group_size: int,
    *,
    at_least: float = -math.inf,
    below: float = math.inf,
    level: float = 0.9,
) -> DeadAgain:
    """Bound the share of dead prompts that would be dead again, in a second group as large.

    D(2 G) / D(G) >= (D(G) / D(G - 1))^G

    Of prompts that are dead at a value of some range, D is the part of the sum over values in it.

    Source: own; see `dead_bounds`. The bound is one-sided and exact.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        group_ids: (B,) integer group of each row, in any order, groups of any size.
        group_size: G, >= 3; of each prompt with as many scores the first G count.
        at_least: the smallest value that counts.
        below: values below it count.
        level: probability, at least, that the bound is below the true share, (0, 1).

    Returns:
        The counts and the bound; 0 for it without dead prompts.

    Raises:
        ValueError: shapes that differ, an infinite reward, or a size or a level out of range.
    """
    if group_size < 3:
        raise ValueError(f"groups of {group_size} do not tell values that recur: pass at least 3")
    dead, near, _ = _dead_and_near(rewards, group_ids, group_size, at_least, below)
    num_dead, num_near = int(dead.sum()), int(near.sum())
    # One-sided: all that may fail is on one side.
    low = binomial_interval(num_dead, num_dead + num_near, level=max(2 * level - 1, 1e-9)).low
    return DeadAgain(num_dead, num_near, least=_ratio_of_chance(low, group_size) ** group_size)


def _dead_and_near(
    rewards: Tensor,
    group_ids: Tensor,
    group_size: int,
    at_least: float = -math.inf,
    below: float = math.inf,
) -> tuple[Tensor, Tensor, int]:
    """Which prompts are all of one value in a range, and which are so but for one row.

    Both are (N,), and N is the last result: the prompts with `group_size` scores, of which the
    first count.
    """
    scored = ~rewards.isnan()
    r, ids = rewards[scored], group_ids[scored]
    kept = _place_in_group(ids) < group_size
    groups, values, counts = group_values(r[kept], ids[kept])
    is_full = _sums(groups, counts) == group_size
    is_counted = (values >= at_least) & (values < below)
    dead = _sums(groups, (counts == group_size) & is_counted)
    near = _sums(groups, (counts == group_size - 1) & is_counted)
    # Two different values are one but for the other either way; such a prompt is near once.
    near = near.clamp(max=1)
    return dead[is_full], near[is_full], int(is_full.sum())


def _ratio_of_chance(chance: float, group_size: int) -> float:
    """D(G) / D(G - 1) from the chance that a prompt which is dead, or near it, is dead."""
    # All subsets of G - 1 of a dead group are dead, of a near one a single one of the G is; at
    # G = 2 both are: D(1) = 1.
    weight = 1.0 if group_size == 2 else 1 / group_size
    return chance / (chance + weight * (1 - chance))


def _place_in_group(group_ids: Tensor) -> Tensor:
    """How many rows of the same group come before each row, (B,)."""
    order = group_ids.argsort(stable=True)
    _, sizes = torch.unique_consecutive(group_ids[order], return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - starts
    return place


def _sums(groups: Tensor, per_value: Tensor) -> Tensor:
    """Sum over the values of each group; groups are counted from 0 without gaps."""
    num_groups = int(groups.max()) + 1 if len(groups) else 0
    dtype = torch.float64 if per_value.is_floating_point() else torch.long
    return torch.zeros(num_groups, dtype=dtype).index_add(0, groups, per_value.to(dtype))


def _log_choose(num: Tensor, num_chosen: int) -> Tensor:
    """Log of the number of ways to choose; not to be used where there are fewer."""
    n = num.double().clamp(min=num_chosen)
    return torch.lgamma(n + 1) - math.lgamma(num_chosen + 1) - torch.lgamma(n - num_chosen + 1)
