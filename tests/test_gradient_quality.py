"""Quality of gradients: against a policy of which everything can be enumerated, and by loops."""

from __future__ import annotations

import itertools
import math
import statistics
from functools import cache

import pytest
import torch
from enumerable_policy import make_policy

from lightning_grpo.gradient_quality import gradient_quality, quality_ratio
from lightning_grpo.gradient_sums import GradientAccumulator, PairSums

GROUP_SIZE = 3
LAMBDAS = {"critic 1": 1.0, "critic .95": 0.95, "critic .9": 0.9, "critic .7": 0.7}
ARMS = ("leave one out", "grpo", "without std", *LAMBDAS)
CRITIC_ERROR = torch.tensor([[1.0, -2, 0, 1], [0, 2, -1, 0], [-1, 0, 1, -2], [2, 0, 0, 1]]).double()


@cache
def all_groups():
    """A policy, gradients (A, M, D) of all its groups, by arm, and their probabilities."""
    policy = make_policy()
    groups, chances = policy.groups(GROUP_SIZE)
    values = policy.values() + CRITIC_ERROR
    gradients = [
        policy.group_gradients(groups, "leave_one_out", "none"),
        policy.group_gradients(groups, "group_mean", "std"),
        policy.group_gradients(groups, "group_mean", "none"),
    ]
    for gae_lambda in LAMBDAS.values():
        gradients.append(
            policy.mean_over_group(policy.critic_gradients(values, gae_lambda), groups)
        )
    return policy, torch.stack(gradients), chances


def exact_quality(arm, num_batch_prompts):
    """<m, mu>^2 / (|mu|^2 E|g|^2), from all groups."""
    policy, gradients, chances = all_groups()
    mu, x = policy.true_gradient, gradients[ARMS.index(arm)]
    m = chances @ x
    variance = chances @ (x - m).square().sum(1)
    return float((m @ mu) ** 2 / (mu @ mu) / (m @ m + variance / num_batch_prompts))


def drawn_pairs(generator, num_prompts, *, arms=ARMS, num_blocks=16):
    """Pairs of the gradients of some prompts that were drawn with their completions."""
    _, gradients, chances = all_groups()
    drawn = torch.multinomial(chances, num_prompts, replacement=True, generator=generator)
    sums = GradientAccumulator(arms, num_blocks=num_blocks)
    sums.add({arm: gradients[ARMS.index(arm), drawn] for arm in arms})
    sums.end_fold()
    return sums.pairs


def pairs_of(gradients, *, num_blocks=16):
    """Pairs of all rows of {arm: (n, D)}."""
    sums = GradientAccumulator(list(gradients), num_blocks=num_blocks)
    sums.add(gradients)
    sums.end_fold()
    return sums.pairs


def standard_errors(values, exact):
    """(draws, ...) values -> by how many standard errors their mean misses the exact values."""
    return (values.mean(0) - exact).abs() / (values.std(0) / math.sqrt(len(values)))


@cache
def many_draws():
    """1,000 draws of 12 prompts: mean of the pairs in each, and all pairs together."""
    generator = torch.Generator().manual_seed(3)
    means, total = [], PairSums.empty(ARMS, 16)
    for _ in range(1000):
        pairs = drawn_pairs(generator, 12)
        means.append(
            torch.stack(
                [
                    pairs.alignment.sum((1, 2)) / 132,
                    pairs.norm.sum((1, 2)) / 132,
                    pairs.squares.sum(1) / 12,
                ]
            )
        )
        total = total + pairs
    return torch.stack(means), total


# The oracle


def test_leave_one_out_and_a_critic_at_lambda_1_follow_the_true_gradient_and_std_does_not():
    policy, gradients, chances = all_groups()
    means = dict(zip(ARMS, chances @ gradients, strict=True))
    mu = policy.true_gradient
    torch.testing.assert_close(means["leave one out"], mu, rtol=0, atol=1e-14)
    torch.testing.assert_close(means["critic 1"], mu, rtol=0, atol=1e-14)
    torch.testing.assert_close(means["without std"], mu * 2 / 3, rtol=0, atol=1e-14)
    assert exact_quality("grpo", math.inf) < 0.95
    assert exact_quality("critic .7", math.inf) < 0.99
    assert exact_quality("without std", 16) == pytest.approx(exact_quality("leave one out", 16))


