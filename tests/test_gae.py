"""Token rewards and GAE against hand-worked values, a plain Python double loop, and enumeration."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from lightning_grpo.gae import gae, length_adaptive_lambda, token_rewards

NAN = math.nan
POISONS = [math.nan, math.inf, -math.inf, 1e4, -1e4]
REWARDS, VALUES = [-0.1, -0.2, 1.0], [0.5, 0.4, 0.3]


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def mask_of(*strings):
    """A mask from strings such as "110", 1 for True."""
    return torch.tensor([[c == "1" for c in string] for string in strings])


def one_row(rewards, values, mask, **options):
    return gae(rows(rewards), rows(values), mask_of(mask), **options)[0].tolist()


def by_double_loop(rewards, values, mask, gamma, lam, final=0.0):
    """The definition, a sum over all later tokens, on Python floats; holes are dropped first."""
    steps = [t for t, m in enumerate(mask) if m]
    v = [values[t] for t in steps] + [final]
    found = [0.0] * len(mask)
    for i, t in enumerate(steps):
        for j in range(i, len(steps)):
            delta = rewards[steps[j]] + gamma * v[j + 1] - v[j]
            found[t] += (gamma * lam) ** (j - i) * delta
    return found


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages"),
    [
        (1.0, 0.95, [0.14675, 0.365, 0.7]),
        (1.0, 1.0, [0.2, 0.4, 0.7]),
        (1.0, 0.0, [-0.2, -0.3, 0.7]),
        (0.9, 0.8, [-0.11472, 0.174, 0.7]),
    ],
)
def test_the_worked_example_of_gae(gamma, lam, advantages):
    found = one_row(REWARDS, VALUES, "111", gamma=gamma, gae_lambda=lam)
    assert found == pytest.approx(advantages, abs=1e-12)


def test_the_returns_of_the_worked_example_are_advantage_plus_value():
    found = one_row(REWARDS, VALUES, "111", gamma=1.0, gae_lambda=0.95)
    returns = [a + v for a, v in zip(found, VALUES)]
    assert returns == pytest.approx([0.64675, 0.765, 1.0], abs=1e-12)


def test_a_cut_row_is_bootstrapped_from_the_state_after_its_last_token():
    found = one_row(REWARDS, VALUES, "111", gamma=1.0, gae_lambda=0.95, final_values=rows(0.25))
    assert found == pytest.approx([0.372375, 0.6025, 0.95], abs=1e-12)
    # The state after the last token, not a column: padding behind it is not looked at.
    padded = one_row(
        [*REWARDS, NAN],
        [*VALUES, 77.0],
        "1110",
        gamma=1.0,
        gae_lambda=0.95,
        final_values=rows(0.25),
    )
    assert padded == [*found, 0.0]


def test_final_values_are_discounted():
    found = one_row([0.0], [0.0], "1", gamma=0.9, gae_lambda=0.5, final_values=rows(2.0))
    assert found == pytest.approx([1.8], abs=1e-15)


def test_zero_final_values_are_a_terminal_state():
    options = {"gamma": 0.9, "gae_lambda": 0.7}
    terminal = one_row(REWARDS, VALUES, "111", **options)
    assert one_row(REWARDS, VALUES, "111", **options, final_values=rows(0.0)) == terminal


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.3, 0.0])
def test_random_ragged_batches_with_holes_match_the_double_loop(gamma, lam):
    draw = random.Random(f"{gamma}/{lam}")
    shape = (6, 9)
    rewards, values = (
        [[draw.uniform(-2, 2) for _ in range(shape[1])] for _ in range(shape[0])] for _ in range(2)
    )
    mask = [[draw.random() < 0.6 for _ in range(shape[1])] for _ in range(shape[0])]
    mask[0], mask[1] = [True] * shape[1], [False] * shape[1]
    final = [draw.uniform(-2, 2) for _ in range(shape[0])]
    found = gae(
        rows(*rewards),
        rows(*values),
        torch.tensor(mask),
        gamma=gamma,
        gae_lambda=lam,
        final_values=torch.tensor(final, dtype=torch.float64),
    )
    for b in range(shape[0]):
        expected = by_double_loop(rewards[b], values[b], mask[b], gamma, lam, final[b])
        assert found[b].tolist() == pytest.approx(expected, abs=1e-12)


def test_lambda_1_is_the_return_less_the_value():
    rewards, values = [0.3, -1.0, 2.0, 0.5], [9.0, -7.0, 5.0, 3.0]
    found = one_row(rewards, values, "1111", gamma=1.0, gae_lambda=1.0)
    to_go = [1.8, 1.5, 2.5, 0.5]
    assert found == pytest.approx([g - v for g, v in zip(to_go, values)], abs=1e-12)


def test_each_row_can_have_its_own_lambda():
    lambdas = [0.0, 0.5, 1.0]
    together = gae(
        rows(*[REWARDS] * 3),
        rows(*[VALUES] * 3),
        mask_of(*["111"] * 3),
        gamma=1.0,
        gae_lambda=rows(*lambdas),
    )
    for lam, found in zip(lambdas, together.tolist()):
        assert found == one_row(REWARDS, VALUES, "111", gamma=1.0, gae_lambda=lam)


def random_batch():
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    mask = mask_of("1111111", "1110000", "1011010", "0000000")
    return rewards, values, mask


@pytest.mark.parametrize("poison", POISONS)
def test_nothing_under_the_mask_changes_a_bit_of_the_advantages(poison):
    rewards, values, mask = random_batch()
    final = torch.tensor([0.1, 0.2, 0.3, poison], dtype=torch.float64)  # row 3 has no token
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    clean = gae(rewards, values, mask, **options, final_values=final.nan_to_num(0.4, 0.4, 0.4))
    dirty = [x.masked_fill(~mask, poison) for x in (rewards, values)]
    assert torch.equal(gae(*dirty, mask, **options, final_values=final), clean)
    assert torch.all(clean[~mask] == 0)


def test_a_batch_is_its_rows_and_padding_is_free():
    rewards, values, mask = random_batch()
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    whole = gae(rewards, values, mask, **options)
    for b in range(4):
        row = gae(rewards[b : b + 1], values[b : b + 1], mask[b : b + 1], **options)
        assert torch.equal(row[0], whole[b])
    short = gae(rewards[1:2, :3], values[1:2, :3], mask[1:2, :3], **options)
    assert torch.equal(short, whole[1:2, :3])


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("num_observed", [1, 4])
def test_inserting_observations_leaves_the_other_advantages_unchanged(place, num_observed):
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    plain = one_row(REWARDS, VALUES, "111", **options)
    gap = [55.0] * num_observed

    def insert(items, filling):
        return [*items[:place], *filling, *items[place:]]

    mask = "".join(insert(list("111"), ["0"] * num_observed))
    found = one_row(insert(REWARDS, gap), insert(VALUES, gap), mask, **options)
    assert found == insert(plain, [0.0] * num_observed)


def test_the_dtype_is_the_wider_one_and_nothing_has_a_gradient():
    mask = mask_of("11")
    for dtypes, expected in [
        ((torch.float32, torch.float32), torch.float32),
        ((torch.float64, torch.float32), torch.float64),
        ((torch.float32, torch.float64), torch.float64),
    ]:
        rewards, values = (torch.ones(1, 2, dtype=d, requires_grad=True) for d in dtypes)
        found = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
        assert found.dtype == expected
        assert not found.requires_grad


def additive_tree(num_tokens, step, noise):
    """All rows of a tree: each token adds +-step to the reward, and the end +-noise."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=num_tokens + 1))).double()
    terms = signs[:, :num_tokens] * step
    mask = torch.ones(terms.shape, dtype=torch.bool)
    rewards = token_rewards(terms.sum(1) + signs[:, num_tokens] * noise, mask)
    # What is known before a token is the sum of the terms before it; the rest has mean 0.
    values = terms.cumsum(1) - terms
    return rewards, values, mask


