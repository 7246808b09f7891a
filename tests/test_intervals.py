"""Confidence intervals against closed forms, tables, and their own definition by enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_grpo.intervals import (
    binomial_interval,
    clustered_share_interval,
    jackknife_interval,
    student_quantile,
)


def tail(n: int, p: float, counts: range) -> float:
    return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in counts)


def test_clopper_pearson_where_it_has_a_closed_form():
    # P(X <= 0 | p) = (1 - p)^n and P(X >= n | p) = p^n.
    assert binomial_interval(0, 10, level=0.95).low == 0.0
    assert binomial_interval(0, 10, level=0.95).high == pytest.approx(1 - 0.025**0.1, rel=1e-12)
    assert binomial_interval(10, 10, level=0.95).low == pytest.approx(0.025**0.1, rel=1e-12)
    assert binomial_interval(10, 10, level=0.95).high == 1.0
    assert binomial_interval(1, 1) == pytest.approx((0.05, 1.0), rel=1e-12)
    assert binomial_interval(0, 0) == (0.0, 1.0)


def test_clopper_pearson_as_tables_have_it():
    assert binomial_interval(5, 10, level=0.95) == pytest.approx((0.1871, 0.8129), abs=5e-5)
    assert binomial_interval(3, 20, level=0.95) == pytest.approx((0.0321, 0.3789), abs=5e-5)
    assert binomial_interval(1, 20, level=0.9) == pytest.approx((0.0026, 0.2161), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(1, 7), (6, 7), (30, 64), (200, 1000)])
def test_the_ends_leave_half_of_the_rest_in_each_tail(k, n):
    low, high = binomial_interval(k, n, level=0.9)
    assert tail(n, low, range(k, n + 1)) == pytest.approx(0.05, rel=1e-9)
    assert tail(n, high, range(k + 1)) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize("level", [0.8, 0.9, 0.99])
def test_the_binomial_interval_covers_at_least_as_often_as_it_says(level):
    n = 12
    intervals = [binomial_interval(k, n, level=level) for k in range(n + 1)]
    coverage = []
    for step in range(1, 100):
        p = step / 100
        hits = [k for k, (low, high) in enumerate(intervals) if low <= p <= high]
        coverage.append(math.fsum(tail(n, p, range(k, k + 1)) for k in hits))
    assert min(coverage) >= level
    assert sum(coverage) / len(coverage) < level + 0.13  # and does not cover everything


def test_many_trials_cost_no_digits():
    low, high = binomial_interval(50_000, 100_000)
    width = 1.6448536 * math.sqrt(0.25 / 100_000)
    assert (low, high) == pytest.approx((0.5 - width, 0.5 + width), abs=1e-5)
    assert binomial_interval(0, 10**6).high == pytest.approx(-math.expm1(math.log(0.05) / 1e6))


def test_impossible_counts_and_levels_are_refused():
    for k, n in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"{k} successes in {n} trials"):
            binomial_interval(k, n)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="level is"):
            binomial_interval(1, 2, level=level)
        with pytest.raises(ValueError, match="level is"):
            jackknife_interval(torch.tensor(1.0), torch.ones(4), level=level)


def share_interval(counts, sizes, **options):
    return clustered_share_interval(torch.tensor(counts), torch.tensor(sizes), **options)


def test_the_interval_of_a_share_over_groups_by_hand():
    # Five groups of 4 with 1, 1, 2, 4 and 2: share 1/2. With the padding 5.5 groups, share 1/2,
    # squares (1/4)^2 + (1/4)^2 + 0 + (1/2)^2 + 0 + 2 * 1/4 * 1/4 = 1/2, variance 1/2 / 4.5 / 5.5.
    n = 0.25 * 4.5 * 5.5 / 0.5
    t = 2.1318
    half = t * math.sqrt(0.25 / n + t * t / (4 * n * n)) / (1 + t * t / n)
    found = share_interval([1.0, 1, 2, 4, 2], [4.0, 4, 4, 4, 4], level=0.9)
    assert found == pytest.approx((0.5 - half, 0.5 + half), abs=1e-3)
    # What counts is the part of the total, not the unit, and groups without a size do not.
    scaled = share_interval([10.0, 10, 0, 20, 40, 20], [40.0, 40, 0, 40, 40, 40], level=0.9)
    assert scaled == pytest.approx(found, rel=1e-12)


def test_groups_that_are_alike_inside_say_as_much_as_one_row_each():
    rows = share_interval([1.0] * 12 + [0.0] * 28, [1.0] * 40)
    groups = share_interval([8.0] * 12 + [0.0] * 28, [8.0] * 40)
    assert groups == pytest.approx(rows, rel=1e-12)
    low, high = binomial_interval(12, 40)
    assert low < groups.low < low + 0.03 and high - 0.03 < groups.high < high
    mixed = share_interval([2.0, 3] * 20, [8.0] * 40)  # alike among groups: much is known
    assert mixed.high - mixed.low < 0.05


def test_a_share_of_none_or_all_is_not_certain():
    low, high = share_interval([0.0] * 40, [3.0] * 40, level=0.95)
    assert low == 0.0 and 0.04 < high < 0.11
    low, high = share_interval([3.0] * 40, [3.0] * 40, level=0.95)
    assert 0.89 < low < 0.96 and high == 1.0
    # Hardly anything in one group must not look like certainty about all others.
    assert share_interval([0.01] + [0.0] * 39, [1.0] * 40, level=0.95).high > 0.03
    for counts, sizes in (([], []), ([1.0, 0.0], [2.0, 2.0]), ([1.0, 0, 0], [1.0, 2, 0])):
        assert share_interval(counts, sizes) == (0.0, 1.0)


@pytest.mark.parametrize("concentration", [0.5, 4.0])
def test_the_interval_of_a_share_covers_it_as_often_as_it_says(concentration):
    torch.manual_seed(6)
    sizes = torch.tensor([2, 4, 6, 8] * 8).double()
    law = torch.distributions.Beta(concentration, 3 * concentration)
    hits = 0
    for _ in range(1000):
        counts = torch.binomial(sizes, law.sample((32,)).double())
        low, high = clustered_share_interval(counts, sizes, level=0.95)
        hits += low <= 0.25 <= high
    assert 0.93 <= hits / 1000 <= 0.97


def test_counts_beyond_their_sizes_are_refused():
    for counts, sizes in (
        ([2.0], [1.0]),
        ([-1.0], [1.0]),
        ([1.0, 1.0], [1.0]),
        ([math.nan], [1.0]),
    ):
        with pytest.raises(ValueError, match="counts must be"):
            share_interval(counts, sizes)
    with pytest.raises(ValueError, match="level is"):
        share_interval([0.0], [1.0], level=1.0)


def test_quantiles_of_student_as_tables_have_them():
    table = {7: 1.89458, 10: 1.81246, 30: 1.69726, 1000: 1.64638}
    for num_free, quantile in table.items():
        assert student_quantile(0.95, num_free) == pytest.approx(quantile, abs=3e-4)
    assert student_quantile(0.95, 4) == pytest.approx(2.13185, rel=1e-3)
    assert student_quantile(0.95, 2) == pytest.approx(2.91999, rel=0.015)
    assert student_quantile(0.975, 20) == pytest.approx(2.08596, abs=2e-5)
    assert student_quantile(0.5, 3) == 0.0


def test_the_jackknife_of_a_mean_is_its_usual_interval():
    x = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0], dtype=torch.float64)
    interval = jackknife_interval(x.mean(), (x.sum() - x) / 4, level=0.9)
    # mean 4, sample std sqrt(7.5), t of 4 degrees of freedom 2.1318
    half_width = 2.1318 * math.sqrt(7.5 / 5)
    assert interval == pytest.approx((4 - half_width, 4 + half_width), abs=4e-3)
    wider = jackknife_interval(x.mean(), (x.sum() - x) / 4, level=0.95)
    assert wider.high - 4 == pytest.approx(2.7764 * math.sqrt(7.5 / 5), rel=5e-3)


def test_what_is_not_known_is_unbounded():
    everything = (-math.inf, math.inf)
    assert jackknife_interval(torch.tensor(1.0), torch.tensor([1.0, 2.0])) == everything
    assert jackknife_interval(torch.tensor(1.0), torch.zeros(0)) == everything
    for bad in (math.nan, math.inf):
        assert jackknife_interval(torch.tensor(1.0), torch.tensor([1, 2, bad, 3])) == everything
        assert jackknife_interval(torch.tensor(bad), torch.tensor([1.0, 2, 3])) == everything
    assert jackknife_interval(torch.tensor(2.0), torch.tensor([2.0, 2, 2])) == (2.0, 2.0)
