"""Whether differences between siblings are real: noise of scoring, agreement with a better judge.

A reward that is asked twice and answers differently hands out advantages that mean nothing; one
that ranks siblings against a better judge hands out wrong ones. Advantages compare siblings only,
so only what happens inside a group counts here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.advantages import EQUAL_RELATIVE_SPREAD, group_statistics
from lightning_grpo.intervals import Interval, clustered_share_interval, jackknife_interval


@dataclass(frozen=True)
class RescoringNoise:
    """How much of the variance between siblings is noise of the scoring."""

    share: float
    """Of the within-variance of a single score, 0 to 1; NaN where it has none."""
    interval: Interval
    """Of the share."""
    noise_variance: float
    """Variance of the scores of one completion, in squared reward units."""
    within: float
    """Variance of single scores inside a group, noise included, in squared reward units."""
    num_rows: int
    """Completions with two scores or more, whose group has another such."""
    num_differing: int
    """Those of them whose scores differ."""


@dataclass(frozen=True)
class Ranking:
    """How often the reward ranks two siblings as the gold score does."""

    share_right: float
    """Of the pairs; half for a tie of rewards. 1/2 is what a coin gets; NaN without pairs."""
    interval: Interval
    """Of the share."""
    num_pairs: int
    """Pairs of siblings whose gold scores differ."""
    num_prompts: int
    """Prompts with such a pair."""


def rescoring_noise(scores: Tensor, group_ids: Tensor, *, level: float = 0.9) -> RescoringNoise:
    """Split the variance between siblings into that of completions and that of scoring them.

    noise = sum_i sum_k (s_ik - mean_i)^2 / sum_i (K_i - 1)
    within = (variance of mean_i inside groups) + noise * (1 - mean of 1 / K_i)
    share = noise / within

    Source: own, by nested analysis of variance (Searle, Casella, McCulloch, Variance Components
    (1992), ch. 3); the interval is a jackknife over groups of the log of the ratio of variances.
    Departs: the share is at most 1.

    Args:
        scores: (B, K) scores of each completion by the same scorer; NaN where there is none.
        group_ids: (B,) integer group of each row.
        level: of the interval, (0, 1).

    Returns:
        The estimates; NaN without two rows of a group that were scored twice.

    Raises:
        ValueError: shapes that do not go together, an infinite score, or a level out of range.
    """
    if scores.ndim != 2 or group_ids.shape != scores.shape[:1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} must be (B, K), and group_ids "
            f"{tuple(group_ids.shape)} (B,)"
        )
    s = scores.double()
    num_scores = (~s.isnan()).sum(1).double()
    means = torch.where(num_scores >= 2, s.nanmean(1), math.nan)
    count = group_statistics(means, group_ids).count  # refuses infinite scores
    rows = ~means.isnan() & (count >= 2)
    s, ids, means, num_scores = s[rows], group_ids[rows], means[rows], num_scores[rows]
    squares = (s - means[:, None]).square().nansum(1)
    from_group = (means - group_statistics(means, ids).mean).square()
    sums = _sums_by_group(
        ids, squares, num_scores - 1, from_group, 1 / num_scores, torch.ones_like(means)
    )
    noise, between_rows, inverse = _noise_components(sums.sum(0), len(sums))
    left = sums.sum(0) - sums
    left_noise, left_between_rows, _ = _noise_components(left, len(sums) - 1)
    within = between_rows + noise * (1 - inverse)
    interval = jackknife_interval(
        (between_rows / noise).log(), (left_between_rows / left_noise).log(), level=level
    )
    ends = torch.tensor(interval, dtype=torch.float64).exp()
    high, low = (1 / (ends + 1 - inverse)).clamp(max=1).tolist()
    largest = s.nan_to_num(0.0).abs().amax(1) if len(s) else means
    spread = s.nan_to_num(-math.inf).amax(1) - s.nan_to_num(math.inf).amin(1) if len(s) else means
    num_differing = int((spread > EQUAL_RELATIVE_SPREAD * largest).sum())
    if num_differing == 0 and float(within) > 0:
        low, high = 0.0, 0.0
    return RescoringNoise(
        share=float((noise / within).clamp(max=1)),
        interval=Interval(low, high) if math.isfinite(low + high) else Interval(0.0, 1.0),
        noise_variance=float(noise),
        within=float(within),
        num_rows=len(s),
        num_differing=num_differing,
    )


def ranking(rewards: Tensor, gold: Tensor, group_ids: Tensor, *, level: float = 0.9) -> Ranking:
    """Count the pairs of siblings that the reward ranks as the gold score does.

    share = sum over pairs i, j of a group with gold_i > gold_j of
            (1 if r_i > r_j, 1/2 if r_i = r_j, 0 else) / number of such pairs

    Source: own; that of a single group is the area under the ROC curve where gold is 0 or 1. The
    interval is `clustered_share_interval`, over prompts.

    Args:
        rewards: (B,) reward of each row; NaN where no function scored it.
        gold: (B,) score of a better judge, the higher the better, in units of its own; NaN where
            there is none.
        group_ids: (B,) integer group of each row.
        level: of the interval, (0, 1).

    Returns:
        The share; NaN without pairs.

    Raises:
        ValueError: shapes that differ, an infinite value, or a level out of range.
    """
    if gold.shape != rewards.shape:
        raise ValueError(
            f"gold {tuple(gold.shape)} must be (B,), as rewards are: {tuple(rewards.shape)}"
        )
    group_statistics(rewards, group_ids), group_statistics(gold, group_ids)  # refuse infinite ones
    rows = ~rewards.isnan() & ~gold.isnan()
    r, judged, ids = rewards[rows].double(), gold[rows].double(), group_ids[rows]
    right: list[float] = []
    num_pairs: list[int] = []
    order = ids.argsort(stable=True)
    _, sizes = torch.unique_consecutive(ids[order], return_counts=True)
    for members in order.split(sizes.tolist()):
        is_better = _differs(judged[members])
        agreement = (_differs(r[members]).double() - _differs(-r[members]).double() + 1) / 2
        right.append(float(agreement[is_better].sum()))
        num_pairs.append(int(is_better.sum()))
    k, n = torch.tensor(right, dtype=torch.float64), torch.tensor(num_pairs, dtype=torch.float64)
    return Ranking(
        share_right=float(k.sum() / n.sum()),
        interval=clustered_share_interval(k, n, level=level),
        num_pairs=int(n.sum()),
        num_prompts=int((n > 0).sum()),
    )


def _differs(x: Tensor) -> Tensor:
    """Whether x_i is larger than x_j by more than rounding, (n, n)."""
    tolerance = EQUAL_RELATIVE_SPREAD * x.abs().max() if len(x) else 0.0
    return x[:, None] - x[None, :] > tolerance


def _noise_components(sums: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, variance of the rows' means inside groups, and mean of 1 / K."""
    squares, num_free, from_group, inverse, num_rows = sums.unbind(-1)
    return squares / num_free, from_group / (num_rows - num_groups), inverse / num_rows


def _sums_by_group(group_ids: Tensor, *per_row: Tensor) -> Tensor:
    """Sum of each (B,) tensor over the rows of each group, (N, number of tensors)."""
    ids, index = torch.unique(group_ids, return_inverse=True)
    columns = torch.stack(per_row, dim=1)
    return columns.new_zeros(len(ids), len(per_row)).index_add(0, index, columns)
