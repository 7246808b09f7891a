"""Group advantages against hand-worked values and a plain Python formula."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from lightning_grpo.advantages import group_advantages, group_statistics, zero_std_fraction

NAN = math.nan
OPTIONS = [
    {"baseline": "group_mean", "scale": "std"},
    {"baseline": "group_mean", "scale": "none"},
    {"baseline": "leave_one_out", "scale": "std"},
    {"baseline": "leave_one_out", "scale": "none"},
]


def advantages(rewards, group_ids=None, **options):
    """Advantages of float64 rewards as a list; one group when no ids are given."""
    group_ids = [0] * len(rewards) if group_ids is None else group_ids
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return group_advantages(rewards, torch.tensor(group_ids), **options).tolist()


def test_the_paper_normalisation_with_the_sample_std():
    expected = [0.8660254, -0.8660254, -0.8660254, 0.8660254]
    assert advantages([1, 0, 0, 1]) == pytest.approx(expected, abs=1e-7)


def test_eps_is_added_to_the_std():
    # std of [1, 0, 0, 1] is sqrt(1/3)
    expected = 0.5 / (math.sqrt(1 / 3) + 0.1)
    assert advantages([1, 0, 0, 1], eps=0.1)[0] == pytest.approx(expected, rel=1e-14)
    assert advantages([1, 0, 0, 1], eps=0.0)[0] == pytest.approx(0.5 * math.sqrt(3), rel=1e-14)
    default = 0.5 / (math.sqrt(1 / 3) + 1e-8)
    assert advantages([1, 0, 0, 1])[0] == pytest.approx(default, rel=1e-12)


def test_dr_grpo_subtracts_the_mean_alone():
    assert advantages([1, 2, 6], scale="none") == pytest.approx([-2, -1, 3], abs=1e-15)


def test_leave_one_out_by_hand_in_both_forms():
    rewards = [1.0, 2.0, 4.0]
    found = advantages(rewards, baseline="leave_one_out", scale="none")
    assert found == pytest.approx([-2, -0.5, 2.5], abs=1e-15)
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        assert found[i] == pytest.approx(r - sum(others) / 2, abs=1e-15)


def test_leave_one_out_divided_by_the_std():
    found = advantages([1, 2, 4], baseline="leave_one_out", scale="std", eps=0.0)
    std = math.sqrt(7 / 3)  # deviations -4/3, -1/3, 5/3
    assert found == pytest.approx([-2 / std, -0.5 / std, 2.5 / std], rel=1e-14)


def by_loops(rewards, group_ids, baseline, scale, eps):
    """The same definition with the statistics module, one row at a time."""
    result = []
    for i, (reward, group) in enumerate(zip(rewards, group_ids)):
        scored = [r for r, g in zip(rewards, group_ids) if g == group and not math.isnan(r)]
        spread = max(scored) - min(scored) if scored else 0.0
        if math.isnan(reward) or spread <= 1e-6 * max(abs(r) for r in scored):
            result.append(0.0)
            continue
        if baseline == "leave_one_out":
            scored_others = [
                r
                for j, (r, g) in enumerate(zip(rewards, group_ids))
                if g == group and j != i and not math.isnan(r)
            ]
            value = reward - statistics.fmean(scored_others)
        else:
            value = reward - statistics.fmean(scored)
        result.append(value / (statistics.stdev(scored) + eps) if scale == "std" else value)
    return result


@pytest.mark.parametrize("options", OPTIONS)
def test_ragged_groups_in_any_order_match_plain_python(options):
    generator = torch.Generator().manual_seed(3)
    group_ids = [7, 7, 7, 7, 7, -2, -2, 40, 40, 40, 5, 9, 9, 9, 11, 11]
    rewards = torch.randn(16, generator=generator, dtype=torch.float64).mul(10).tolist()
    rewards[2] = rewards[8] = rewards[11] = rewards[12] = rewards[14] = rewards[15] = NAN
    order = torch.randperm(16, generator=generator).tolist()
    rewards, group_ids = [rewards[i] for i in order], [group_ids[i] for i in order]
    expected = by_loops(rewards, group_ids, eps=1e-3, **options)
    assert advantages(rewards, group_ids, eps=1e-3, **options) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_advantages_of_a_group_sum_to_zero(options):
    found = advantages([0.3, -1.7, 2.9, 0.1, 8.0], **options)
    assert sum(found) == pytest.approx(0, abs=1e-14)
    assert max(found) > 1


def test_the_std_makes_advantages_blind_to_shift_and_scale():
    rewards = [0.3, -1.7, 2.9, 0.1]
    plain = advantages(rewards, eps=0.0)
    moved = advantages([3.5 * r + 12 for r in rewards], eps=0.0)
    assert moved == pytest.approx(plain, abs=1e-13)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_without_the_std_advantages_are_linear_in_the_rewards(baseline):
    rewards = [0.3, -1.7, 2.9, 0.1]
    plain = advantages(rewards, baseline=baseline, scale="none")
    moved = advantages([3.5 * r + 12 for r in rewards], baseline=baseline, scale="none")
    assert moved == pytest.approx([3.5 * a for a in plain], abs=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reward", [0.0, 1.0, -3.0, 0.1, 1e6])
def test_equal_rewards_have_exactly_no_advantage(reward, options):
    assert advantages([reward] * 5, **options) == [0.0] * 5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "rewards",
    [
        [1.0, 1.0 + 6e-8, 1.0],
        [0.1, 0.1 + 2.0**-30, 0.1],
        [-1000.0, -1000.0 + 5e-4],
        [1.0, 1.0 + 9e-7],
    ],
)
def test_rounding_noise_counts_as_equal(rewards, options):
    assert advantages(rewards, **options) == [0.0] * len(rewards)


def test_a_small_but_real_spread_keeps_its_advantage():
    assert advantages([1, 1.00001], eps=1e-6) == pytest.approx([-0.6195, 0.6195], abs=1e-4)
    assert advantages([1, 1.00001]) == pytest.approx([-0.7061, 0.7061], abs=1e-4)
    # Relative to the largest reward: tiny rewards are rewards, too.
    found = advantages([0, 1e-7], eps=0.0)
    assert found == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-12)


def test_the_spread_is_relative_to_the_largest_size_not_the_largest_value():
    # Spread 1.1e-6 around -1: not noise, although the largest value is the smaller in size.
    assert advantages([-1.0, -1.0 - 1.1e-6], scale="none")[0] > 5e-7
    # Just inside one millionth of the larger size, on either side of zero.
    spread = 1e-6 + 5e-13
    assert advantages([1.0, 1.0 + spread]) == advantages([-1.0, -1.0 - spread]) == [0.0, 0.0]
    # Spread 1 around a million is noise on either side of zero.
    assert advantages([-1e6, -1e6 + 0.9]) == [0.0, 0.0]
    assert advantages([1e6, 1e6 + 0.9]) == [0.0, 0.0]


def test_a_large_offset_does_not_cost_the_variance_its_digits():
    rewards = torch.tensor([1e4, 1e4 + 0.25, 1e4 + 0.5, 1e4 + 1.25], dtype=torch.float64)
    group = group_statistics(rewards, torch.zeros(4, dtype=torch.long))
    assert group.std.tolist() == pytest.approx([math.sqrt(0.875 / 3)] * 4, rel=1e-15)
    far = group_statistics(rewards + 1e7, torch.zeros(4, dtype=torch.long))
    assert far.std.tolist() == pytest.approx([math.sqrt(0.875 / 3)] * 4, rel=1e-14)


def test_statistics_are_in_float64_whatever_the_rewards_are():
    rewards = torch.tensor([1e4, 1e4 + 1], dtype=torch.float32)
    group = group_statistics(rewards, torch.tensor([0, 0]))
    assert group.mean.dtype == group.std.dtype == group.count.dtype == torch.float64
    assert group.std.tolist() == pytest.approx([math.sqrt(0.5)] * 2, rel=1e-15)
    found = group_advantages(rewards, torch.tensor([0, 0]))
    assert found.dtype == torch.float64


def test_statistics_of_each_row_are_those_of_its_group():
    rewards = torch.tensor([1.0, 10.0, NAN, 3.0, 10.0, NAN, 5.0])
    group = group_statistics(rewards, torch.tensor([4, 8, 4, 4, 8, 1, 2]))
    assert group.mean.tolist() == [2, 10, 2, 2, 10, 0, 5]
    assert group.std.tolist() == pytest.approx(
        [math.sqrt(2), 0, math.sqrt(2), math.sqrt(2), 0, 0, 0]
    )
    assert group.count.tolist() == [2, 2, 2, 2, 2, 0, 1]
    assert group.is_equal.tolist() == [False, True, False, False, True, True, True]


def test_a_row_alone_in_its_group_has_no_advantage():
    for options in OPTIONS:
        assert advantages([3.0, NAN, NAN], **options) == [0.0, 0.0, 0.0]
        assert advantages([3.0, 1.0, 2.0], [0, 1, 2], **options) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_unscored_row_is_as_if_it_was_not_there(options):
    without = advantages([1, 0, 0.5, 0.25], **options)
    found = advantages([1, NAN, 0, 0.5, 0.25], **options)
    assert found == [without[0], 0.0, without[1], without[2], without[3]]


def test_zero_is_a_score_and_not_a_missing_one():
    assert advantages([1, 0], eps=0.0) == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert advantages([1, 0, NAN], scale="none") == [0.5, -0.5, 0.0]
    assert advantages([2, 2, 0], scale="none") == pytest.approx([2 / 3, 2 / 3, -4 / 3])


def test_the_same_prompt_twice_is_two_groups():
    rewards = [1, 1, 1, 1, 0, 0, 0, 0]
    assert advantages(rewards, [0, 0, 0, 0, 1, 1, 1, 1]) == [0.0] * 8
    assert max(advantages(rewards, [0] * 8)) > 0.9


@pytest.mark.parametrize("options", OPTIONS)
def test_the_order_of_the_rows_does_not_matter(options):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(24, generator=generator, dtype=torch.float64)
    group_ids = torch.arange(24) // 4
    order = torch.randperm(24, generator=generator)
    straight = group_advantages(rewards, group_ids, **options)
    shuffled = group_advantages(rewards[order], group_ids[order], **options)
    assert (shuffled - straight[order]).abs().max().item() < 1e-14


def test_groups_do_not_see_each_other():
    together = advantages([1, 0, 5, 9, 2], [0, 0, 1, 1, 1])
    assert together == advantages([1, 0]) + advantages([5, 9, 2])


def test_rewards_are_not_changed():
    rewards = torch.tensor([1.0, NAN, 0.0])
    group_advantages(rewards, torch.zeros(3, dtype=torch.long))
    assert rewards[0].item() == 1.0 and rewards[1].isnan() and rewards[2].item() == 0.0


def test_groups_without_spread_are_counted_once_each():
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, NAN, NAN, NAN, 0.0, 1.0, 2.0])
    group_ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4])
    num_equal, num_groups = zero_std_fraction(rewards, group_ids)
    # Group 0 is equal, 2 has one scored row, 3 none: it counts neither way.
    assert (num_equal.item(), num_groups.item()) == (2.0, 4.0)
    assert num_equal.shape == num_groups.shape == ()
    assert num_equal.dtype == num_groups.dtype == torch.float64


def test_no_rows_give_no_advantages():
    empty = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.long)
    assert group_advantages(empty, ids).shape == (0,)
    assert [t.item() for t in zero_std_fraction(empty, ids)] == [0.0, 0.0]


def test_an_infinite_reward_is_refused_with_its_row():
    for value in (math.inf, -math.inf):
        with pytest.raises(ValueError, match="row 2 is infinite"):
            advantages([1.0, 0.0, value, value])


def test_bad_options_and_shapes_are_refused():
    rewards, ids = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"'batch_mean'.*leave_one_out"):
        group_advantages(rewards, ids, baseline="batch_mean")
    with pytest.raises(ValueError, match=r"'mad'.*std"):
        group_advantages(rewards, ids, scale="mad")
    for eps in (-1e-8, NAN):
        with pytest.raises(ValueError, match="eps"):
            group_advantages(rewards, ids, eps=eps)
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        group_advantages(rewards, ids[:1])
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        group_advantages(rewards[None], ids[None])
