"""How well an algorithm's gradient points where the reward rises: bias and noise in one number.

With mu the true gradient, and g that of an arm for a batch of N prompts,

    Q = <E g, mu>^2 / (|mu|^2 E|g|^2)

is the squared cosine between g and mu, 0 to 1. Where the reward bends alike in all directions, the
step along g of the best length gains on average Q times what the best step along mu does. The
scale of g does not matter. Prompt i adds x_i to g = sum_i x_i / N; the x_i are independent with
mean m, so that

    E|g|^2 = E|x|^2 / N + (1 - 1 / N) |m|^2

From n measured prompts, with h_i the gradient from leave-one-out advantages, E h_i = mu, and with
sums over the pairs of different prompts that `gradient_sums` admits, all without bias,

    <m, mu>   sum <x_i, h_j> / number of pairs
    |mu|^2    sum <h_i, h_j> / number of pairs
    |m|^2     sum <x_i, x_j> / number of pairs
    E|x|^2    sum_i |x_i|^2 / n

Over a window of iterations g is their sum, with what a critic gets wrong time and again: N is then
the number of prompts in the window. Where the denominator of a loss varies from batch to batch, as
with the reduction `token`, it counts as a constant.

What looks like a measure and is none. The agreement of two halves of a batch is about |m|^2 /
E|g|^2 and knows no mu: it rewards a gradient for being sure, right or wrong. A critic that was
fitted on the same prompts knows their noise. Advantages divided by a standard deviation weigh
prompts by something else than what there is to gain: their mean is not mu.

The estimates are conditional: they exist where |mu|^2 is above zero with confidence. Where that is
rarely so, those draws in which it is are the ones that overstate Q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_grpo.gradient_sums import PairSums, without_each_block
from lightning_grpo.intervals import Interval, check_level, jackknife_interval

_ANYTHING = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class ArmQuality:
    """Q of one arm, and what it is made of."""

    quality: float
    """Q, 0 to 1; 0 for a gradient that points away from mu."""
    interval: Interval
    """Of Q."""
    alignment: float
    """<m, mu>, in the units of the arm's gradient times those of mu."""
    mean_square: float
    """E|g|^2 of a batch, in squared units of the arm's gradient."""


@dataclass(frozen=True)
class GradientQuality:
    """Q of each arm; without arms, where the true gradient could not be told from noise."""

    num_prompts: int
    """n, measured."""
    num_batch_prompts: float
    """N, of the batch that Q is for."""
    signal: float
    """|mu|^2; without bias, so it may be negative by chance."""
    signal_interval: Interval
    """Of |mu|^2."""
    arms: dict[str, ArmQuality]
    """By the names of the arms; empty when the signal is not measurable."""
    reason: str
    """Why there are no arms; empty when there are."""


@dataclass(frozen=True)
class QualityRatio:
    """How much better one arm's gradient is than another's, as a logarithm."""

    log_ratio: float
    """log(Q of the arm / Q of the reference); NaN where it cannot be measured."""
    interval: Interval
    """Of the log of the ratio; everything where it cannot be measured."""
    reason: str
    """Why it cannot be measured; empty when it can."""


@dataclass(frozen=True)
class _Moments:
    """Estimates from all blocks, and without one block each: the last dimension is 1 + K."""

    signal: Tensor
    """(1 + K,)"""
    alignment: Tensor
    """(A, 1 + K)"""
    mean_square: Tensor
    """(A, 1 + K) E|g|^2."""


def gradient_quality(
    pairs: PairSums, *, num_batch_prompts: float, level: float = 0.9
) -> GradientQuality:
    """Q of every arm.

    Q = <m, mu>^2 / (|mu|^2 (E|x|^2 / N + (1 - 1 / N) |m|^2))

    Source: own; see the head of this module. A jackknife over blocks of prompts gives the
    intervals, and takes the bias of a ratio off the cosine.

    Args:
        pairs: sums over the pairs of measured prompts, of all ranks.
        num_batch_prompts: N, prompts of the batch whose gradient is judged, > 0; infinity leaves
            the bias alone.
        level: of the intervals, (0, 1); the signal counts as measured if its interval is above 0.

    Returns:
        The estimates, or the reason why there are none.

    Raises:
        ValueError: a number of prompts or a level out of range.
    """
    moments = _moments(pairs, num_batch_prompts, level)
    reason, signal_interval = _missing_signal(pairs, moments, level)
    arms = {}
    for a, arm in enumerate(pairs.arms if not reason else ()):
        alignment, mean_square = moments.alignment[a], moments.mean_square[a]
        cosine, (low, high) = _jackknife(alignment / (moments.signal * mean_square).sqrt(), level)
        arms[arm] = ArmQuality(
            quality=math.nan if math.isnan(cosine) else _squared_cosine(cosine),
            interval=Interval(_squared_cosine(low), _squared_cosine(high)),
            alignment=float(alignment[0]),
            mean_square=float(mean_square[0]),
        )
    return GradientQuality(
        num_prompts=int(pairs.num_prompts.sum()),
        num_batch_prompts=num_batch_prompts,
        signal=float(moments.signal[0]),
        signal_interval=signal_interval,
        arms=arms,
        reason=reason,
    )