# Without bias


def test_sums_over_pairs_have_no_bias():
    policy, gradients, chances = all_groups()
    means = chances @ gradients
    exact = torch.stack(
        [
            means @ policy.true_gradient,
            means.square().sum(1),
            gradients.square().sum(2) @ chances,
        ]
    )
    assert standard_errors(many_draws()[0], exact).max() < 3


@pytest.mark.parametrize("num_batch_prompts", [1, 16, math.inf])
def test_quality_and_its_ratio_are_those_of_the_enumeration(num_batch_prompts):
    _, total = many_draws()
    # The normal quantile of this level is 3: within three standard errors.
    found = gradient_quality(total, num_batch_prompts=num_batch_prompts, level=0.9973)
    assert (found.num_prompts, found.reason) == (12_000, "")
    for arm in ARMS:
        exact = exact_quality(arm, num_batch_prompts)
        low, high = found.arms[arm].interval
        assert low - 1e-12 <= exact <= high + 1e-12 and high - low < 0.1
        log_ratio = math.log(exact / exact_quality("grpo", num_batch_prompts))
        ratio = quality_ratio(total, arm, "grpo", num_batch_prompts=num_batch_prompts, level=0.9973)
        assert ratio.interval.low - 1e-12 <= log_ratio <= ratio.interval.high + 1e-12


def test_pairs_of_a_prompt_with_itself_are_seen_to_be_wrong():
    policy, gradients, chances = all_groups()
    exact = (chances @ gradients) @ policy.true_gradient
    own = (gradients * gradients[0]).sum(2) @ chances
    alignment = many_draws()[0][:, 0]
    # 12 pairs of the same prompt among 144; what they add is the same in every draw on average.
    assert standard_errors(alignment * 132 / 144 + own * 12 / 144, exact).min() > 10


def test_the_mean_of_a_naive_bootstrap_is_seen_to_be_wrong():
    policy, gradients, chances = all_groups()
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(chances, 400 * 12, replacement=True, generator=generator)
    h = gradients[0, drawn].view(400, 12, -1)
    again = torch.randint(12, (400, 12), generator=generator)
    resampled = h.gather(1, again.unsqueeze(2).expand_as(h))

    def signal(x):
        return (x.sum(1).square().sum(1) - x.square().sum((1, 2))) / 132

    exact = policy.true_gradient.square().sum()
    assert standard_errors(signal(h), exact) < 3
    assert standard_errors(signal(resampled), exact) > 6


def test_a_true_gradient_from_divided_advantages_is_seen_to_be_wrong():
    _, gradients, chances = all_groups()
    generator = torch.Generator().manual_seed(7)
    drawn = torch.multinomial(chances, 20_000, replacement=True, generator=generator)
    rows = dict(zip(ARMS, gradients[:, drawn], strict=True))
    exact = exact_quality("grpo", math.inf)
    for mu, is_right in (("leave one out", True), ("grpo", False)):
        pairs = pairs_of({mu: rows[mu], "judged": rows["grpo"]})
        low, high = (
            gradient_quality(pairs, num_batch_prompts=math.inf, level=0.9973)
            .arms["judged"]
            .interval
        )
        assert (low <= exact <= high) == is_right


def test_agreement_of_halves_praises_a_gradient_that_is_sure_and_wrong():
    generator = torch.Generator().manual_seed(7)
    h = drawn_gradients(generator, 40)
    mu = all_groups()[0].true_gradient
    aside = torch.randn(len(mu), dtype=torch.float64, generator=generator)
    aside = (aside - mu * (aside @ mu) / (mu @ mu)).expand_as(h)
    halves = [torch.cosine_similarity(x[:20].sum(0), x[20:].sum(0), dim=0) for x in (aside, h)]
    assert halves[0] > 0.999 > 0.9 > halves[1]
    found = gradient_quality(pairs_of({"leave one out": h, "aside": aside}), num_batch_prompts=40)
    assert found.arms["aside"].interval.high < 0.1
    assert found.arms["leave one out"].interval.low > 0.5


