"""Dead groups, variance components and baseline errors: by hand, by loops, and by enumeration."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from lightning_grpo.separability import (
    baseline_errors,
    break_even_explained_var,
    break_even_mse,
    dead_groups,
    largest_gain,
    reward_variance,
)

NAN = math.nan
# Groups of 4, 1, 2, 3 and 2 rows, in no order, with two rows that are not scored.
RAGGED_IDS = [7, 3, 7, -1, 7, 40, 40, 7, 40, -1, 3, 5, 5, 3]
RAGGED = [0.3, NAN, 1.7, 2.0, -0.4, 5.0, 3.5, 0.9, 6.1, 2.25, 1.0, 0.5, -2.0, NAN]


def call(function, rewards, group_ids, *args, **options):
    """A statistic of float64 rewards given as lists."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return function(rewards, torch.tensor(group_ids), *args, **options)


def groups_of(rewards, group_ids):
    """The scored rewards of each group."""
    groups = {}
    for r, g in zip(rewards, group_ids):
        if not math.isnan(r):
            groups.setdefault(g, []).append(r)
    return list(groups.values())


def numbers(record):
    """All numbers of a record in one list."""
    values = []
    for value in vars(record).values():
        values += list(value) if isinstance(value, tuple) else [] if value is None else [value]
    return values


# Dead groups


def test_dead_groups_are_those_without_spread_among_those_with_siblings():
    rewards = [1, 1, 1, 0, 0.1, 0.1 + 1e-9, NAN, 5, 3, NAN, NAN, 2, 2, 2]
    ids = [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 6]
    found = call(dead_groups, rewards, ids)
    # Equal: 0, 2 (noise), 6. Different: 1, 3. Not counted: 4 (unscored) and 5 (alone).
    assert (found.num_dead, found.num_groups, found.share) == (3, 5, 0.6)
    assert found.interval == pytest.approx((0.1893, 0.9236), abs=5e-5)
    assert call(dead_groups, rewards, ids, level=0.5).interval.low > 0.25


def test_nothing_is_known_of_dead_groups_without_siblings():
    for rewards, ids in (([], []), ([1.0, 2.0, NAN], [0, 1, 1])):
        found = call(dead_groups, rewards, [int(i) for i in ids] or torch.zeros(0).long().tolist())
        assert (found.num_dead, found.num_groups, found.interval) == (0, 0, (0.0, 1.0))
        assert math.isnan(found.share)


# Variance


def test_variance_components_by_hand():
    # Group means 1 and 5, each with deviations -1 and 1; mean square between 2 * (4 + 4) = 16.
    found = call(reward_variance, [0, 2, 4, 6], [0, 0, 1, 1])
    assert (found.within, found.between, found.group_size) == (2.0, 7.0, 2.0)
    assert found.icc == pytest.approx(7 / 9, rel=1e-15)
    assert found.between_unclamped == 7.0
    assert (found.num_groups, found.interval) == (2, (0.0, 1.0))


def test_prompts_that_differ_less_than_chance_have_no_variance_between():
    found = call(reward_variance, [0, 2, 2, 0], [0, 0, 1, 1])
    assert (found.within, found.between, found.between_unclamped) == (2.0, 0.0, -1.0)
    assert found.icc == 0.0


def anova(groups):
    """The same estimates from the definition, with the statistics module."""
    rows = [r for group in groups for r in group]
    mean, num_rows, num_groups = statistics.fmean(rows), len(rows), len(groups)
    ss_within = sum((r - statistics.fmean(g)) ** 2 for g in groups for r in g)
    within = ss_within / (num_rows - num_groups)
    ss_between = sum(len(g) * (statistics.fmean(g) - mean) ** 2 for g in groups)
    group_size = (num_rows - sum(len(g) ** 2 for g in groups) / num_rows) / (num_groups - 1)
    between = (ss_between / (num_groups - 1) - within) / group_size
    return within, between, group_size


def t_interval(estimate, left_out, quantile):
    mean, k = statistics.fmean(left_out), len(left_out)
    half = quantile * math.sqrt((k - 1) / k * sum((x - mean) ** 2 for x in left_out))
    return estimate - half, estimate + half


