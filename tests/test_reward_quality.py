"""Noise of scoring and agreement with a better judge: by hand, and with known truths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_grpo.reward_quality import ranking, rescoring_noise

NAN = math.nan


def noise_of(scores, group_ids, **options):
    scores = torch.tensor(scores, dtype=torch.float64)
    return rescoring_noise(scores, torch.tensor(group_ids), **options)


def ranking_of(rewards, gold, group_ids, **options):
    return ranking(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(gold, dtype=torch.float64),
        torch.tensor(group_ids),
        **options,
    )


def test_noise_by_hand():
    # Means 1, 3 and 5, 5; squares inside rows 2, 0, 0, 2: noise 4 / 4 = 1. Variance of the means
    # inside groups (1 + 1 + 0 + 0) / 2 = 1, to which half of the noise has gone already.
    found = noise_of([[0, 2], [3, 3], [5, 5], [4, 6]], [0, 0, 1, 1])
    assert (found.noise_variance, found.within) == (1.0, 1.5)
    assert found.share == pytest.approx(2 / 3)
    assert (found.num_rows, found.num_differing, found.interval) == (4, 2, (0.0, 1.0))


def test_rows_scored_once_or_alone_in_their_group_do_not_count():
    scores = [[0, 2], [3, 3], [5, 5], [4, 6], [7, NAN], [9, 1], [NAN, NAN]]
    found = noise_of(scores, [0, 0, 1, 1, 0, 2, 1])
    assert found == noise_of(scores[:4], [0, 0, 1, 1])
    three = noise_of([[0, NAN, 2], [3, 3, NAN], [NAN, 5, 5], [4, 6, NAN]], [0, 0, 1, 1])
    assert three == found


def test_a_scorer_that_never_changes_its_mind_has_no_noise():
    found = noise_of([[0, 0], [1, 1], [1, 1], [0, 0], [1, 1], [0, 0]], [0, 0, 1, 1, 2, 2])
    assert (found.share, found.interval, found.num_differing) == (0.0, (0.0, 0.0), 0)


def test_noise_is_not_known_where_nothing_varies_or_is_scored_twice():
    for scores, ids in (([[1, 1], [1, 1]], [0, 0]), ([[1, NAN]], [0]), ([[1, 2]], [0])):
        found = noise_of(scores, ids)
        assert math.isnan(found.share) and found.interval == (0.0, 1.0)
    all_noise = noise_of([[0, 1], [1, 0], [1, 0], [0, 1]] * 2, [0, 0, 1, 1, 2, 2, 3, 3])
    assert (all_noise.share, all_noise.interval) == (1.0, (0.0, 1.0))


@pytest.mark.parametrize("num_scores", [2, 4])
@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_the_interval_of_the_noise_covers_it_as_often_as_it_says(noise, num_scores):
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(32).repeat_interleave(4)
    hits, shares = 0, []
    for _ in range(300):
        true = torch.randn(128, generator=generator) + 5 * torch.randn(32, generator=generator)[ids]
        drawn = torch.randn(128, num_scores, generator=generator) * math.sqrt(noise)
        found = rescoring_noise(true[:, None] + drawn, ids)
        shares.append(found.share)
        hits += found.interval.low <= noise / (1 + noise) <= found.interval.high
    assert 0.855 <= hits / 300 <= 0.945
    assert sum(shares) / 300 == pytest.approx(noise / (1 + noise), abs=0.015)


def test_ranking_by_hand():
    rewards = [1, 0, 0, 2, 1, 5, NAN, 0]
    gold = [3, 2, 1, 0, 1, 1, 5, NAN]
    ids = [0, 0, 0, 1, 1, 2, 0, 1]
    # Group 0: two right, one tie; group 1: one wrong; group 2 has no pair.
    found = ranking_of(rewards, gold, ids)
    assert found.share_right == pytest.approx(2.5 / 4)
    assert (found.num_pairs, found.num_prompts, found.interval) == (4, 2, (0.0, 1.0))


def test_pairs_are_right_as_often_as_a_loop_says():
    torch.manual_seed(0)
    rewards, gold = torch.randint(0, 4, (60,)).double(), torch.randint(0, 3, (60,)).double()
    ids = torch.randint(0, 9, (60,))
    right, num_pairs = 0.0, 0
    for i, j in itertools.permutations(range(60), 2):
        if ids[i] == ids[j] and gold[i] > gold[j]:
            num_pairs += 1
            right += 1.0 if rewards[i] > rewards[j] else 0.5 if rewards[i] == rewards[j] else 0.0
    found = ranking(rewards, gold, ids)
    assert (found.num_pairs, found.share_right) == (num_pairs, pytest.approx(right / num_pairs))
    assert 0 < found.interval.low < found.share_right < found.interval.high < 1


def test_equal_gold_says_nothing_and_rounding_is_a_tie():
    found = ranking_of([1, 2], [3, 3], [0, 0])
    assert math.isnan(found.share_right) and (found.num_pairs, found.num_prompts) == (0, 0)
    assert ranking_of([1.0, 1.0 + 1e-9], [0, 1], [0, 0]).share_right == 0.5
    assert ranking_of([1.0, 1.1], [0, 1e-9], [0, 0]).num_pairs == 1
    assert ranking_of([1.0, 1.1], [1, 1 + 1e-9], [0, 0]).num_pairs == 0


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_the_interval_of_the_ranking_covers_as_often_as_it_says(slope):
    # The chance that the larger of two gold scores has the larger reward; by its angle.
    expected = 0.5 + math.atan(slope) / math.pi
    torch.manual_seed(4)
    ids = torch.arange(32).repeat_interleave(4)
    hits = 0
    for _ in range(200):
        gold = torch.randn(128)
        low, high = ranking(slope * gold + torch.randn(128), gold, ids).interval
        hits += low <= expected <= high
    assert 0.85 <= hits / 200 <= 0.95


def test_bad_shapes_values_and_levels_are_refused():
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        rescoring_noise(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="infinite"):
        noise_of([[1, math.inf]], [0])
    with pytest.raises(ValueError, match="infinite"):
        ranking_of([1.0], [math.inf], [0])
    with pytest.raises(ValueError, match="infinite"):
        ranking_of([math.inf], [1.0], [0])
    with pytest.raises(ValueError, match=r"gold \(1,\)"):
        ranking_of([1.0, 2.0], [1.0], [0, 0])
    for function in (
        lambda: noise_of([[1, 2]], [0], level=0.0),
        lambda: ranking_of([1.0], [1.0], [0], level=0.0),
    ):
        with pytest.raises(ValueError, match="level is"):
            function()
