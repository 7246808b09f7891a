"""The shadow critic: against least squares on the same rows, in pieces, and before it has learned."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_grpo.shadow_critic import ShadowCritic, regression_sums

NUM_FEATURES = 5


def iterations(num_iterations=4, *, seed=0, noise=1.0, num_rows=6):
    """(states, returns, mask) of each iteration: features of very different sizes, an offset."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1e-3, 1.0, 50.0, 1.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([500.0, 1.0, 0.0, -2.0, 0.1], dtype=torch.float64)
    found = []
    for _ in range(num_iterations):
        states = torch.randn(num_rows, 7, 5, dtype=torch.float64, generator=generator) * scale
        states = states + scale * 3
        error = torch.randn(num_rows, 7, dtype=torch.float64, generator=generator)
        returns = 10 + states @ weights + noise * error
        mask = torch.rand(num_rows, 7, generator=generator) < 0.7
        found.append((states, returns, mask))
    return found


def critic_of(rounds, **options):
    critic = ShadowCritic(NUM_FEATURES, **options)
    for batch in rounds:
        critic.update(regression_sums(*batch))
    return critic


def test_sums_are_those_of_all_products_over_tokens():
    states = torch.tensor([[[2.0], [3.0]], [[5.0], [7.0]]])
    returns = torch.tensor([[1.0, 10.0], [-1.0, 4.0]])
    mask = torch.tensor([[True, True], [True, False]])
    expected = torch.tensor([[38.0, 10, 27], [10, 3, 10], [27, 10, 102]]).double()
    assert torch.equal(regression_sums(states, returns, mask), expected)
    many = [torch.cat([tensor] * 1500) for tensor in (states, returns, mask)]  # 4,500 tokens
    assert torch.equal(regression_sums(*many), 1500 * expected)


@pytest.mark.parametrize("ridge", [1e-12, 0.3])
def test_values_are_those_of_weighted_least_squares(ridge):
    rounds = iterations()
    critic = critic_of(rounds, decay=0.5, ridges=[ridge])
    x = torch.cat([states[mask] for states, _, mask in rounds])
    y = torch.cat([returns[mask] for _, returns, mask in rounds])
    w = torch.cat(
        [torch.full((int(m.sum()),), 0.5 ** (3 - i)) for i, (_, _, m) in enumerate(rounds)]
    )
    w = w.double()
    # Ridge regression is least squares with a row more for each feature.
    mean = (w @ x) / w.sum()
    variance = (w @ (x - mean).square()) / w.sum()
    penalty = (ridge * w.sum() * variance).sqrt().diag()
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    rows = w.sqrt().unsqueeze(1) * torch.cat([x, ones], dim=1)
    rows = torch.cat([rows, torch.cat([penalty, torch.zeros(5, 1).double()], dim=1)])
    targets = torch.cat([w.sqrt() * y, torch.zeros(5, dtype=torch.float64)])
    beta = torch.linalg.lstsq(rows, targets.unsqueeze(1), driver="gelsd").solution[:, 0]
    new, _, _ = iterations(seed=9)[0]
    expected = new @ beta[:-1] + beta[-1]
    torch.testing.assert_close(critic.values(new), expected, rtol=1e-7, atol=1e-7)


def test_before_it_has_learned_values_are_0_and_nothing_is_known_of_them():
    critic = ShadowCritic(NUM_FEATURES)
    states, returns, mask = iterations(1)[0]
    assert not critic.has_learned and math.isnan(critic.explained_var)
    assert torch.equal(critic.values(states), torch.zeros(6, 7, dtype=torch.float64))
    critic.update(regression_sums(states, returns, torch.zeros_like(mask)))
    assert not critic.has_learned
    critic.update(regression_sums(states, returns, mask))
    assert critic.has_learned and math.isnan(critic.explained_var)
    assert critic.values(states[0, 0]).shape == ()


