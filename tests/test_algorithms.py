"""The algorithms as wholes: advantages, returns and losses of small rollouts, worked by hand."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_grpo.algorithms import CISPO, GRPO, GSPO, PPO, Algorithm, ReinforcePlusPlus
from lightning_grpo.masking import reduce_loss, reduction_count
from lightning_grpo.types import Rollout, select_rows

NAN = math.nan
ALL = [GRPO, GSPO, CISPO, ReinforcePlusPlus, PPO]
GROUP = [GRPO, GSPO, CISPO]
POISONS = [math.nan, math.inf, -math.inf, 1e4]
E1_REWARDS, E1_VALUES = [-0.1, -0.2, 1.0], [0.5, 0.4, 0.3]


def alone(tensor):
    """The sum over the ranks of a run of one process."""
    return tensor


def make_rollout(rewards, *, mask=None, groups=None, truncated=None, dtype=torch.float32, **fields):
    """A rollout of short completions; masks are strings such as "110", and one group is usual."""
    mask = mask or ["111"] * len(rewards)
    action_mask = torch.tensor([[c == "1" for c in row] for row in mask])
    zeros = torch.zeros(action_mask.shape)
    return Rollout(
        prompt_ids=torch.zeros(len(rewards), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(rewards), 1, dtype=torch.bool),
        completion_ids=zeros.long(),
        completion_mask=action_mask,
        action_mask=action_mask,
        sampler_logprobs=zeros,
        group_ids=torch.tensor(groups or [0] * len(rewards)),
        truncated=torch.tensor(truncated or [False] * len(rewards)),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        **{name: torch.tensor(value, dtype=dtype) for name, value in fields.items()},
    )


def prepared(algorithm, rollout, beta=0.0):
    return algorithm.prepare(rollout, beta=beta, sum_over_ranks=alone)


def first_column(rollout):
    return rollout.advantages[:, 0].tolist()


@pytest.mark.parametrize("algorithm", GROUP)
def test_a_group_advantage_goes_to_each_token_of_its_completion(algorithm):
    rollout = make_rollout([1, 0, 0, 1], mask=["111", "110", "101", "000"])
    found = prepared(algorithm(), rollout).advantages
    a = 0.8660254
    expected = [*[a, a, a], *[-a, -a, 0], *[-a, 0, -a], *[0, 0, 0]]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-7)
    assert found.dtype == torch.float32


def test_dr_grpo_is_linear_in_the_reward_and_grpo_is_not():
    dr_grpo = GRPO(scale="none", reduction="constant")
    assert first_column(prepared(dr_grpo, make_rollout([1, 2, 6]))) == [-2, -1, 3]
    assert first_column(prepared(dr_grpo, make_rollout([10, 20, 60]))) == [-20, -10, 30]
    once = first_column(prepared(GRPO(), make_rollout([1, 2, 6])))
    scaled = first_column(prepared(GRPO(), make_rollout([10, 20, 60])))
    assert scaled == pytest.approx(once, abs=1e-6)
    # sum over tokens / (completions * token limit): 3 and 1 tokens, limit 8
    mask = make_rollout([0, 0], mask=["111", "100"]).action_mask
    count = float(reduction_count(mask, dr_grpo.reduction, 8))
    loss = reduce_loss(torch.ones(2, 3), mask, dr_grpo.reduction, denominator=count)
    assert loss.item() == 4 / 16


def test_rloo_is_an_option_set_of_grpo():
    rloo = GRPO(baseline="leave_one_out", scale="none")
    assert first_column(prepared(rloo, make_rollout([1, 2, 4]))) == [-2, -0.5, 2.5]


def test_dapo_is_an_option_set_of_grpo():
    dapo = GRPO(clip_high=0.28, reduction="token", mask_truncated=True)
    rollout = prepared(dapo, make_rollout([1, 0], mask=["11", "11"]))
    rollout = rollout.replace(old_logprobs=torch.zeros(2, 2))
    ratios = torch.tensor([[1.25, 1.3], [0.75, 0.9]])
    output = dapo.loss(ratios.log(), rollout, beta=0.0)
    a = math.sqrt(0.5)
    expected = [-1.25 * a, -1.28 * a, 0.8 * a, 0.9 * a]
    assert output.per_token.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("algorithm", GROUP)
def test_overlong_filtering_leaves_loss_and_denominator_but_not_the_group(algorithm):
    rewards, truncated = [1, 0, 0, 1], [False, True, False, False]
    rollout = make_rollout(rewards, truncated=truncated)
    assert prepared(algorithm(), rollout).action_mask.all()
    found = prepared(algorithm(mask_truncated=True), rollout)
    assert found.action_mask.tolist() == [[True] * 3, [False] * 3, [True] * 3, [True] * 3]
    a = 0.8660254  # of the whole group: without row 1 it would be 0.57735 and -1.1547
    assert first_column(found) == pytest.approx([a, 0, -a, a], abs=1e-7)
    for reduction, count in [("token", 9), ("completion", 3), ("constant", 24)]:
        assert float(reduction_count(found.action_mask, reduction, 8)) == count


@pytest.mark.parametrize("reduction", ["completion", "token", "constant"])
def test_a_filtered_row_is_as_good_as_never_sampled(reduction):
    algorithm = GRPO(mask_truncated=True, reduction=reduction)
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(4, 3, generator=generator)
    truncated = [False, True, False, False]
    rollout = prepared(algorithm, make_rollout([1, 0, 0, 1], truncated=truncated))
    rollout = rollout.replace(old_logprobs=torch.zeros(4, 3))

    def reduced(rows):
        part = select_rows(rollout, torch.tensor(rows))
        count = float(reduction_count(part.action_mask, reduction, 8))
        per_token = algorithm.loss(logprobs[rows], part, beta=0.0).per_token
        return reduce_loss(per_token, part.action_mask, reduction, denominator=count).item()

    assert reduced([0, 1, 2, 3]) == pytest.approx(reduced([0, 2, 3]), abs=1e-7)


@pytest.mark.parametrize("algorithm", GROUP)
def test_with_the_kl_in_the_reward_groups_compare_reward_less_kl(algorithm):
    rollout = make_rollout(
        [1.0, 1.0, 3.0],
        mask=["110", "111", "000"],
        old_logprobs=[[-1, -1, NAN], [-1, -2, -3], [NAN] * 3],
        ref_logprobs=[[-2, -3, NAN], [-1, -1, -2], [NAN] * 3],
    )
    # KL 3, -2 and 0: what is compared is 0.7, 1.2, 3.0 with mean 4.9 / 3.
    found = prepared(algorithm(scale="none"), rollout, beta=0.1).advantages
    mean = 4.9 / 3
    expected = [*[0.7 - mean] * 2, 0, *[1.2 - mean] * 3, *[0] * 3]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_an_unscored_row_has_no_group_advantage():
    found = prepared(GRPO(), make_rollout([1, NAN, 0]))
    a = math.sqrt(0.5)
    assert first_column(found) == pytest.approx([a, 0, -a], abs=1e-6)


def test_reinforce_whitens_the_reward_to_go_over_all_tokens():
    rollout = make_rollout(
        [1.0, -1.0],
        mask=["110", "111"],
        old_logprobs=[[-1, -1, NAN], [-1, -2, -3]],
        ref_logprobs=[[-2, -3, NAN], [-1, -1, -1]],
    )
    # KL of row 0: 1, 2; of row 1: 0, -1, -2. With beta 0.1, reward less the KL from t on:
    to_go = [1 - 0.3, 1 - 0.2, -1 + 0.3, -1 + 0.3, -1 + 0.2]
    mean, std = statistics.fmean(to_go), statistics.stdev(to_go)
    expected = [(x - mean) / std for x in to_go]
    found = prepared(ReinforcePlusPlus(), rollout, beta=0.1)
    assert found.advantages[found.action_mask].tolist() == pytest.approx(expected, abs=1e-6)
    assert found.advantages[~found.action_mask].tolist() == [0.0]


def test_reinforce_with_a_baseline_subtracts_the_group_mean_first():
    rollout = make_rollout([1, 3, 10, 12], mask=["11", "10", "11", "10"], groups=[5, 5, 6, 6])
    centered = [-1, -1, 1, -1, -1, 1]
    mean, std = statistics.fmean(centered), statistics.stdev(centered)
    expected = [(x - mean) / std for x in centered]
    found = prepared(ReinforcePlusPlus(subtract_group_mean=True), rollout)
    assert found.advantages[found.action_mask].tolist() == pytest.approx(expected, abs=1e-6)
    without = prepared(ReinforcePlusPlus(), rollout)
    raw = [1, 1, 3, 10, 10, 12]
    expected = [(x - statistics.fmean(raw)) / statistics.stdev(raw) for x in raw]
    assert without.advantages[without.action_mask].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "algorithm", [ReinforcePlusPlus(), ReinforcePlusPlus(subtract_group_mean=True), PPO()]
)
def test_rows_without_a_reward_are_masked_and_change_nothing_else(algorithm):
    fields = {"values": [[0.5, 0.25, 0.0], [3.0, 9.0, NAN], [0.1, 0.2, 0.3]]}
    whole = prepared(algorithm, make_rollout([1, NAN, 0], **fields))
    assert whole.action_mask.tolist() == [[True] * 3, [False] * 3, [True] * 3]
    kept_values = [fields["values"][0], fields["values"][2]]
    kept = prepared(algorithm, make_rollout([1, 0], values=kept_values))
    assert torch.equal(whole.advantages[[0, 2]], kept.advantages)
    assert whole.advantages[1].tolist() == [0.0] * 3


def with_token_rewards(**fields):
    """The worked example: token rewards -.1, -.2, 1 as score 1.3 and a KL of .1, .2, .3."""
    return make_rollout(
        [1.3],
        old_logprobs=[[-1.0, -1.0, -1.0]],
        ref_logprobs=[[-1.1, -1.2, -1.3]],
        values=[E1_VALUES],
        dtype=torch.float64,
        **fields,
    )


def test_ppo_gives_the_worked_example_of_gae_with_the_kl_in_the_reward():
    found = prepared(PPO(whiten=False, critic_lambda=0.95), with_token_rewards(), beta=1.0)
    assert found.advantages[0].tolist() == pytest.approx([0.14675, 0.365, 0.7], abs=1e-6)
    assert found.returns[0].tolist() == pytest.approx([0.64675, 0.765, 1.0], abs=1e-6)
    discounted = PPO(whiten=False, gamma=0.9, gae_lambda=0.8)
    found = prepared(discounted, with_token_rewards(), beta=1.0)
    assert found.advantages[0].tolist() == pytest.approx([-0.11472, 0.174, 0.7], abs=1e-6)


def test_the_returns_use_the_critics_lambda_alone():
    for lam in (0.0, 0.5, 0.95):
        found = prepared(PPO(gae_lambda=lam), with_token_rewards(), beta=1.0)
        assert found.returns[0].tolist() == pytest.approx([0.7, 0.8, 1.0], abs=1e-6)
        assert found.returns.dtype == found.advantages.dtype == torch.float32
    low = prepared(PPO(critic_lambda=0.0), with_token_rewards(), beta=1.0)
    assert low.returns[0].tolist() == pytest.approx([0.3, 0.1, 1.0], abs=1e-6)


def test_whitening_changes_the_advantages_and_never_the_returns():
    plain = prepared(PPO(whiten=False), with_token_rewards(), beta=1.0)
    white = prepared(PPO(), with_token_rewards(), beta=1.0)
    expected = [-0.92283, -0.13965, 1.06249]
    assert white.advantages[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(white.returns, plain.returns)


def test_whitening_covers_the_tokens_of_all_ranks():
    rollout = make_rollout([1.0, 0.0], values=[[0.5] * 3, [0.25] * 3])
    sums = []

    def recorded(tensor):
        sums.append(tensor.clone())
        return 2 * tensor  # the other rank holds the same rows

    twice = PPO(gae_lambda=1.0).prepare(rollout, beta=0.0, sum_over_ranks=recorded)
    advantages = [0.5] * 3 + [-0.25] * 3
    std = statistics.stdev(advantages * 2)
    expected = [(a - 0.125) / std for a in advantages]
    assert twice.advantages.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert sums[0].tolist() == [6.0, 0.75]


def test_a_truncated_row_is_terminal_or_bootstrapped_by_option():
    options = {"whiten": False, "critic_lambda": 0.95}
    cut = with_token_rewards(truncated=[True], final_values=[0.25])
    terminal = prepared(PPO(**options), cut, beta=1.0)
    assert terminal.advantages[0].tolist() == pytest.approx([0.14675, 0.365, 0.7], abs=1e-6)
    bootstrap = PPO(**options, truncation="bootstrap")
    found = prepared(bootstrap, cut, beta=1.0)
    assert found.advantages[0].tolist() == pytest.approx([0.372375, 0.6025, 0.95], abs=1e-6)
    # A row that ended by itself has nothing to follow, whatever the critic says of its end.
    ended = with_token_rewards(final_values=[NAN])
    assert torch.equal(prepared(bootstrap, ended, beta=1.0).advantages, terminal.advantages)


@pytest.mark.parametrize(("penalty", "expected"), [(0.0, [1, 1, 0]), (1.0, [1, 0, -1])])
def test_the_penalty_lowers_the_score_of_truncated_rows_alone(penalty, expected):
    rollout = make_rollout([1, 1, 0], truncated=[False, True, True], values=[[0.0] * 3] * 3)
    found = prepared(PPO(truncation_penalty=penalty, whiten=False, gae_lambda=1.0), rollout)
    assert first_column(found) == expected
    assert found.returns[:, 2].tolist() == expected


def test_the_lambda_per_length_overrides_gae_lambda():
    # 4 and 2 tokens, alpha 0.5: lambda 0.5 and 0.
    masks = ["1111", "1100"]
    values = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 9.0, 9.0]]
    rollout = make_rollout([1, 1], mask=masks, values=values, dtype=torch.float64)
    found = prepared(PPO(length_adaptive_alpha=0.5, whiten=False), rollout).advantages
    long = [0.1 + 0.05 + 0.025 + 0.075, 0.1 + 0.05 + 0.15, 0.1 + 0.3, 0.6]
    assert found[0].tolist() == pytest.approx(long, abs=1e-6)
    assert found[1].tolist() == pytest.approx([0.1, 0.4, 0.0, 0.0], abs=1e-6)


def test_leave_one_out_scores_against_the_siblings_and_keeps_credit_per_token():
    values = [[0.0, 1.0, 0.0]] * 3
    rollout = make_rollout([1, 2, 4], values=values)
    algorithm = PPO(reward_baseline="leave_one_out", whiten=False, gae_lambda=0.0)
    found = prepared(algorithm, rollout)
    assert found.advantages.tolist() == [[1, -1, -2], [1, -1, -0.5], [1, -1, 2.5]]
    assert found.returns[:, 0].tolist() == [-2, -0.5, 2.5]
    # An offset that the prompt does not show is gone.
    shifted = prepared(algorithm, make_rollout([101, 102, 104], values=values))
    assert torch.equal(shifted.advantages, found.advantages)
    # The penalty comes first: it is compared like the rest of the score.
    cut = make_rollout([1, 2, 4], values=values, truncated=[False, False, True])
    penalized = dataclasses.replace(algorithm, truncation_penalty=2.0)
    assert prepared(penalized, cut).advantages[:, 2].tolist() == [-1, 0.5, 0.5]


def test_leave_one_out_leaves_unscored_siblings_out():
    rollout = make_rollout([1, NAN, 4], values=[[0.0] * 3] * 3)
    found = prepared(PPO(reward_baseline="leave_one_out", whiten=False), rollout)
    assert found.returns[:, 0].tolist() == [-3, 0, 3]
    assert found.action_mask.any(1).tolist() == [True, False, True]


def test_returns_alone_are_those_of_prepare():
    algorithm = PPO(truncation_penalty=0.5, reward_baseline="leave_one_out", critic_lambda=0.9)
    rollout = make_rollout(
        [1, 2, 4],
        mask=["111", "110", "101"],
        truncated=[False, True, False],
        values=[[0.1, 0.2, 0.3], [0.4, 0.5, NAN], [0.6, NAN, 0.7]],
        old_logprobs=[[-1.0, -2.0, -3.0]] * 3,
        ref_logprobs=[[-1.5, -1.5, -1.5]] * 3,
    )
    alone_returns = algorithm.returns(rollout, beta=0.1)
    assert torch.equal(alone_returns, prepared(algorithm, rollout, beta=0.1).returns)
    assert torch.all(alone_returns[~rollout.action_mask] == 0)
    assert not torch.equal(alone_returns, algorithm.returns(rollout, beta=0.0))


def test_the_target_of_a_row_without_a_reward_is_the_value_itself():
    rollout = make_rollout([1, NAN], mask=["11", "10"], values=[[0.5, 0.5], [0.25, NAN]])
    returns = PPO().returns(rollout, beta=0.0)
    assert returns.tolist() == [[1.0, 1.0], [0.25, 0.0]]


@pytest.mark.parametrize("poison", POISONS)
def test_no_padding_changes_a_bit_of_what_ppo_prepares(poison):
    mask = ["1110", "1010", "0000"]
    keep = torch.tensor([[c == "1" for c in row] for row in mask])
    generator = torch.Generator().manual_seed(0)
    names = ("values", "old_logprobs", "ref_logprobs")
    tensors = dict(zip(names, torch.randn(3, 3, 4, generator=generator)))

    def found(filling):
        rollout = make_rollout([1, 0, NAN], mask=mask).replace(
            **{name: x.masked_fill(~keep, filling) for name, x in tensors.items()}
        )
        return prepared(PPO(gamma=0.9), rollout, beta=0.1)

    clean, dirty = found(0.0), found(poison)
    assert torch.equal(clean.advantages, dirty.advantages)
    assert torch.equal(clean.returns, dirty.returns)


def test_the_value_loss_clips_around_the_values_of_the_rollout_unscaled():
    rollout = make_rollout([0], values=[[1.0, 1.0, 1.0]], returns=[[2.0, 0.0, 2.0]])
    values = torch.tensor([[1.5, 1.5, 1.1]])
    output = PPO().value_loss(values, rollout)
    assert output.per_token[0].tolist() == pytest.approx([0.32, 1.125, 0.405], abs=1e-6)
    unclipped = PPO(value_clip=None, value_coef=7.0).value_loss(values, rollout)
    assert unclipped.per_token[0].tolist() == pytest.approx([0.125, 1.125, 0.405], abs=1e-6)
    masked = rollout.replace(action_mask=torch.tensor([[True, False, False]]))
    assert PPO().value_loss(values, masked).per_token[0].tolist() == pytest.approx([0.32, 0, 0])


def loss_inputs(**changes):
    logprobs = torch.tensor([[-1.0, -2.0, NAN]], dtype=torch.float64, requires_grad=True)
    fields = {
        "advantages": torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64),
        "old_logprobs": torch.tensor([[-1.0, -2.0, NAN]], dtype=torch.float64),
        "ref_logprobs": torch.tensor([[-1.5, -2.0, NAN]], dtype=torch.float64),
    }
    return logprobs, make_rollout([0], mask=["110"]).replace(**fields | changes)


@pytest.mark.parametrize("algorithm", ALL)
def test_the_kl_and_the_entropy_enter_every_loss_with_their_signs(algorithm):
    logprobs, rollout = loss_inputs()
    plain = algorithm().loss(logprobs, rollout, beta=0.0)
    k3 = math.exp(-0.5) - 1 + 0.5
    with_kl = algorithm().loss(logprobs, rollout, beta=0.1)
    added = (with_kl.per_token - plain.per_token)[0].tolist()
    assert added == pytest.approx([0.1 * k3, 0.0, 0.0], abs=1e-14)
    entropy = torch.tensor([[0.5, 0.25, NAN]], dtype=torch.float64, requires_grad=True)
    bonus = algorithm(entropy_coef=0.2).loss(logprobs, rollout, beta=0.0, entropy=entropy)
    added = (bonus.per_token - plain.per_token)[0].tolist()
    assert added == pytest.approx([-0.1, -0.05, 0.0], abs=1e-14)
    (gradient,) = torch.autograd.grad(bonus.per_token.sum(), entropy, retain_graph=True)
    assert gradient[0].tolist() == [-0.2, -0.2, 0.0]
    (gradient,) = torch.autograd.grad(bonus.per_token.sum(), logprobs)
    assert gradient[0].tolist() == pytest.approx([-1.0, -1.0, 0.0], abs=1e-14)
    unused = algorithm().loss(logprobs, rollout, beta=0.0, entropy=entropy)
    assert torch.equal(unused.per_token, plain.per_token)


@pytest.mark.parametrize("algorithm", ALL)
def test_the_estimator_of_the_kl_is_an_option(algorithm):
    logprobs, rollout = loss_inputs()
    plain = algorithm().loss(logprobs, rollout, beta=0.0).per_token
    k2 = algorithm(kl_estimator="k2").loss(logprobs, rollout, beta=1.0).per_token
    assert (k2 - plain)[0].tolist() == pytest.approx([0.125, 0, 0], abs=1e-14)


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_kl_to_the_reference_is_logged_wherever_its_weight_is(algorithm, beta):
    logprobs, rollout = loss_inputs()
    k3 = math.exp(-0.5) - 1 + 0.5
    metrics = algorithm(kl_estimator="k1").loss(logprobs, rollout, beta=beta).metrics
    assert [t.item() for t in metrics["ref/kl"]] == pytest.approx([k3, 2])
    assert [t.item() for t in metrics["ref/kl_per_completion"]] == pytest.approx([k3, 1])
    logprobs, rollout = loss_inputs(ref_logprobs=None)
    assert "ref/kl" not in algorithm().loss(logprobs, rollout, beta=0.0).metrics


@pytest.mark.parametrize("algorithm", ALL)
def test_without_old_log_probs_the_ratio_is_1(algorithm):
    logprobs, rollout = loss_inputs(old_logprobs=None)
    output = algorithm().loss(logprobs, rollout, beta=0.0)
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    assert gradient[0].tolist() == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("algorithm", ALL)
def test_what_is_missing_is_named(algorithm):
    options = {"values": [[0.0] * 3] * 2}
    rollout = make_rollout([1, 0], **options)
    with pytest.raises(ValueError, match="rewards"):
        prepared(algorithm(), rollout.replace(rewards=None))
    with pytest.raises(ValueError, match="old_logprobs"):
        prepared(algorithm(), rollout, beta=0.1)
    with pytest.raises(ValueError, match="ref_logprobs"):
        prepared(algorithm(), rollout.replace(old_logprobs=torch.zeros(2, 3)), beta=0.1)
    logprobs, rollout = loss_inputs(ref_logprobs=None)
    with pytest.raises(ValueError, match="ref_logprobs"):
        algorithm().loss(logprobs, rollout, beta=0.1)
    with pytest.raises(ValueError, match="entropy"):
        algorithm(entropy_coef=0.1).loss(logprobs, rollout, beta=0.0)
    with pytest.raises(ValueError, match="advantages"):
        algorithm().loss(logprobs, rollout.replace(advantages=None), beta=0.0)


def test_ppo_names_the_values_that_it_misses():
    rollout = make_rollout([1, 0])
    with pytest.raises(ValueError, match="no values: PPO needs the critic"):
        prepared(PPO(), rollout)
    with pytest.raises(ValueError, match="no values"):
        PPO().returns(rollout, beta=0.0)
    with pytest.raises(ValueError, match="no values"):
        PPO().value_loss(torch.zeros(2, 3), rollout)
    rollout = rollout.replace(values=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="final_values"):
        prepared(PPO(truncation="bootstrap"), rollout)
    with pytest.raises(ValueError, match="no returns"):
        PPO().value_loss(torch.zeros(2, 3), rollout)


def test_groups_of_one_are_refused_where_siblings_are_compared():
    for algorithm in (
        *(kind() for kind in GROUP),
        ReinforcePlusPlus(subtract_group_mean=True),
        PPO(reward_baseline="leave_one_out"),
    ):
        with pytest.raises(ValueError, match="rollout.group_size is 1"):
            algorithm.check_group_size(1)
        algorithm.check_group_size(2)
    for algorithm in (ReinforcePlusPlus(), PPO()):
        algorithm.check_group_size(1)


BAD_OPTIONS = {
    "clip_low": (0.0, 1.0, NAN),
    "clip_high": (0.0, -0.1, NAN),
    "sequence_clip_low": (0.0, 1.0, NAN),
    "sequence_clip_high": (0.0, -0.1, NAN),
    "max_weight": (1.0, NAN),
    "dual_clip": (1.0, NAN),
    "entropy_coef": (-0.1, NAN),
    "baseline": ("median",),
    "scale": ("max",),
    "reduction": ("mean",),
    "kl_estimator": ("k4",),
    "value_clip": (0.0, -1.0, NAN),
    "value_coef": (-0.1, NAN),
    "gamma": (-0.1, 1.1, NAN),
    "gae_lambda": (-0.1, 1.1, NAN),
    "critic_lambda": (-0.1, 1.1, NAN),
    "length_adaptive_alpha": (0.0, -1.0, NAN),
    "truncation": ("ignore",),
    "truncation_penalty": (-0.1, NAN),
    "reward_baseline": ("group_mean",),
}


@pytest.mark.parametrize("algorithm", ALL)
def test_an_option_out_of_its_range_is_refused_by_name(algorithm):
    for field in dataclasses.fields(algorithm):
        if field.name in ("whiten", "mask_truncated", "subtract_group_mean"):
            continue
        for value in BAD_OPTIONS[field.name]:
            with pytest.raises(ValueError, match=f"^{field.name} "):
                algorithm(**{field.name: value})


@pytest.mark.parametrize("algorithm", ALL)
def test_the_defaults(algorithm):
    found = {name: getattr(algorithm(), name) for name in ("reduction", "entropy_coef")}
    over_completions = algorithm in (GRPO, GSPO)
    assert found == {
        "reduction": "completion" if over_completions else "token",
        "entropy_coef": 0.0,
    }
    bounds = {
        GSPO: {"sequence_clip_low": 3e-4, "sequence_clip_high": 4e-4},
        CISPO: {"max_weight": 5.0},
    }.get(algorithm, {"clip_low": 0.2, "clip_high": 0.2})
    assert {name: getattr(algorithm(), name) for name in bounds} == bounds
    assert algorithm().kl_estimator == "k3"


def test_the_defaults_of_ppo():
    assert dataclasses.asdict(PPO()) == {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "value_clip": 0.2,
        "value_coef": 0.5,
        "entropy_coef": 0.0,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "critic_lambda": 1.0,
        "length_adaptive_alpha": None,
        "whiten": True,
        "truncation": "terminal",
        "truncation_penalty": 0.0,
        "reward_baseline": "none",
        "reduction": "token",
        "kl_estimator": "k3",
    }


def test_each_policy_loss_is_the_algorithms_own():
    # Ratios 1.21 and 1 of one completion with A = 1; GSPO sees 1.1 twice.
    logprobs = torch.tensor([[1.21, 1.0]], dtype=torch.float64).log()
    rollout = make_rollout([0], mask=["11"]).replace(
        advantages=torch.ones(1, 2).double(), old_logprobs=torch.zeros(1, 2).double()
    )
    expected = {
        GRPO(): [-1.2, -1.0],
        GRPO(clip_high=0.3): [-1.21, -1.0],
        GSPO(): [-1.0004, -1.0004],
        GSPO(sequence_clip_high=0.2): [-1.1, -1.1],
        CISPO(): [-1.21 * math.log(1.21), 0.0],
        CISPO(max_weight=1.1): [-1.1 * math.log(1.21), 0.0],
        ReinforcePlusPlus(): [-1.2, -1.0],
        ReinforcePlusPlus(clip_high=0.3): [-1.21, -1.0],
        PPO(): [-1.2, -1.0],
        PPO(clip_high=0.3): [-1.21, -1.0],
    }
    for algorithm, per_token in expected.items():
        found = algorithm.loss(logprobs, rollout, beta=0.0).per_token[0].tolist()
        assert found == pytest.approx(per_token, abs=1e-12), algorithm
    negative = rollout.replace(advantages=-rollout.advantages)
    low = torch.tensor([[0.5, 5.0]], dtype=torch.float64).log()
    for kind in (GRPO, ReinforcePlusPlus, PPO):
        found = kind(clip_low=0.4, dual_clip=3.0).loss(low, negative, beta=0.0)
        assert found.per_token[0].tolist() == pytest.approx([0.6, 3.0], abs=1e-12)


@pytest.mark.parametrize("algorithm", ALL)
def test_every_algorithm_can_be_named_in_a_config(algorithm):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    path = f"lightning_grpo.algorithms.{algorithm.__name__}"
    config = parser.parse_args([f"--algorithm={path}", "--algorithm.entropy_coef=0.25"])
    assert config.algorithm.init_args.entropy_coef == 0.25


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_an_exact_critic_has_no_error_at_the_prompt_whatever_shapes_the_reward(baseline):
    """Two groups of two tokens each; KL in the reward, a penalty and a discount."""
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    scores = torch.tensor([3.0, 3.0, 5.0, 5.0], dtype=torch.float64)
    kl = torch.tensor([[0.2, 0.4], [0.6, 9.0], [0.0, 0.0], [0.0, 0.0]])
    truncated = torch.tensor([False, False, True, True])
    # beta 0.5, gamma 0.5, penalty 1: sum of gamma^t times what each token brings.
    totals = [-0.1 + 0.5 * (3 - 0.2), 3 - 0.3, 0.5 * (5 - 1), 0.5 * (5 - 1)]
    siblings = [totals[1], totals[0], totals[3], totals[2]]
    expected = torch.tensor(totals, dtype=torch.float64)
    values = expected if baseline == "none" else expected - torch.tensor(siblings).double()
    rollout = Rollout(
        prompt_ids=torch.zeros(4, 1, dtype=torch.int64),
        prompt_mask=torch.ones(4, 1, dtype=torch.bool),
        completion_ids=torch.zeros(4, 2, dtype=torch.int64),
        completion_mask=mask,
        action_mask=mask,
        sampler_logprobs=torch.zeros(4, 2),
        group_ids=torch.tensor([0, 0, 1, 1]),
        truncated=truncated,
        rewards=scores,
        old_logprobs=kl,
        ref_logprobs=torch.zeros(4, 2),
        values=torch.stack([values, torch.zeros(4).double()], dim=1).float(),
    )
    ppo = PPO(gamma=0.5, truncation_penalty=1.0, reward_baseline=baseline, gae_lambda=0.3)
    target, prediction = ppo.at_prompt(rollout, beta=0.5)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction, expected, rtol=1e-6, atol=1e-6)
    unscored = rollout.replace(rewards=torch.tensor([3.0, math.nan, 5.0, 5.0]).double())
    assert ppo.at_prompt(unscored, beta=0.5)[0].isnan().tolist() == [False, True, False, False]


def test_an_option_of_one_algorithm_means_the_same_in_every_other_that_takes_it():
    """The command line carries options over when the algorithm changes, GRPO's defaults too."""
    defaults = {f.name: f.default for f in dataclasses.fields(GRPO)}
    for algorithm in (GSPO, CISPO, ReinforcePlusPlus):
        for field in dataclasses.fields(algorithm):
            assert field.default == defaults.get(field.name, field.default), (algorithm, field.name)