def drawn_gradients(generator, num_prompts):
    """(n, D) of the unbiased arm."""
    _, gradients, chances = all_groups()
    drawn = torch.multinomial(chances, num_prompts, replacement=True, generator=generator)
    return gradients[0, drawn]


# Critics that learn from what is measured


def critic_draws(plan, gae_lambda):
    """Estimates less exact values, (400, 2) of <m, mu> and |m|^2, of critics that are fitted.

    `plan(sums, fit, gradients)` adds three batches of 6 prompts, with critics that it fits to
    batches, and returns how much the m of each batch counts in <m, mu>.
    """
    policy = make_policy(spread=3.0)
    generator = torch.Generator().manual_seed(13)
    mu = policy.true_gradient
    groups, chances = policy.groups(GROUP_SIZE)
    leave_one_out = policy.group_gradients(groups, "leave_one_out", "none")
    # Advantages are linear in the values.
    units = torch.eye(4 * policy.num_prompts, dtype=torch.float64).view(-1, policy.num_prompts, 4)
    without = policy.critic_gradients(torch.zeros_like(units[0]), gae_lambda)
    by_value = torch.stack([policy.critic_gradients(v, gae_lambda) for v in units]) - without
    chance = policy.probabilities.unsqueeze(2) / policy.num_prompts
    differences = []
    for _ in range(400):
        drawn = torch.multinomial(chances, 18, replacement=True, generator=generator).view(3, 6)
        means = []

        def fit(*batches, drawn=drawn):
            return fitted_values(policy, groups[drawn[list(batches)].flatten()])

        def gradients(batch, values, drawn=drawn, means=means):
            per_completion = without + torch.tensordot(values.flatten(), by_value, 1)
            means.append((per_completion * chance).sum((0, 1)))
            x = policy.mean_over_group(per_completion, groups[drawn[batch]])
            return {"leave one out": leave_one_out[drawn[batch]], "critic": x}

        sums = GradientAccumulator(["leave one out", "critic"], num_blocks=6)
        weights = plan(sums, fit, gradients)
        pairs = sums.pairs
        exact = sum(w * (m @ mu) for w, m in zip(weights, means, strict=True))
        differences.append(
            torch.stack(
                [
                    pairs.alignment[1].sum() / pairs.num_alignment.sum() - exact,
                    pairs.norm[1].sum() / pairs.num_norm.sum()
                    - sum(m @ m for m in means) / len(means),
                ]
            )
        )
    return torch.stack(differences)