def test_tokens_over_ranks_and_a_restored_state_give_what_one_process_gives():
    rounds = iterations()
    whole, split = critic_of(rounds), ShadowCritic(NUM_FEATURES)
    for states, returns, mask in rounds:
        parts = [
            regression_sums(states[rows], returns[rows], mask[rows])
            for rows in (slice(0, 2), slice(2, 6))
        ]
        split.update(parts[0] + parts[1])
        restored = ShadowCritic(NUM_FEATURES)
        restored.load_state_dict(split.state_dict())
        split = restored
    states = rounds[0][0]
    torch.testing.assert_close(split.values(states), whole.values(states), rtol=1e-10, atol=1e-10)
    assert split.explained_var == pytest.approx(whole.explained_var, rel=1e-10)
    assert split.ridge == whole.ridge


def test_explained_variance_is_that_of_iterations_not_yet_fitted():
    rounds = iterations(3)
    critic = critic_of(rounds, decay=0.8, ridges=[0.1])
    residual, spread = 0.0, 0.0
    for i in (1, 2):
        states, returns, mask = rounds[i]
        before = critic_of(rounds[:i], decay=0.8, ridges=[0.1])
        y = returns[mask]
        age = 0.8 ** (2 - i)
        residual += age * float((y - before.values(states)[mask]).square().sum())
        spread += age * float((y - y.mean()).square().sum())
    assert critic.explained_var == pytest.approx(1 - residual / spread, rel=1e-9)


@pytest.mark.parametrize(("noise", "best"), [(1e-3, {1e-4}), (30.0, {1e-2, 1.0, 100.0})])
def test_the_ridge_is_the_one_that_predicts_best(noise, best):
    rounds = iterations(5, noise=noise, num_rows=2)
    alone = {r: critic_of(rounds, ridges=[r]).explained_var for r in (1e-4, 1e-2, 1.0, 100.0)}
    critic = critic_of(rounds)
    assert critic.ridge == max(alone, key=alone.get) and critic.ridge in best
    assert critic.explained_var == pytest.approx(max(alone.values()), rel=1e-9)


def test_more_features_than_tokens_can_be_fitted():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 10, 80, generator=generator) + 100
    returns = torch.randn(1, 10, generator=generator)
    critic = ShadowCritic(80, ridges=[1e-6])
    critic.update(regression_sums(states, returns, torch.ones(1, 10, dtype=torch.bool)))
    torch.testing.assert_close(critic.values(states), returns.double(), rtol=0, atol=1e-4)


def test_constant_features_and_equal_states_of_any_size_do_no_harm():
    states, returns, mask = iterations(1, noise=0.0)[0]
    states = torch.cat([states, states[..., :1], torch.full((6, 7, 1), 1e4).double()], dim=2)
    critic = ShadowCritic(7, ridges=[1e-9])
    critic.update(regression_sums(states, returns, mask))
    torch.testing.assert_close(critic.values(states), returns, rtol=1e-6, atol=1e-6)
    same = torch.ones(6, 7, 7)
    critic = ShadowCritic(7)
    critic.update(regression_sums(same.bfloat16(), returns, mask))
    expected = float(returns[mask].mean())
    assert critic.values(same)[0, 0] == pytest.approx(expected, rel=1e-12)


def test_masked_tokens_may_hold_anything():
    states, returns, mask = iterations(1)[0]
    expected = regression_sums(states, returns, mask)
    states[~mask], returns[~mask] = math.nan, math.inf
    assert torch.equal(regression_sums(states, returns, mask), expected)


def test_what_cannot_be_fitted_is_named():
    states, returns, mask = iterations(1)[0]
    with pytest.raises(ValueError, match="must be"):
        regression_sums(states, returns, mask.float())
    with pytest.raises(ValueError, match="must be"):
        regression_sums(states, returns[:, 1:], mask)
    with pytest.raises(ValueError, match="not finite"):
        regression_sums(states, returns / 0, mask)
    with pytest.raises(ValueError, match="decay is 1.5"):
        ShadowCritic(3, decay=1.5)
    with pytest.raises(ValueError, match="must be positive"):
        ShadowCritic(3, ridges=[0.0])
    with pytest.raises(ValueError, match="must be"):
        ShadowCritic(3).update(regression_sums(states, returns, mask))
    with pytest.raises(ValueError, match="saved were 5 features"):
        ShadowCritic(3).load_state_dict(critic_of(iterations(1)).state_dict())
