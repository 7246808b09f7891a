"""The search for spread: rounds by hand, and exact intervals with known pass-rate laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_grpo.intervals import binomial_interval
from lightning_grpo.spread_search import (
    continue_search,
    draws_wanted,
    known_group_size,
    searched_shares,
    start_search,
)

NAN = math.nan


def take(search, rows):
    """Take in rows of prompt and reward."""
    prompts = [prompt for prompt, _ in rows]
    return continue_search(
        search, prompts, torch.tensor([reward for _, reward in rows], dtype=torch.float64)
    )


def test_a_search_by_hand():
    search = start_search(3)
    assert draws_wanted(search, 8).tolist() == [2, 2, 2]
    assert searched_shares(search, 8) == []
    search = take(search, [(0, 1.0), (0, 0.0), (1, 0.0), (1, 0.0), (2, 1.0), (2, 1.0)])
    assert search.has_spread.tolist() == [True, False, False]
    assert draws_wanted(search, 8).tolist() == [0, 2, 2]
    # Prompt 1 differs at its third completion; what comes after says nothing.
    search = take(search, [(2, 1.0), (1, 1.0), (1, 0.0), (2, 1.0 + 1e-7)])
    assert search.num_drawn.tolist() == [2, 3, 4]
    assert draws_wanted(search, 8).tolist() == [0, 0, 4]
    found = searched_shares(search, 8)
    assert [(f.group_size, f.share) for f in found] == [(2, 2 / 3), (3, 1 / 3), (4, 1 / 3)]
    assert found[0].interval == binomial_interval(2, 3)
    assert searched_shares(search, 3, level=0.5)[-1].interval == binomial_interval(1, 3, level=0.5)
    search = take(search, [(2, 1.0)] * 4)
    assert draws_wanted(search, 8).tolist() == [0, 0, 0]
    assert [f.share for f in searched_shares(search, 8)] == [2 / 3] + [1 / 3] * 6
    assert draws_wanted(search, 12).tolist() == [0, 0, 4]


def test_once_all_prompts_have_spread_every_size_is_known():
    search = take(start_search(2), [(0, 1.0), (1, 0.0), (0, 0.0), (1, 2.0)])
    assert known_group_size(search, 16) == 16
    assert [f.share for f in searched_shares(search, 4)] == [0.0, 0.0, 0.0]
    assert draws_wanted(search, 16).tolist() == [0, 0]


def test_a_row_without_a_reward_is_drawn_again_and_holds_the_others_up():
    search = take(start_search(2), [(0, 1.0), (0, NAN), (1, 0.0), (1, 0.0)])
    assert search.num_drawn.tolist() == [1, 2]
    assert searched_shares(search, 8) == []
    assert draws_wanted(search, 8).tolist() == [1, 0]
    search = take(search, [(0, 1.0)])
    assert [f.share for f in searched_shares(search, 8)] == [1.0]
    assert draws_wanted(search, 8).tolist() == [2, 2]


def test_bad_rows_are_refused():
    search = start_search(2)
    with pytest.raises(ValueError, match="prompt 2 is none of the 2"):
        take(search, [(2, 1.0)])
    with pytest.raises(ValueError, match="prompt -1"):
        take(search, [(-1, 1.0)])
    for rewards in (torch.tensor([1.0, 0.0]), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="1 finite rewards"):
            continue_search(search, [0], rewards)
    with pytest.raises(ValueError, match="cap is 1"):
        draws_wanted(search, 1)


def run_search(chances, cap):
    """Search with successes of these chances; what was drawn in all."""
    search, num_drawn = start_search(len(chances)), 0
    while True:
        wanted = draws_wanted(search, cap)
        if not bool(wanted.any()):
            return search, num_drawn
        prompts = torch.arange(len(chances)).repeat_interleave(wanted)
        rewards = (torch.rand(len(prompts)) < chances[prompts]).double()
        search = continue_search(search, prompts.tolist(), rewards)
        num_drawn += len(prompts)


def law(name, n):
    """Chances of success of n prompts."""
    u, one = torch.rand(n), torch.ones(n)
    if name == "uniform":
        return u
    if name == "around a half":
        return torch.distributions.Beta(2.0, 2.0).sample((n,))
    if name == "all the same":
        return 0.2 * one
    if name == "many too hard":
        return torch.where(u < 0.6, 0.0, torch.where(u < 0.7, 1.0, torch.rand(n)))
    return torch.where(u < 0.3, 0.0, torch.where(u < 0.5, 1.0, 0.3 * one))


TRUE_SHARES = {
    # E[p^G + (1 - p)^G] at G = 2, 4, 8
    "uniform": (2 / 3, 2 / 5, 2 / 9),
    "around a half": (3 / 5, 2 / 7, 6 / 55),
    "all the same": (0.68, 0.4112, 0.2**8 + 0.8**8),
    "many too hard": (0.7 + 0.3 * 2 / 3, 0.7 + 0.3 * 2 / 5, 0.7 + 0.3 * 2 / 9),
    "both ends": (0.5 + 0.5 * 0.58, 0.5 + 0.5 * 0.2482, 0.5 + 0.5 * (0.3**8 + 0.7**8)),
}


@pytest.mark.parametrize("name", TRUE_SHARES)
def test_a_search_counts_what_whole_groups_would_show(name):
    torch.manual_seed(5)
    num_prompts = 20_000
    search, _ = run_search(law(name, num_prompts), 8)
    found = {f.group_size: f.share for f in searched_shares(search, 8)}
    for size, expected in zip((2, 4, 8), TRUE_SHARES[name]):
        tolerance = 4 * math.sqrt(expected * (1 - expected) / num_prompts)
        assert found[size] == pytest.approx(expected, abs=tolerance)


def test_exact_intervals_cover_as_often_as_they_say_and_not_much_more():
    # The number of dead prompts is binomial: no draws are needed to know how often the interval
    # covers. At 128 prompts it is not much too long; at 32 it covers up to 98.8 %.
    intervals = [binomial_interval(k, 128, level=0.95) for k in range(129)]
    for expected in itertools.chain(*TRUE_SHARES.values()):
        coverage = math.fsum(
            math.comb(128, k) * expected**k * (1 - expected) ** (128 - k)
            for k, (low, high) in enumerate(intervals)
            if low <= expected <= high
        )
        assert 0.95 <= coverage <= 0.97


def test_only_dead_prompts_cost_more():
    torch.manual_seed(2)
    search, num_drawn = run_search(torch.tensor([0.5] * 90 + [0.0] * 10), 32)
    assert search.num_drawn[90:].tolist() == [32] * 10
    # 90 prompts with spread need 2, half of them 2 more, an eighth of these 4 more, and so on.
    assert 320 + 180 < num_drawn < 320 + 400