def quality_ratio(
    pairs: PairSums, arm: str, reference: str, *, num_batch_prompts: float, level: float = 0.9
) -> QualityRatio:
    """Compare the gradients of two arms, from the same prompts.

    log(Q_a / Q_b) = 2 log(<m_a, mu> / <m_b, mu>) - log(E|g_a|^2 / E|g_b|^2)

    What the noise of mu does to both arms cancels, here and in the interval, for which both are
    left without the same block of prompts.

    Source: own; a jackknife over blocks of prompts of the ratio of the cosines, which takes off its
    bias. Where an arm points away from mu the logarithm does not exist: such an end is infinite.

    Args:
        pairs: as for `gradient_quality`.
        arm: name of the arm.
        reference: name of the arm that it is compared with.
        num_batch_prompts: N, as for `gradient_quality`.
        level: of the interval, (0, 1).

    Returns:
        The ratio, or the reason why there is none.

    Raises:
        ValueError: an arm that was not measured, or a number out of range.
    """
    for name in (arm, reference):
        if name not in pairs.arms:
            raise ValueError(f"{name!r} was not measured; there are {list(pairs.arms)}")
    moments = _moments(pairs, num_batch_prompts, level)
    reason, _ = _missing_signal(pairs, moments, level)
    a, b = pairs.arms.index(arm), pairs.arms.index(reference)
    base = moments.alignment[b]
    if not reason and not jackknife_interval(base[0], base[1:], level=level).low > 0:
        reason = f"{reference} does not point along the true gradient, {_not_measurable(pairs)}"
    if reason:
        return QualityRatio(math.nan, _ANYTHING, reason)
    ratio = moments.alignment[a] / base
    ratio = ratio * (moments.mean_square[b] / moments.mean_square[a]).sqrt()
    best, (low, high) = _jackknife(ratio, level)
    if math.isnan(best):
        return QualityRatio(math.nan, _ANYTHING, f"the ratio is {_not_measurable(pairs)}")
    return QualityRatio(_log_square(best), Interval(_log_square(low), _log_square(high)), "")


def _moments(pairs: PairSums, num_batch_prompts: float, level: float) -> _Moments:
    check_level(level)
    if not num_batch_prompts > 0:
        raise ValueError(f"num_batch_prompts is {num_batch_prompts}; it must be positive")

    def mean(sums: Tensor, counts: Tensor) -> Tensor:
        used = pairs.num_prompts > 0
        return without_each_block(sums, used) / without_each_block(counts, used)

    square = mean(pairs.squares.diag_embed(), pairs.num_prompts.diag_embed())
    norm = mean(pairs.norm, pairs.num_norm)
    share = 1 / num_batch_prompts
    return _Moments(
        signal=norm[0],
        alignment=mean(pairs.alignment, pairs.num_alignment),
        mean_square=square * share + norm * (1 - share),
    )


def _jackknife(values: Tensor, level: float) -> tuple[float, Interval]:
    """A ratio without the bias of order 1 / K that ratios have, and its interval; or NaN."""
    whole, left_out = values[0], values[1:]
    num_blocks = len(left_out)
    corrected = num_blocks * whole - (num_blocks - 1) * left_out.mean()
    return float(corrected), jackknife_interval(corrected, left_out, level=level)


def _missing_signal(pairs: PairSums, moments: _Moments, level: float) -> tuple[str, Interval]:
    """Why |mu|^2 is not known to be above zero, empty if it is, and its interval."""
    interval = jackknife_interval(moments.signal[0], moments.signal[1:], level=level)
    reason = "" if interval.low > 0 else f"the true gradient is {_not_measurable(pairs)}"
    return reason, interval


def _not_measurable(pairs: PairSums) -> str:
    return f"not measurable with {int(pairs.num_prompts.sum())} prompts"


def _squared_cosine(cosine: float) -> float:
    return min(max(cosine, 0.0), 1.0) ** 2


def _log_square(ratio: float) -> float:
    """Log of the square of a ratio of cosines; -inf where it is not positive."""
    return 2 * math.log(ratio) if ratio > 0 else -math.inf