def variances(lam):
    rewards, values, mask = additive_tree(num_tokens=4, step=math.sqrt(0.7), noise=math.sqrt(0.3))
    advantages = gae(rewards, values, mask, gamma=1.0, gae_lambda=lam)
    assert advantages.mean(0).tolist() == pytest.approx([0.0] * 4, abs=1e-14)
    return advantages.square().mean(0).tolist()


def test_with_an_exact_critic_lambda_trades_the_variance_of_later_tokens_away():
    v, n, num_tokens = 0.7, 0.3, 4
    # Lambda 1: all that follows. Lambda 0: the token itself, and the noise at the last one.
    assert variances(1.0) == pytest.approx([4 * v + n, 3 * v + n, 2 * v + n, v + n], abs=1e-12)
    assert variances(0.0) == pytest.approx([v, v, v, v + n], abs=1e-12)
    for lam in (0.3, 0.95):
        expected = [
            v * sum(lam ** (2 * i) for i in range(num_tokens - t))
            + n * lam ** (2 * (num_tokens - 1 - t))
            for t in range(num_tokens)
        ]
        assert variances(lam) == pytest.approx(expected, abs=1e-12)


def test_with_an_exact_critic_the_variance_grows_with_lambda():
    table = [variances(lam) for lam in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)]
    for lower, higher in itertools.pairwise(table):
        assert all(a < b for a, b in zip(lower[:-1], higher[:-1]))
        assert lower[-1] == pytest.approx(higher[-1], abs=1e-14)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("1000", [7, 0, 0, 0]),  # a lone EOS
        ("1100", [0, 7, 0, 0]),  # EOS, then padding
        ("1111", [0, 0, 0, 7]),  # cut off, or EOS at the very end
        ("1011", [0, 0, 0, 7]),  # an observation inside
        ("1010", [0, 0, 7, 0]),
        ("0100", [0, 7, 0, 0]),
        ("0000", [0, 0, 0, 0]),
    ],
)
def test_the_score_goes_to_the_last_token(mask, expected):
    assert token_rewards(rows(7.0), mask_of(mask)).tolist() == [expected]


