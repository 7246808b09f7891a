"""How many completions per prompt: the noise of the gradient at equal cost, predicted from one run.

A prompt with G completions adds x = mean_i (r_i - mean of its siblings) s_i to the gradient, with
s_i the gradient of the log-prob of completion i. It is the mean over all pairs of siblings of

    k_ij = (r_i - r_j) (s_i - s_j) / 2

so by Hoeffding's decomposition, with mu_p = E[x | prompt] and d_i = r_i - E[r | prompt],

    tr Var(x | prompt) = b1 / G + b2 / (G (G - 1))
    b1 = E|d s|^2 - |mu_p|^2               each completion with the true baseline
    b2 = E d^2 E|s|^2 + |mu_p|^2           what estimating the baseline from siblings adds

M completions are M / G prompts, which differ in mu_p by a = tr Var(mu_p):

    M tr Var(g) = a G + b1 + b2 / (G - 1)

least at G* = 1 + sqrt(b2 / a). This holds for any reward. Where squared deviations d^2 and squared
lengths |s|^2 of completions are uncorrelated, and |mu_p|^2 is small beside their product, b1 and b2
are one number b, the noise of a completion, and the sum is G (a + b / (G - 1)).

It is about leave-one-out advantages that are not divided by a standard deviation, and about noise
alone, at equal numbers of completions: a prompt costs nothing of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.gradient_sums import PairSums, without_each_block
from lightning_grpo.intervals import Interval, check_level, jackknife_interval

GROUP_SIZES = (2, 4, 8, 16, 32, 64)
_MIN_GROUP_SIZE = 4  # of siblings of which two pairs have none in common


@dataclass(frozen=True)
class GroupNoise:
    """Predicted noise of the gradient at one group size."""

    noise: float
    """M tr Var(g): times 1 / M it is the variance with M completions, in squared gradient units."""
    interval: Interval
    """Of the noise."""
    relative: float
    """The noise over that at the group size of the run."""
    relative_interval: Interval
    """Of the relative noise."""


@dataclass(frozen=True)
class Allocation:
    """Where the noise of the gradient comes from, and the group size that has least of it."""

    between: float
    """a, between prompts; without bias, so it may be negative by chance."""
    between_interval: Interval
    """Of a."""
    noise: float
    """b2, per completion, which a larger group makes smaller."""
    noise_interval: Interval
    """Of b2."""
    completion_noise: float
    """b1, per completion, which is the same at every group size."""
    best_group_size: float
    """G*, at least 2; infinite where prompts do not seem to differ, NaN where b2 is not above 0."""
    best_interval: Interval
    """Of G*; its upper end is infinite where a may be 0."""
    predicted: dict[int, GroupNoise]
    """By group size."""
    num_prompts: int
    """n, measured."""


@torch.no_grad()
def completion_moments(rewards: Tensor, products: Tensor) -> Tensor:
    """What one group of completions says about the noise of its prompt, without bias.

    [0]  |mu_p|^2            mean of <k_ij, k_lm>, all four different
    [1]  |mu_p|^2 + b1 / 4   mean of <k_ij, k_il>, all three different
    [2]  |mu_p|^2 + b1 / 2 + b2 / 2    mean of |k_ij|^2

    Source: own; U-statistics of the head of this module, from sums in place of loops.

    Args:
        rewards: (n, G) rewards of the completions of n prompts, G >= 4.
        products: (n, G, G) inner products <s_i, s_j> of the gradients of their log-probs.

    Returns:
        (n, 3) float64.

    Raises:
        ValueError: shapes that do not fit, fewer than four completions, or a number that is not
            finite.
    """
    num_prompts, size = rewards.shape if rewards.ndim == 2 else (0, 0)
    if size < _MIN_GROUP_SIZE or products.shape != (num_prompts, size, size):
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and products {tuple(products.shape)} must be (n, G) "
            f"and (n, G, G), with G at least {_MIN_GROUP_SIZE}"
        )
    r, gram = rewards.double(), products.double()
    if not bool(r.isfinite().all() and gram.isfinite().all()):
        raise ValueError("a reward or a product is not finite; leave the prompt out")
    r = r - r.mean(dim=1, keepdim=True)  # k does not change, and an offset costs no digits
    own = gram.diagonal(dim1=1, dim2=2)
    distance = own.unsqueeze(2) + own.unsqueeze(1) - 2 * gram
    same = ((r.unsqueeze(2) - r.unsqueeze(1)).square() * distance).sum((1, 2)) / 4
    # sum_j k_ij = (G r_i s_i - r_i sum_j s_j + sum_j r_j s_j) / 2, as weights of s; sum_j r_j = 0.
    weights = (size * torch.diag_embed(r) - r.unsqueeze(2) + r.unsqueeze(1)) / 2
    by_first = (weights @ gram * weights).sum((1, 2))
    total = weights.sum(1, keepdim=True)
    everything = (total @ gram @ total.mT)[:, 0, 0]
    one_common = by_first - same
    none_common = everything - 4 * one_common - 2 * same
    pairs = size * (size - 1)
    return torch.stack(
        [
            none_common / (pairs * (size - 2) * (size - 3)),
            one_common / (pairs * (size - 2)),
            same / pairs,
        ],
        dim=1,
    )


def allocation(
    moments: Tensor,
    blocks: Tensor,
    pairs: PairSums,
    *,
    group_size: int,
    group_sizes: Sequence[int] = GROUP_SIZES,
    level: float = 0.9,
) -> Allocation:
    """Split the noise of the gradient, and predict it at other group sizes.

    a = E|mu_p|^2 - |mu|^2
    noise(G) = a G + b1 + b2 / (G - 1),    G* = 1 + sqrt(b2 / a)

    Source: own; see the head of this module. The intervals are a jackknife over blocks of prompts,
    of log noise(G), and for G* of a / b2.

    Args:
        moments: (n, 3) of the prompts, from `completion_moments`.
        blocks: (n,) int64, the block that the prompt is in among those of `pairs`.
        pairs: of the same prompts; the first arm is the mean over completions of the reward less
            the siblings' mean, times s_i.
        group_size: of the run, for the relative noise, >= 2.
        group_sizes: to predict for, >= 2.
        level: of the intervals, (0, 1).

    Returns:
        The estimates.

    Raises:
        ValueError: shapes that differ, other prompts than those of `pairs`, a size below 2, or a
            level out of range.
    """
    check_level(level)
    if min(group_size, *group_sizes) < 2:
        raise ValueError("a group size is below 2: a completion alone has no siblings")
    between, completion, noise = _components(moments, blocks, pairs)

    def interval(values: Tensor) -> Interval:
        return jackknife_interval(values[0], values[1:], level=level)

    def of_size(size: int) -> Tensor:
        return between * size + completion + noise / (size - 1)

    def positive(values: Tensor) -> Interval:
        low, high = torch.tensor(interval(values.log()), dtype=torch.float64).exp().tolist()
        return Interval(low, high)

    def best(ratio: float) -> float:
        return max(2.0, 1 + ratio**-0.5) if ratio > 0 else math.inf

    is_noisy = interval(noise).low > 0
    ratio = between / noise
    low, high = interval(ratio)
    predicted = {}
    for size in group_sizes:
        values, relative = of_size(size), of_size(size) / of_size(group_size)
        predicted[size] = GroupNoise(
            float(values[0]), positive(values), float(relative[0]), positive(relative)
        )
    return Allocation(
        between=float(between[0]),
        between_interval=interval(between),
        noise=float(noise[0]),
        noise_interval=interval(noise),
        completion_noise=float(completion[0]),
        best_group_size=best(float(ratio[0])) if is_noisy else math.nan,
        best_interval=Interval(best(high), best(low)) if is_noisy else Interval(2.0, math.inf),
        predicted=predicted,
        num_prompts=len(moments),
    )


def _components(moments: Tensor, blocks: Tensor, pairs: PairSums) -> tuple[Tensor, Tensor, Tensor]:
    """a, b1 and b2, (1 + K,) each: of all prompts, and without one block each."""
    if moments.shape != (len(blocks), 3):
        raise ValueError(f"moments {tuple(moments.shape)} must be (n, 3), n = {len(blocks)}")
    num_blocks = len(pairs.num_prompts)
    count = torch.bincount(blocks, minlength=num_blocks)
    if not torch.equal(count.double(), pairs.num_prompts):
        raise ValueError("the prompts of moments and of pairs are not the same, block by block")
    used = pairs.num_prompts > 0
    sums = moments.new_zeros(num_blocks, 3).index_add(0, blocks, moments)
    left_out = torch.cat([sums.sum(0)[None], (sums.sum(0) - sums)[used]])
    counts = torch.cat([count.sum()[None], (count.sum() - count)[used]])
    square, one_common, same = (left_out / counts.unsqueeze(1)).unbind(1)
    completion = 4 * (one_common - square)
    noise = 2 * (same - square) - completion
    signal = without_each_block(pairs.norm[0], used) / without_each_block(pairs.num_norm, used)
    return square - signal, completion, noise