def test_ragged_groups_in_any_order_match_the_definition():
    groups = groups_of(RAGGED, RAGGED_IDS)
    assert sorted(map(len, groups)) == [1, 2, 2, 3, 4]
    within, between, group_size = anova(groups)
    found = call(reward_variance, RAGGED, RAGGED_IDS)
    assert found.within == pytest.approx(within, rel=1e-13)
    assert found.between == found.between_unclamped == pytest.approx(between, rel=1e-13)
    assert found.group_size == pytest.approx(group_size, rel=1e-14)
    assert found.icc == pytest.approx(between / (between + within), rel=1e-13)
    assert found.num_groups == 5

    left_out = [anova(groups[:g] + groups[g + 1 :]) for g in range(5)]
    logs = [math.log(1 + group_size * b / w) for w, b, _ in left_out]
    ends = t_interval(math.log(1 + group_size * between / within), logs, 2.1318)
    gammas = [max(math.exp(end) - 1, 0) / group_size for end in ends]
    assert found.interval == pytest.approx([g / (1 + g) for g in gammas], abs=2e-4)
    assert call(reward_variance, RAGGED, RAGGED_IDS, level=0.5).interval.low > found.interval.low


def test_the_variances_add_up_in_expectation_over_all_outcomes():
    # Each prompt solves with probability 1/4 or 3/4; every reward of 2 x 2 rows enumerated.
    total_within = total_between = 0.0
    for chances in itertools.product((0.25, 0.75), repeat=2):
        for rewards in itertools.product((0.0, 1.0), repeat=4):
            weight = 0.25
            for row, r in enumerate(rewards):
                p = chances[row // 2]
                weight *= p if r else 1 - p
            found = call(reward_variance, rewards, [0, 0, 1, 1])
            total_within += weight * found.within
            total_between += weight * found.between_unclamped
    # E p (1 - p) = 3/16, Var p = 1/16
    assert total_within == pytest.approx(3 / 16, rel=1e-13)
    assert total_between == pytest.approx(1 / 16, rel=1e-12)


def test_equal_rewards_have_exactly_no_variance_and_no_icc():
    for reward in (0.0, 0.1, 1e6 / 3):
        found = call(reward_variance, [reward] * 9, [0, 0, 0, 1, 1, 1, 2, 2, 2])
        assert (found.within, found.between) == (0.0, 0.0)
        assert math.isnan(found.icc) and found.interval == (0.0, 1.0)


def test_dead_groups_of_different_rewards_are_all_between():
    found = call(reward_variance, [1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    assert (found.within, found.icc, found.interval) == (0.0, 1.0, (0.0, 1.0))
    # One group with spread is not enough to say how much there is.
    found = call(reward_variance, [1, 1, 0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3])
    assert found.interval == (0.0, 1.0)


def test_too_few_rows_leave_the_variance_undefined():
    alone = call(reward_variance, [1.0, 2.0, 4.0], [0, 1, 2])
    assert math.isnan(alone.within) and math.isnan(alone.icc) and alone.interval == (0.0, 1.0)
    one = call(reward_variance, [1.0, 2.0, 6.0], [4, 4, 4])
    assert one.within == pytest.approx(7.0) and one.num_groups == 1
    assert math.isnan(one.between) and math.isnan(one.icc) and one.interval == (0.0, 1.0)
    none = reward_variance(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert math.isnan(none.within) and none.num_groups == 0 and none.interval == (0.0, 1.0)


# Baselines


def test_baseline_errors_by_hand():
    values = torch.tensor([1.0, 1.0, 1.0, 9.0, 4.0, 4.0])
    found = call(baseline_errors, [1, 2, 4, 7, 3, 6], [0, 0, 0, 1, 2, 2], values)
    # The row alone in group 1 counts in neither. Residuals: -2, -0.5, 2.5, -3, 3 and 0, 1, 3, -1, 2.
    assert found.siblings == pytest.approx((4 + 0.25 + 6.25 + 9 + 9) / 5, rel=1e-15)
    assert found.critic == pytest.approx(15 / 5, rel=1e-15)
    assert found.ratio == pytest.approx(15 / 28.5, rel=1e-15)
    assert found.num_rows == 5
    # Mean of 1, 2, 4, 3, 6 is 3.2, mean square 13.2.
    assert found.explained_var == pytest.approx(1 - 3 / (13.2 - 3.2**2), rel=1e-13)
    assert found.interval == (0.0, math.inf)  # two groups


def test_baseline_errors_of_ragged_groups_match_the_definition():
    values = [0.5 * g + 0.1 for g in range(len(RAGGED))]
    values[1] = NAN  # of a row that is not scored
    found = call(baseline_errors, RAGGED, RAGGED_IDS, torch.tensor(values, dtype=torch.float64))
    sums, kept = {}, []
    for i, (r, g) in enumerate(zip(RAGGED, RAGGED_IDS)):
        others = [
            s
            for j, (s, h) in enumerate(zip(RAGGED, RAGGED_IDS))
            if h == g and j != i and not math.isnan(s)
        ]
        if math.isnan(r) or not others:
            continue
        kept.append(r)
        pair = sums.setdefault(g, [0.0, 0.0])
        pair[0] += (r - values[i]) ** 2
        pair[1] += (r - statistics.fmean(others)) ** 2
    critic = sum(pair[0] for pair in sums.values())
    siblings = sum(pair[1] for pair in sums.values())
    assert found.num_rows == len(kept) == 11
    assert found.siblings == pytest.approx(siblings / 11, rel=1e-13)
    assert found.critic == pytest.approx(critic / 11, rel=1e-13)
    assert found.ratio == pytest.approx(critic / siblings, rel=1e-13)
    assert found.explained_var == pytest.approx(1 - critic / 11 / statistics.pvariance(kept))
    logs = [math.log((critic - c) / (siblings - s)) for c, s in sums.values()]
    ends = t_interval(math.log(critic / siblings), logs, 2.3534)
    assert found.interval == pytest.approx([math.exp(end) for end in ends], rel=5e-3)


def test_without_a_critic_the_siblings_are_measured_alone():
    found = call(baseline_errors, [1, 2, 4], [0, 0, 0])
    assert found.siblings == pytest.approx(10.5 / 3)
    assert found.critic is found.ratio is found.interval is found.explained_var is None
    for rewards, ids in (([], []), ([1.0, NAN], [0, 0])):
        empty = baseline_errors(
            torch.tensor(rewards), torch.tensor(ids).long(), torch.ones(len(ids))
        )
        assert math.isnan(empty.siblings) and math.isnan(empty.ratio) and empty.num_rows == 0
        assert empty.interval == (0.0, math.inf) and math.isnan(empty.explained_var)


def test_a_critic_on_dead_groups_has_no_ratio_to_speak_of():
    found = call(baseline_errors, [1.0, 1.0], [0, 0], torch.tensor([0.5, 0.5]))
    assert (found.siblings, found.ratio, found.interval) == (0.0, math.inf, (0.0, math.inf))
    assert found.explained_var == -math.inf


def test_a_value_that_is_missing_or_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"prompt_values \(1,\).*\(2,\)"):
        call(baseline_errors, [1, 0], [0, 0], torch.ones(1))
    for value in (NAN, math.inf):
        with pytest.raises(ValueError, match="prompt_values has a value that is not finite"):
            call(baseline_errors, [1, 0], [0, 0], torch.tensor([1.0, value]))


# The break-even


@pytest.mark.parametrize("group_size", [2, 3, 4])
@pytest.mark.parametrize("value", [0.25, 0.4, 0.9])
def test_the_residual_variances_are_those_that_the_break_even_rests_on(group_size, value):
    # Exactly, over all outcomes of a prompt that is solved with probability 1/4.
    p, siblings, critic = 0.25, 0.0, 0.0
    for rewards in itertools.product((0.0, 1.0), repeat=group_size):
        weight = math.prod(p if r else 1 - p for r in rewards)
        values = torch.full((group_size,), value, dtype=torch.float64)
        found = call(baseline_errors, rewards, [0] * group_size, values)
        siblings += weight * found.siblings
        critic += weight * found.critic
    within = p * (1 - p)
    assert siblings == pytest.approx(within * group_size / (group_size - 1), rel=1e-13)
    assert critic == pytest.approx(within + (value - p) ** 2, rel=1e-13)
    assert siblings / within == pytest.approx(largest_gain(group_size), rel=1e-13)
    is_below = (value - p) ** 2 < break_even_mse(within, group_size)
    assert is_below == (critic < siblings)


@pytest.mark.parametrize("group_size", [2, 4, 8, 3.7])
@pytest.mark.parametrize(("within", "between"), [(0.1, 0.3), (2.0, 0.5), (1.0, 0.0)])
def test_both_break_evens_are_the_same_condition(group_size, within, between):
    icc = between / (between + within)
    for factor in (0.0, 0.5, 0.99, 1.01, 3.0):
        mse = factor * break_even_mse(within, group_size)
        explained_var = 1 - (within + mse) / (within + between)
        assert (explained_var > break_even_explained_var(icc, group_size)) == (factor < 1)
    at = 1 - (within + break_even_mse(within, group_size)) / (within + between)
    assert at == pytest.approx(break_even_explained_var(icc, group_size), abs=1e-14)


def test_break_evens_by_hand():
    assert break_even_mse(0.21, 8) == pytest.approx(0.03)
    assert break_even_explained_var(0.5, 5) == pytest.approx(0.375)
    assert break_even_explained_var(0.0, 2) == -1.0
    assert (largest_gain(2), largest_gain(8)) == (2.0, 8 / 7)
    for function in (lambda g: break_even_mse(1.0, g), largest_gain):
        for group_size in (1, 0.5, NAN):
            with pytest.raises(ValueError, match="group_size is"):
                function(group_size)
    with pytest.raises(ValueError, match="group_size is 1"):
        break_even_explained_var(0.5, 1)


# Invariances, shared by all


def all_numbers(rewards, group_ids, values):
    return (
        numbers(dead_groups(rewards, group_ids)),
        numbers(reward_variance(rewards, group_ids)),
        numbers(baseline_errors(rewards, group_ids, values)),
    )


def example(seed=0, num_groups=12, group_size=4):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(num_groups, generator=generator, dtype=torch.float64)
    rewards = means.repeat_interleave(group_size)
    rewards = rewards + torch.randn(len(rewards), generator=generator, dtype=torch.float64)
    rewards[:group_size] = 1.5
    rewards[[5, 17, 30]] = NAN
    values = means.repeat_interleave(group_size) * 0.8 + 0.1
    return rewards, torch.arange(num_groups).repeat_interleave(group_size), values


def test_the_order_of_the_rows_does_not_matter():
    rewards, ids, values = example()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    straight = all_numbers(rewards, ids, values)
    shuffled = all_numbers(rewards[order], 100 - ids[order], values[order])
    for found, expected in zip(shuffled, straight):
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1e5), (3.0, -7.0), (1e-3, 1.0), (-2.0, 0.0)])
def test_ratios_are_blind_to_offset_and_scale_and_variances_to_the_offset(scale, offset):
    rewards, ids, values = example()
    plain = reward_variance(rewards, ids), baseline_errors(rewards, ids, values)
    moved_rewards, moved_values = rewards * scale + offset, values * scale + offset
    moved = reward_variance(moved_rewards, ids), baseline_errors(moved_rewards, ids, moved_values)
    # Around an offset of 1e5 the rewards themselves keep 11 digits.
    for name in ("within", "between", "between_unclamped"):
        expected = getattr(plain[0], name) * scale**2
        assert getattr(moved[0], name) == pytest.approx(expected, rel=1e-9)
    for name in ("icc", "group_size", "interval"):
        assert getattr(moved[0], name) == pytest.approx(getattr(plain[0], name), rel=1e-9)
    for name in ("siblings", "critic"):
        expected = getattr(plain[1], name) * scale**2
        assert getattr(moved[1], name) == pytest.approx(expected, rel=1e-9)
    for name in ("ratio", "interval", "explained_var"):
        assert getattr(moved[1], name) == pytest.approx(getattr(plain[1], name), rel=1e-9)
    assert dead_groups(moved_rewards, ids) == dead_groups(rewards, ids)


