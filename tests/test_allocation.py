"""Noise of the gradient over group sizes: against enumeration, loops, and fresh draws."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from enumerable_policy import make_policy

from lightning_grpo.allocation import allocation, completion_moments
from lightning_grpo.gradient_sums import GradientAccumulator


def exact_components(policy):
    """a, b1, b2 and the mean of |mu_p|^2, from all completions."""
    p, s, r = policy.probabilities, policy.scores.sum(2), policy.rewards
    deviation = r - (p * r).sum(1, keepdim=True)
    mu_p = ((p * deviation).unsqueeze(2) * s).sum(1)
    length = mu_p.square().sum(1)
    between = (mu_p - policy.true_gradient).square().sum(1).mean()
    squares = s.square().sum(2)
    completion = ((p * deviation.square() * squares).sum(1) - length).mean()
    noise = ((p * deviation.square()).sum(1) * (p * squares).sum(1) + length).mean()
    return between, completion, noise, length.mean()


def measured(policy, num_prompts, group_size, rewards_of, generator, *, num_blocks=16):
    """Moments, blocks and pairs of drawn groups; `rewards_of(prompts, completions)`."""
    prompts, members = draw(policy, num_prompts, group_size, generator)
    rewards, scores = rewards_of(prompts, members), policy.scores.sum(2)[prompts, members]
    moments = completion_moments(rewards, scores @ scores.mT)
    sums = GradientAccumulator(["leave one out"], num_blocks=num_blocks)
    blocks = sums.add({"leave one out": leave_one_out(rewards, scores)})
    sums.end_fold()
    return moments, blocks, sums.pairs


def draw(policy, num_prompts, group_size, generator):
    """(n, 1) prompts and (n, G) completions."""
    prompts = torch.randint(policy.num_prompts, (num_prompts, 1), generator=generator)
    members = torch.multinomial(
        policy.probabilities[prompts[:, 0]], group_size, replacement=True, generator=generator
    )
    return prompts, members


def leave_one_out(rewards, scores):
    """(n, D) gradient of each group."""
    size = rewards.shape[1]
    advantages = (rewards - rewards.mean(1, keepdim=True)) * size / (size - 1)
    return (advantages.unsqueeze(2) * scores).mean(1)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_the_noise_of_all_groups_is_what_the_three_components_say(group_size):
    policy = make_policy()
    between, completion, noise, _ = exact_components(policy)
    groups, chances = policy.groups(group_size)
    x = policy.group_gradients(groups, "leave_one_out", "none")
    variance = chances @ (x - policy.true_gradient).square().sum(1)
    expected = between * group_size + completion + noise / (group_size - 1)
    assert float(group_size * variance) == pytest.approx(float(expected), rel=1e-12)


def test_moments_of_completions_have_no_bias():
    policy = make_policy()
    _, completion, noise, length = exact_components(policy)
    groups, chances = policy.groups(4)
    scores = policy.scores.sum(2)[groups[:, :1], groups[:, 1:]]
    moments = completion_moments(policy.rewards[groups[:, :1], groups[:, 1:]], scores @ scores.mT)
    expected = [length, length + completion / 4, length + completion / 2 + noise / 2]
    torch.testing.assert_close(chances @ moments, torch.stack(expected), rtol=1e-11, atol=0)


def test_moments_of_completions_are_means_over_sets_of_siblings():
    generator = torch.Generator().manual_seed(3)
    r = torch.randn(2, 6, dtype=torch.float64, generator=generator) + 1e6
    s = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
    found = completion_moments(r, s @ s.mT)
    for n in range(2):

        def k(i, j, n=n):
            return (r[n, i] - r[n, j]) * (s[n, i] - s[n, j]) / 2

        four = [k(i, j) @ k(x, y) for i, j, x, y in itertools.permutations(range(6), 4)]
        three = [k(i, j) @ k(i, x) for i, j, x in itertools.permutations(range(6), 3)]
        two = [k(i, j) @ k(i, j) for i, j in itertools.permutations(range(6), 2)]
        expected = torch.stack([sum(terms) / len(terms) for terms in (four, three, two)])
        torch.testing.assert_close(found[n], expected, rtol=1e-8, atol=1e-10)


# Fresh draws


def styled(policy, generator):
    """Mean over tokens of a weight per token, with noise three times the spread of siblings."""
    weights = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    style = (weights.unsqueeze(1) + weights).flatten() / 2
    p = policy.probabilities
    spread = (p @ style.square() - (p @ style).square()).mean().sqrt()

    def rewards_of(prompts, members):
        noise = torch.randn(members.shape, dtype=torch.float64, generator=generator)
        return style[members] + 3 * spread * noise + prompts

    return rewards_of


def seldom_right(policy, generator):
    """1 for one or two of the nine completions, different ones for each prompt, else 0."""
    order = policy.probabilities.argsort(dim=1)
    passes = torch.zeros_like(policy.probabilities)
    passes.scatter_(1, order[:, 3:5], 1.0)

    def rewards_of(prompts, members):
        return passes[prompts, members]

    rate = (passes * policy.probabilities).sum(1)
    assert rate.min() > 0.1 and rate.max() < 0.3
    return rewards_of


@cache
def drawn_noise(law):
    """{G: M tr Var(g)}, each from 4,000 groups or more."""
    policy, generator = make_policy(num_prompts=6), torch.Generator().manual_seed(1)
    rewards_of = law(policy, generator)
    found = {}
    for size in (2, 4, 8, 16, 32):
        prompts, members = draw(policy, max(4000, 64_000 // size), size, generator)
        x = leave_one_out(rewards_of(prompts, members), policy.scores.sum(2)[prompts, members])
        found[size] = size * float(x.var(0).sum())
    return found


@pytest.mark.parametrize("law", [styled, seldom_right])
def test_noise_is_predicted_at_group_sizes_that_were_not_measured(law):
    policy, generator = make_policy(num_prompts=6), torch.Generator().manual_seed(2)
    moments, blocks, pairs = measured(policy, 2000, 8, law(policy, generator), generator)
    found = allocation(moments, blocks, pairs, group_size=8)
    noise = drawn_noise(law)
    for size, drawn in noise.items():
        predicted = found.predicted[size]
        assert predicted.noise == pytest.approx(drawn, rel=0.15)
        assert predicted.relative == pytest.approx(drawn / noise[8], rel=0.15)
        assert predicted.interval.low < predicted.noise < predicted.interval.high
    assert found.predicted[8].relative_interval == pytest.approx((1, 1))
    assert (found.num_prompts, set(found.predicted)) == (2000, {2, 4, 8, 16, 32, 64})


def test_intervals_cover_as_often_as_they_say():
    policy, generator = make_policy(), torch.Generator().manual_seed(5)
    between, completion, noise, _ = (float(x) for x in exact_components(policy))

    def at(size):
        return between * size + completion + noise / (size - 1)

    covered = dict.fromkeys(("between", "noise", "best", "at 32", "relative"), 0)
    for _ in range(200):
        moments, blocks, pairs = measured(
            policy, 64, 6, lambda p, m: policy.rewards[p, m], generator
        )
        found = allocation(moments, blocks, pairs, group_size=6)
        if found.between > 0:
            best = max(2, 1 + math.sqrt(found.noise / found.between))
            assert found.best_group_size == pytest.approx(best)
        at_32 = found.predicted[32]
        for name, (low, high), exact in (
            ("between", found.between_interval, between),
            ("noise", found.noise_interval, noise),
            ("best", found.best_interval, 1 + math.sqrt(noise / between)),
            ("at 32", at_32.interval, at(32)),
            ("relative", at_32.relative_interval, at(32) / at(6)),
        ):
            covered[name] += low <= exact <= high
    assert all(0.82 * 200 <= number <= 0.96 * 200 for number in covered.values()), covered


def test_prompts_that_do_not_differ_ask_for_ever_larger_groups():
    policy, generator = make_policy(num_prompts=1), torch.Generator().manual_seed(5)
    moments, blocks, pairs = measured(policy, 64, 6, lambda p, m: policy.rewards[p, m], generator)
    found = allocation(moments, blocks, pairs, group_size=6)
    assert found.between_interval.low < 0 < found.between_interval.high
    assert found.best_interval.high == math.inf and found.best_interval.low > 3
    assert found.best_group_size > 4


def test_a_reward_that_says_nothing_has_no_best_group_size():
    policy, generator = make_policy(), torch.Generator().manual_seed(5)
    found = allocation(
        *measured(policy, 40, 4, lambda p, m: torch.ones(m.shape), generator), group_size=4
    )
    assert (found.between, found.noise, found.completion_noise) == (0, 0, 0)
    assert math.isnan(found.best_group_size) and found.best_interval == (2, math.inf)


def test_what_cannot_be_split_is_named():
    with pytest.raises(ValueError, match="at least 4"):
        completion_moments(torch.ones(2, 3), torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="must be"):
        completion_moments(torch.ones(2, 4), torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match="not finite"):
        completion_moments(torch.full((2, 4), math.nan), torch.ones(2, 4, 4))
    policy, generator = make_policy(), torch.Generator().manual_seed(5)
    moments, blocks, pairs = measured(policy, 8, 4, lambda p, m: policy.rewards[p, m], generator)
    with pytest.raises(ValueError, match="below 2"):
        allocation(moments, blocks, pairs, group_size=4, group_sizes=(1, 2))
    with pytest.raises(ValueError, match="not the same"):
        allocation(moments[:7], blocks[:7], pairs, group_size=4)
    with pytest.raises(ValueError, match="must be"):
        allocation(moments[:7], blocks, pairs, group_size=4)