def fitted_values(policy, groups):
    """(P, 4) mean reward after each state among the completions of groups, 0 where none came by."""
    prompts, members = groups[:, :1].expand(-1, GROUP_SIZE).flatten(), groups[:, 1:].flatten()
    rewards = policy.rewards[prompts, members]
    sums, counts = torch.zeros(2, policy.num_prompts, 4, dtype=torch.float64)
    for state in (torch.zeros_like(members), 1 + members // 3):
        sums.index_put_((prompts, state), rewards, accumulate=True)
        counts.index_put_((prompts, state), torch.ones_like(rewards), accumulate=True)
    return sums / counts.clamp(min=1)


def in_folds(sums, fit, gradients):
    """Each batch with a critic of the two others, and pairs within the batch."""
    for batch, others in enumerate([(1, 2), (0, 2), (0, 1)]):
        sums.add(gradients(batch, fit(*others)))
        sums.end_fold()
    return [1 / 3] * 3


def across_folds(sums, fit, gradients):
    """The same critics, and all pairs."""
    for batch, others in enumerate([(1, 2), (0, 2), (0, 1)]):
        sums.add(gradients(batch, fit(*others)))
    sums.end_fold()
    return [1 / 3] * 3


def on_the_same_batch(sums, fit, gradients):
    """Each batch with a critic that was fitted on it."""
    for batch in range(3):
        sums.add(gradients(batch, fit(batch)))
        sums.end_fold()
    return [1 / 3] * 3


def one_after_the_other(sums, fit, gradients):
    """Iterations, each with a critic of the earlier ones."""
    for batch in range(3):
        sums.add(gradients(batch, fit(*range(batch))))
        sums.end_iteration()
    # 6 * 5 pairs within each, 6 * 6 with each later iteration.
    return [102 / 198, 66 / 198, 30 / 198]


def both_ways(sums, fit, gradients):
    """The same iterations, as if their order did not matter."""
    for batch in range(3):
        sums.add(gradients(batch, fit(*range(batch))))
    sums.end_fold()
    return [1 / 3] * 3


def test_a_critic_of_other_folds_is_measured_without_bias():
    assert standard_errors(critic_draws(in_folds, 0.0), 0).max() < 3


def test_a_critic_of_earlier_iterations_is_measured_without_bias():
    # The norm is that of the sum of gradients, whose terms do have noise in common.
    assert standard_errors(critic_draws(one_after_the_other, 0.0), 0)[0] < 3


@pytest.mark.parametrize(
    ("plan", "gae_lambda"), [(on_the_same_batch, 0.7), (across_folds, 0.0), (both_ways, 0.0)]
)
def test_a_critic_that_has_seen_one_of_a_pair_is_seen_to_be_wrong(plan, gae_lambda):
    assert standard_errors(critic_draws(plan, gae_lambda), 0)[0] > 4


def test_a_window_is_measured_by_the_pairs_that_may_be_compared():
    generator = torch.Generator().manual_seed(2)
    iterations = torch.randn(4, 2, 5, 7, dtype=torch.float64, generator=generator) + 0.8
    sums = GradientAccumulator(["truth", "arm"], num_blocks=5)
    for truth, arm in iterations:
        sums.add({"truth": truth, "arm": arm})
        sums.end_iteration()
    found = gradient_quality(sums.pairs, num_batch_prompts=20)
    # The length is that of the sum of all gradients.
    exact = iterations.sum((0, 2))[1].square().sum() / 20**2
    assert found.arms["arm"].mean_square == pytest.approx(float(exact), rel=1e-12)
    prompts = list(itertools.product(range(4), range(5)))
    signal, alignment = [], []
    for (t, i), (s, j) in itertools.permutations(prompts, 2):
        signal.append(float(iterations[t, 0, i] @ iterations[s, 0, j]))
        if t <= s:
            alignment.append(float(iterations[t, 1, i] @ iterations[s, 0, j]))
    assert found.signal == pytest.approx(statistics.mean(signal), rel=1e-12)
    assert found.arms["arm"].alignment == pytest.approx(statistics.mean(alignment), rel=1e-12)


# Intervals


def test_the_interval_is_a_jackknife_of_the_formulas_in_loops():
    generator = torch.Generator().manual_seed(4)
    h, x = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator) * 0.3 + 1
    found = quality_ratio(
        pairs_of({"truth": h, "arm": x}, num_blocks=9), "arm", "truth", num_batch_prompts=4
    )

    def ratio(rows):
        def mean(a, b):
            return sum(float(a[i] @ b[j]) for i in rows for j in rows if i != j) / num_pairs

        def length(a):
            return sum(float(a[i] @ a[i]) for i in rows) / len(rows) / 4 + 0.75 * mean(a, a)

        num_pairs = len(rows) * (len(rows) - 1)
        return mean(x, h) / mean(h, h) * math.sqrt(length(h) / length(x))

    whole, left = ratio(range(7)), [ratio([i for i in range(7) if i != k]) for k in range(7)]
    corrected = 7 * whole - 6 * sum(left) / 7
    spread = math.sqrt(6 / 7 * sum((value - sum(left) / 7) ** 2 for value in left))
    half_width = 1.9432 * spread  # 95 % quantile of Student's distribution, 6 degrees of freedom
    assert found.log_ratio == pytest.approx(2 * math.log(corrected), rel=1e-12)
    assert found.interval == pytest.approx(
        (2 * math.log(corrected - half_width), 2 * math.log(corrected + half_width)), rel=1e-3
    )