def test_a_large_offset_costs_the_variance_no_digits():
    # Exact in float64: multiples of 1/4 above 1e9.
    rewards = torch.tensor([0.25, 1, 0.5, 3, 2.5, 4, 0, 0.75, 1.25], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    near, far = reward_variance(rewards, ids), reward_variance(rewards + 1e9, ids)
    assert far == near
    siblings = baseline_errors(rewards + 1e9, ids).siblings
    assert siblings == pytest.approx(baseline_errors(rewards, ids).siblings, rel=1e-6)


def test_an_unscored_row_is_as_if_it_was_not_there():
    rewards, ids, values = example()
    kept = ~rewards.isnan()
    assert all_numbers(rewards, ids, values) == all_numbers(rewards[kept], ids[kept], values[kept])


def test_float32_rewards_are_computed_with_in_float64():
    rewards = torch.tensor([1e4, 1e4 + 1, 1e4 + 3, 1e4 + 2])
    found = reward_variance(rewards, torch.tensor([0, 0, 1, 1]))
    assert (found.within, found.between_unclamped) == (0.5, 1.75)
    assert baseline_errors(rewards, torch.tensor([0, 0, 1, 1])).siblings == 1.0
    critic = baseline_errors(
        rewards, torch.tensor([0, 0, 1, 1]), torch.tensor([1e4, 1e4, 0.0, 0.0])
    )
    assert critic.critic == pytest.approx((1 + 10003.0**2 + 10002.0**2) / 4, rel=1e-15)


def test_bad_rewards_levels_and_shapes_are_refused():
    for function in (dead_groups, reward_variance, baseline_errors):
        with pytest.raises(ValueError, match="row 1 is infinite"):
            call(function, [1.0, math.inf], [0, 0])
        with pytest.raises(ValueError, match="level is"):
            call(function, [1.0, 0.0], [0, 0], level=1.0)
        with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
            function(torch.ones(2), torch.zeros(1, dtype=torch.long))


# Coverage of the jackknife, with fixed seeds


def coverage(intervals, truth):
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


@pytest.mark.parametrize(("group_size", "num_groups"), [(4, 16), (8, 8)])
@pytest.mark.parametrize("icc", [0.0, 0.3, 0.8])
def test_the_interval_of_the_icc_covers_it_as_often_as_it_says(icc, group_size, num_groups):
    generator = torch.Generator().manual_seed(5)
    ids = torch.arange(num_groups).repeat_interleave(group_size)
    intervals = []
    for _ in range(300):
        means = torch.randn(num_groups, generator=generator, dtype=torch.float64) * math.sqrt(icc)
        noise = torch.randn(len(ids), generator=generator, dtype=torch.float64)
        intervals.append(reward_variance(means[ids] + noise * math.sqrt(1 - icc), ids).interval)
    # 300 draws at 0.9 have a standard error of 0.017.
    assert 0.855 <= coverage(intervals, icc) <= (1.0 if icc == 0 else 0.945)


@pytest.mark.parametrize("concentration", [0.25, 1.0])
def test_the_interval_of_the_icc_holds_for_rewards_of_zero_and_one(concentration):
    # p ~ Beta(a, a): within a / (4 a + 2), total 1/4.
    torch.manual_seed(3)
    ids = torch.arange(24).repeat_interleave(6)
    chances = torch.distributions.Beta(concentration, concentration)
    intervals = []
    for _ in range(300):
        p = chances.sample((24,))[ids]
        intervals.append(reward_variance((torch.rand(len(ids)) < p).double(), ids).interval)
    assert coverage(intervals, 1 / (2 * concentration + 1)) >= 0.87
    assert statistics.fmean(high - low for low, high in intervals) < 0.5


def test_the_interval_of_the_ratio_covers_it_as_often_as_it_says():
    generator = torch.Generator().manual_seed(7)
    ids = torch.arange(20).repeat_interleave(4)
    intervals = []
    for _ in range(300):
        means = torch.randn(20, generator=generator, dtype=torch.float64)
        values = means + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)
        rewards = means[ids] + torch.randn(80, generator=generator, dtype=torch.float64)
        intervals.append(baseline_errors(rewards, ids, values[ids]).interval)
    # (1 + 0.25) / (4 / 3)
    assert 0.855 <= coverage(intervals, 1.25 * 3 / 4) <= 0.945