def test_a_row_without_tokens_has_no_reward_even_when_its_score_is_missing():
    found = token_rewards(rows(NAN, 2.0, math.inf), mask_of("00", "10", "00"))
    assert found.tolist() == [[0, 0], [2, 0], [0, 0]]


def test_the_kl_is_k1_on_each_token_and_the_score_on_top_of_it_at_the_last():
    old, ref = rows([-1.0, -2.0, -3.0, -4.0]), rows([-1.5, -1.0, -3.25, 5.0])
    found = token_rewards(rows(10.0), mask_of("1110"), old_logprobs=old, ref_logprobs=ref, beta=0.1)
    assert found[0].tolist() == pytest.approx([-0.05, 0.1, 9.975, 0.0], abs=1e-12)


@pytest.mark.parametrize("poison", POISONS)
def test_log_probs_under_the_mask_change_no_bit_of_the_rewards(poison):
    generator = torch.Generator().manual_seed(0)
    old, ref = torch.randn(2, 3, 4, generator=generator)
    mask = mask_of("1110", "1010", "0000")

    def found(value):
        tensors = {
            "old_logprobs": old.masked_fill(~mask, value),
            "ref_logprobs": ref.masked_fill(~mask, -value),
        }
        return token_rewards(rows(1.0, 2.0, NAN), mask, **tensors, beta=0.5)

    clean = found(0.0)
    assert torch.equal(found(poison), clean)
    assert torch.all(clean[~mask] == 0)


def test_token_rewards_are_constants_in_the_dtype_of_the_rewards():
    old = torch.zeros(1, 2, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        found = token_rewards(
            torch.ones(1, dtype=dtype),
            mask_of("11"),
            old_logprobs=old,
            ref_logprobs=torch.ones(1, 2),
            beta=0.5,
        )
        assert found.dtype == dtype
        assert not found.requires_grad


def test_without_beta_the_log_probs_are_not_read():
    nothing = torch.full((1, 2), NAN)
    found = token_rewards(rows(3.0), mask_of("11"), old_logprobs=nothing, ref_logprobs=nothing)
    assert found.tolist() == [[0.0, 3.0]]


@pytest.mark.parametrize(
    ("length", "lam"), [(25, 0.2), (100, 0.8), (400, 0.95), (20, 0.0), (10, 0.0), (0, 0.0)]
)
def test_the_length_adaptive_lambda_of_the_paper_is_clamped(length, lam):
    mask = torch.arange(400) < length
    found = length_adaptive_lambda(mask.unsqueeze(0), 0.05)
    assert found.tolist() == pytest.approx([lam], abs=1e-12)
    assert found.dtype == torch.float64


def test_the_length_is_that_of_the_mask_with_its_holes():
    found = length_adaptive_lambda(mask_of("11011", "10000"), 0.5)
    assert found.tolist() == pytest.approx([0.5, 0.0], abs=1e-12)


def test_wrong_shapes_scores_and_options_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    options = {"gamma": 1.0, "gae_lambda": 1.0}
    for name in options:
        for value in (-0.1, 1.1, NAN):
            with pytest.raises(ValueError, match=name):
                gae(x, x, mask, **options | {name: value})
    with pytest.raises(ValueError, match="gae_lambda"):
        gae(x, x, mask, gamma=1.0, gae_lambda=torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="gae_lambda"):
        gae(x, x, mask, gamma=1.0, gae_lambda=torch.ones(3))
    with pytest.raises(ValueError, match="final_values"):
        gae(x, x, mask, **options, final_values=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="values"):
        gae(x, x[:, :2], mask, **options)
    with pytest.raises(ValueError, match="token_rewards"):
        gae(x[:, :2], x, mask, **options)
    with pytest.raises(ValueError, match="bool"):
        gae(x, x, mask.float(), **options)
    for bad in (NAN, math.inf, -math.inf):
        with pytest.raises(ValueError, match="row 1"):
            token_rewards(rows(0.0, bad), mask)
    with pytest.raises(ValueError, match=r"\(B,\)"):
        token_rewards(torch.zeros(2, 3), mask)
    with pytest.raises(ValueError, match="bool"):
        token_rewards(rows(0.0, 0.0), mask.float())
    for value in (-0.1, NAN):
        with pytest.raises(ValueError, match="beta"):
            token_rewards(rows(0.0, 0.0), mask, old_logprobs=x, ref_logprobs=x, beta=value)
    for given in ("old_logprobs", "ref_logprobs"):
        with pytest.raises(ValueError, match="ref_logprobs"):
            token_rewards(rows(0.0, 0.0), mask, beta=0.1, **{given: x})
    for value in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="alpha"):
            length_adaptive_lambda(mask, value)
    with pytest.raises(ValueError, match="bool"):
        length_adaptive_lambda(mask.float(), 0.05)