def test_intervals_of_log_ratios_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(1)
    covered = dict.fromkeys(("grpo", "critic 1", "critic .7"), 0)
    for _ in range(300):
        pairs = drawn_pairs(generator, 96, arms=("leave one out", *covered))
        for arm in covered:
            exact = math.log(exact_quality(arm, 16) / exact_quality("leave one out", 16))
            found = quality_ratio(pairs, arm, "leave one out", num_batch_prompts=16)
            covered[arm] += found.interval.low <= exact <= found.interval.high
    assert all(0.85 * 300 <= number <= 0.96 * 300 for number in covered.values()), covered


def test_a_signal_is_seldom_seen_where_there_is_none():
    _, gradients, chances = all_groups()
    generator = torch.Generator().manual_seed(1)
    num_seen = 0
    for _ in range(200):
        drawn = torch.multinomial(chances, 24, replacement=True, generator=generator)
        signs = torch.randint(2, (24, 1), generator=generator) * 2.0 - 1
        pairs = pairs_of({"truth": gradients[0, drawn] * signs, "grpo": gradients[1, drawn]})
        found = gradient_quality(pairs, num_batch_prompts=16)
        ratio = quality_ratio(pairs, "grpo", "truth", num_batch_prompts=16)
        assert bool(found.arms) == (found.reason == "") and found.reason == ratio.reason
        num_seen += not found.reason
        if found.reason:
            assert found.reason == "the true gradient is not measurable with 24 prompts"
            assert math.isnan(ratio.log_ratio) and ratio.interval == (-math.inf, math.inf)
    assert num_seen <= 10


def test_random_projections_drown_the_signal():
    generator = torch.Generator().manual_seed(8)
    mu = torch.zeros(4096, dtype=torch.float64)
    mu[:64] = 1 / 8
    num_seen = [0, 0]
    for _ in range(10):
        noise = torch.randn(32, 4096, dtype=torch.float64, generator=generator) * 10 / 64
        gradients = mu + noise  # of the squared length, one part in 101 is signal
        directions = torch.randn(4096, 64, dtype=torch.float64, generator=generator) / 8
        for i, rows in enumerate((gradients, gradients @ directions)):
            num_seen[i] += not gradient_quality(
                pairs_of({"truth": rows}), num_batch_prompts=8
            ).reason
    assert num_seen[0] == 10 and num_seen[1] <= 6, num_seen


def test_an_arm_that_points_away_has_no_quality_and_any_ratio_below_is_possible():
    generator = torch.Generator().manual_seed(9)
    h = torch.randn(30, 5, dtype=torch.float64, generator=generator) * 0.3 + 1
    pairs = pairs_of({"truth": h, "away": -h, "across": h - h.mean()})
    found = gradient_quality(pairs, num_batch_prompts=8)
    assert (found.arms["away"].quality, found.arms["away"].interval) == (0.0, (0.0, 0.0))
    ratio = quality_ratio(pairs, "away", "truth", num_batch_prompts=8)
    assert (ratio.log_ratio, ratio.interval) == (-math.inf, (-math.inf, -math.inf))
    ratio = quality_ratio(pairs, "across", "truth", num_batch_prompts=8)
    assert ratio.interval.low == -math.inf and -20 < ratio.interval.high < -1
    ratio = quality_ratio(pairs, "truth", "away", num_batch_prompts=8)
    assert ratio.reason == (
        "away does not point along the true gradient, not measurable with 30 prompts"
    )


# The accumulator


def test_prompts_over_ranks_and_a_resumed_window_give_what_one_process_gives():
    generator = torch.Generator().manual_seed(6)
    iterations = torch.randn(3, 2, 8, 6, dtype=torch.float64, generator=generator)
    whole = GradientAccumulator(["truth", "arm"], num_blocks=4)
    ranks = [GradientAccumulator(["truth", "arm"], num_blocks=4) for _ in range(2)]
    for truth, arm in iterations:
        whole.add({"truth": truth, "arm": arm})
        whole.end_iteration()
        ranks[0].add({"truth": truth[:4], "arm": arm[:4]})
        for i in range(4, 8):
            ranks[1].add({"truth": truth[i], "arm": arm[i]})
        sums = both_ranks(ranks)
        for rank in ranks:
            rank.end_iteration(sums(rank))
        resumed = GradientAccumulator(["truth", "arm"], num_blocks=4)
        resumed.load_state_dict(ranks[0].state_dict())
        ranks[0] = resumed
    for rank in ranks:
        for name in ("alignment", "num_alignment", "norm", "num_norm", "squares", "num_prompts"):
            torch.testing.assert_close(getattr(rank.pairs, name), getattr(whole.pairs, name))
    whole.new_window()
    assert float(whole.pairs.num_prompts.sum()) == 0 and whole.state_dict()["earlier"] is None


