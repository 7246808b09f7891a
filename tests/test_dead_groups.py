"""Dead groups over G: by hand, by enumeration of all subsets, and with known pass-rate laws."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from lightning_grpo.dead_groups import (
    common_group_size,
    dead_again,
    dead_bounds,
    dead_chances,
    dead_shares,
    group_values,
)
from lightning_grpo.intervals import clustered_share_interval

NAN = math.nan


def call(function, rewards, group_ids, *args, **options):
    """A statistic of float64 rewards given as lists."""
    return function(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(group_ids), *args, **options
    )


def rows_of(groups):
    """Rewards and ids of groups given as lists."""
    return [r for group in groups for r in group], [i for i, g in enumerate(groups) for _ in g]


def test_values_of_each_group_are_counted_up_to_rounding():
    rewards = [2.0, 1.0, NAN, 0.1, 1.0, 0.1 + 1e-9, 2.0, 1.0, 5.0, 1.0]
    ids = [9, 9, 9, 4, 9, 4, 9, 9, 7, 4]
    groups, values, counts = call(group_values, rewards, ids)
    assert groups.tolist() == [0, 0, 1, 2, 2]
    assert values.tolist() == [0.1, 1.0, 5.0, 1.0, 2.0]
    assert counts.tolist() == [2, 1, 1, 3, 2]
    assert [len(x) for x in call(group_values, [NAN], [0])] == [0, 0, 0]


def test_the_common_size_is_that_of_half_the_groups():
    sizes = {8: [8, 6], 6: [6], 4: [2, 4, 9], 2: [1, 2, 4, 1]}
    for expected, found in sizes.items():
        rewards, ids = rows_of([[0.0] * size for size in found])
        assert call(common_group_size, rewards, ids) == expected
    assert call(common_group_size, [0.0, NAN, NAN], [0, 0, 1]) == 1
    assert call(common_group_size, [], []) == 0


def test_shares_by_hand():
    # 3 of 4 right: of the 6 pairs 3 are equal, of the 4 triples 1.
    found = call(dead_shares, [1, 1, 0, 1], [0, 0, 0, 0], [1, 2, 3, 4])
    assert [f.share for f in found] == pytest.approx([1, 1 / 2, 1 / 4, 0], abs=1e-12)
    # With a second prompt that is always right.
    rewards, ids = rows_of([[1, 1, 0, 1], [1, 1, 1, 1]])
    found = call(dead_shares, rewards, ids, [2, 3, 4])
    assert [f.share for f in found] == pytest.approx([3 / 4, 5 / 8, 1 / 2], abs=1e-12)
    assert [f.num_prompts for f in found] == [2, 2, 2]
    assert [f.group_size for f in found] == [2, 3, 4]


def test_shares_are_those_of_all_subsets():
    groups = [[0, 1, 1, 0.5, 1], [2, 2, 2, 2, 2], [0, 1, 2, 3, 4], [0, 0, 1, 1, 1], [1, 0]]
    for size in (2, 3, 4, 5):
        shares = [
            statistics.fmean(len(set(subset)) == 1 for subset in itertools.combinations(g, size))
            for g in groups
            if len(g) >= size
        ]
        (found,) = call(dead_shares, *rows_of(groups), [size])
        assert found.share == pytest.approx(statistics.fmean(shares), abs=1e-12)
        assert found.num_prompts == len(shares)


def test_the_interval_of_a_share_is_that_of_the_chances_over_prompts():
    rewards, ids = rows_of([[0, 1]] * 6 + [[1, 1]] * 2)
    (found,) = call(dead_shares, rewards, ids, [2], level=0.9)
    chances = call(dead_chances, rewards, ids, 2)
    assert chances.tolist() == [0.0] * 6 + [1.0] * 2
    assert found.interval == clustered_share_interval(chances, torch.ones(8), level=0.9)
    # Wilson by hand for 2 of 8: padded share 2.25 / 8.5, sum of squares with the padding
    # 8.5 * .2647 * .7353, so that n is 7.5, and t of 7 degrees of freedom is 1.8946.
    t, n, share = 1.8946, 7.5, 0.25
    half = t * math.sqrt(share * (1 - share) / n + t * t / (4 * n * n))
    expected = [(share + t * t / (2 * n) + sign * half) / (1 + t * t / n) for sign in (-1, 1)]
    assert found.interval == pytest.approx(expected, abs=3e-4)
    (wider,) = call(dead_shares, rewards, ids, [2], level=0.99)
    assert wider.interval.low < found.interval.low < found.interval.high < wider.interval.high


def test_order_and_unscored_rows_do_not_matter():
    rewards, ids = rows_of([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    plain = call(dead_shares, rewards, ids, [2, 3])
    order = [5, 8, 0, 3, 7, 2, 1, 6, 4]
    shuffled = call(dead_shares, [rewards[i] for i in order], [-ids[i] for i in order], [2, 3])
    padded = call(dead_shares, [*rewards, NAN, NAN], [*ids, 0, 5], [2, 3])
    for other in (shuffled, padded):
        assert [f.share for f in other] == pytest.approx([f.share for f in plain], abs=1e-12)
        assert [f.num_prompts for f in other] == [3, 3]


def test_nothing_is_known_without_prompts_of_that_size():
    (found,) = call(dead_shares, [0.0, 1.0], [0, 1], [2])
    assert math.isnan(found.share) and (found.num_prompts, found.interval) == (0, (0.0, 1.0))
    (bounds,) = call(dead_bounds, [0.0, 1.0], [0, 1], 2, [4])
    assert (bounds.bounds, bounds.interval) == ((0.0, 1.0), (0.0, 1.0))
    assert call(dead_again, [0.0, 1.0, 0.0], [0, 0, 0], 3).least == 0.0


def test_bounds_by_hand():
    # 6 dead and 4 near prompts of 20, G = 4: D(4) = .3 and D(3) = .3 + .2 / 4 = .35.
    groups = [[1, 1, 1, 1]] * 4 + [[0, 0, 0, 0]] * 2 + [[1, 1, 0, 1]] * 4 + [[1, 0, 1, 0]] * 10
    at_four, at_six = call(dead_bounds, *rows_of(groups), 4, [4, 6])
    assert at_four.bounds == pytest.approx((0.3, 0.3))
    assert at_six.bounds == pytest.approx((0.3 * (0.3 / 0.35) ** 2, 0.3))
    (three,) = call(dead_shares, *rows_of(groups), [3])
    assert three.share == pytest.approx(0.35)
    # Clopper-Pearson at 6 of 20: 5 % above, 2.5 % below; and 2.5 % below 6 of 10.
    assert at_four.interval == pytest.approx((0.1189, 0.5078), abs=1e-4)
    odds = 0.2624
    ratio = odds / (odds + (1 - odds) / 4)
    assert at_six.interval == pytest.approx((0.1189 * ratio**2, 0.5078), abs=1e-4)


def test_bounds_from_pairs_know_that_single_completions_are_alike():
    # G = 2: D(1) = 1, so that the ratio is D(2) itself.
    groups = [[1, 1]] * 3 + [[0, 1]] * 7
    (bounds,) = call(dead_bounds, *rows_of(groups), 2, [4])
    assert bounds.bounds == pytest.approx((0.3**3, 0.3))


@pytest.mark.parametrize("powers", [(0.5,), (0.9, 0.2), (0.6, 0.3, 0.1)])
def test_the_bounds_of_exact_shares_hold_at_every_size(powers):
    def dead(size):  # prompts with one of these chances of success each, and some dead for ever
        return 0.1 + statistics.fmean(0.9 * (p**size + (1 - p) ** size) for p in powers)

    for larger in range(8, 65):
        assert dead(8) * (dead(8) / dead(7)) ** (larger - 8) <= dead(larger) <= dead(8)


def test_dead_prompts_of_a_range_of_values_are_bounded_by_themselves():
    groups = [[1, 1, 1, 1]] * 6 + [[1, 1, 1, 0]] * 2 + [[0, 0, 0, 0]] * 3 + [[0, 0, 0, 1]] * 5
    easy = call(dead_again, *rows_of(groups), 4, at_least=1.0, level=0.9)
    hard = call(dead_again, *rows_of(groups), 4, below=1.0, level=0.9)
    both = call(dead_again, *rows_of(groups), 4, level=0.9)
    assert [(d.num_dead, d.num_near) for d in (easy, hard, both)] == [(6, 2), (3, 5), (9, 7)]
    # One-sided 90 % lower end at 6 of 8: P(X >= 6 | p) = .1 at p = .4618.
    chance = 0.46178
    assert math.fsum(
        math.comb(8, k) * chance**k * (1 - chance) ** (8 - k) for k in (6, 7, 8)
    ) == pytest.approx(0.1, abs=1e-4)
    ratio = chance / (chance + (1 - chance) / 4)
    assert easy.least == pytest.approx(ratio**4, abs=1e-4)
    assert hard.least < both.least < easy.least


def test_more_scores_than_the_group_size_are_left_out_of_bounds_in_their_order():
    longer = [[1, 1, 1, 0, 0], [1, 1, 0, 1], [1, 0, 1]]
    shorter = [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    assert call(dead_bounds, *rows_of(longer), 3, [6]) == call(
        dead_bounds, *rows_of(shorter), 3, [6]
    )
    rewards, ids = rows_of(longer)
    assert call(dead_bounds, [NAN, *rewards], [0, *ids], 3, [6]) == call(
        dead_bounds, *rows_of(shorter), 3, [6]
    )


def test_bad_rows_sizes_and_levels_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        dead_shares(torch.ones(2), torch.zeros(1), [2])
    with pytest.raises(ValueError, match="row 1 is infinite"):
        call(dead_shares, [1.0, math.inf], [0, 0], [2])
    with pytest.raises(ValueError, match="a group of 0"):
        call(dead_shares, [1.0, 0.0], [0, 0], [0])
    with pytest.raises(ValueError, match="level is"):
        call(dead_shares, [1.0, 0.0], [0, 0], [2], level=1.0)
    for group_size, larger in ((1, [2]), (4, [8, 3])):
        with pytest.raises(ValueError, match=f"from groups of {group_size}"):
            call(dead_bounds, [1.0, 0.0], [0, 0], group_size, larger)
    with pytest.raises(ValueError, match="at least 3"):
        call(dead_again, [1.0, 0.0], [0, 0], 2)


# Coverage with known laws of the pass rate


def fixed(rates, weights):
    """A law with these pass rates only."""
    rates, weights = torch.tensor(rates), torch.tensor(weights)
    return lambda n: rates[weights.multinomial(n, replacement=True)]


def beta(a, b, at_zero=0.0, at_one=0.0):
    """Beta(a, b), but for a part of the prompts that never succeed, and one that always does."""
    law = torch.distributions.Beta(torch.tensor(float(a)), torch.tensor(float(b)))

    def draw(n):
        u = torch.rand(n)
        middle = torch.where(u < at_zero + at_one, 1.0, law.sample((n,)))
        return torch.where(u < at_zero, 0.0, middle)

    def dead(size):
        def moment(a, b):
            log = math.lgamma(a + size) + math.lgamma(a + b)
            return math.exp(log - math.lgamma(a + b + size) - math.lgamma(a))

        middle = moment(a, b) + moment(b, a)
        return at_zero + at_one + (1 - at_zero - at_one) * middle

    return draw, dead


LAWS = {
    "uniform": beta(1, 1),
    "around a half": beta(2, 2),
    "all the same": (fixed([0.2], [1.0]), lambda size: 0.2**size + 0.8**size),
    "many too hard": beta(1, 1, at_zero=0.6, at_one=0.1),
    "both ends": beta(2, 5, at_zero=0.3, at_one=0.2),
}


@pytest.mark.parametrize("law", LAWS)
def test_intervals_from_a_file_of_scores_cover_as_often_as_they_say(law):
    draw, dead = LAWS[law]
    torch.manual_seed(11)
    num_draws, num_prompts, group_size = 2000, 64, 8
    ids = torch.arange(num_draws * num_prompts).repeat_interleave(group_size)
    rewards = (torch.rand(len(ids)) < draw(num_draws * num_prompts)[ids]).double()
    ones = torch.ones(num_prompts)
    for size in (2, 4, 8):
        hits = 0
        for chances in dead_chances(rewards, ids, size).view(num_draws, num_prompts):
            low, high = clustered_share_interval(chances, ones, level=0.95)
            hits += low <= dead(size) <= high
        assert 0.93 <= hits / num_draws <= 0.97, (size, hits / num_draws)


@pytest.mark.parametrize("law", LAWS)
def test_bounds_above_the_size_of_the_groups_hold_at_least_as_often_as_they_say(law):
    draw, dead = LAWS[law]
    torch.manual_seed(13)
    ids = torch.arange(64).repeat_interleave(8)
    hits, num_draws = 0, 50
    for _ in range(num_draws):
        rewards = (torch.rand(len(ids)) < draw(64)[ids]).double()
        (found,) = dead_bounds(rewards, ids, 8, [16], level=0.9)
        hits += found.interval.low <= dead(16) <= found.interval.high
    assert hits / num_draws >= 0.88