def both_ranks(ranks):
    """Sums over two ranks that run one after the other: what each will contribute is copied."""
    parts = [
        [r._num_now.clone(), r._squares.clone(), r._own_alignment.clone(), *r._now.clone()]
        for r in ranks
    ]
    totals = [a + b for a, b in zip(*parts, strict=True)]

    def of(rank):
        remaining = iter(totals)
        return lambda tensor: next(remaining).clone()

    return of


def test_folds_add_up_and_half_precision_is_summed_exactly_enough():
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(2, 2, 9, 40, dtype=torch.float64, generator=generator) + 0.5
    sums = GradientAccumulator(["truth", "arm"], num_blocks=3)
    for truth, arm in rows:
        sums.add({"truth": truth, "arm": arm})
        sums.end_fold()
    parts = [pairs_of({"truth": truth, "arm": arm}, num_blocks=3) for truth, arm in rows]
    torch.testing.assert_close(sums.pairs.alignment, (parts[0] + parts[1]).alignment)
    single = pairs_of({"truth": rows[0, 0].float(), "arm": rows[0, 1].float()}, num_blocks=3)
    torch.testing.assert_close(single.norm, parts[0].norm, rtol=1e-5, atol=1e-4)


def test_the_block_of_each_prompt_is_told():
    sums = GradientAccumulator(["truth"], num_blocks=3)
    assert sums.add({"truth": torch.ones(2, 4)}).tolist() == [0, 1]
    assert sums.add({"truth": torch.ones(4)}).tolist() == [2]
    sums.end_iteration()
    assert sums.add({"truth": torch.ones(2, 4)}).tolist() == [0, 1]
    sums.end_iteration()
    resumed = GradientAccumulator(["truth"], num_blocks=3)
    resumed.load_state_dict(sums.state_dict())
    assert resumed.add({"truth": torch.ones(4)}).tolist() == [2]


def test_what_cannot_be_added_or_judged_is_named():
    with pytest.raises(ValueError, match="num_blocks is 2"):
        GradientAccumulator(["truth"], num_blocks=2)
    with pytest.raises(ValueError, match="name each once"):
        GradientAccumulator(["truth", "truth"])
    sums = GradientAccumulator(["truth", "arm"])
    with pytest.raises(RuntimeError, match="no prompt was added"):
        sums.end_fold()
    with pytest.raises(ValueError, match="expected"):
        sums.add({"truth": torch.ones(3)})
    with pytest.raises(ValueError, match="shapes"):
        sums.add({"truth": torch.ones(3), "arm": torch.ones(4)})
    with pytest.raises(ValueError, match="not finite"):
        sums.add({"truth": torch.ones(3), "arm": torch.tensor([0.0, math.nan, 0.0])})
    sums.add({"truth": torch.ones(3), "arm": torch.ones(3)})
    with pytest.raises(ValueError, match="4 parameters after 3"):
        sums.add({"truth": torch.ones(4), "arm": torch.ones(4)})
    with pytest.raises(RuntimeError, match="end the iteration"):
        sums.state_dict()
    sums.end_iteration()
    with pytest.raises(ValueError, match="saved were the arms"):
        GradientAccumulator(["truth"]).load_state_dict(sums.state_dict())
    with pytest.raises(ValueError, match="do not add up"):
        sums.pairs + PairSums.empty(["truth"], 16)
    with pytest.raises(ValueError, match="num_batch_prompts is 0"):
        gradient_quality(sums.pairs, num_batch_prompts=0)
    with pytest.raises(ValueError, match="'other' was not measured"):
        quality_ratio(sums.pairs, "other", "truth", num_batch_prompts=1)
    found = gradient_quality(sums.pairs, num_batch_prompts=1)
    assert found.reason == "the true gradient is not measurable with 1 prompts"
