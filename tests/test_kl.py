"""KL estimators and their gradients, by exact enumeration and never by sampling; the beta controller."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_grpo.kl import adaptive_beta, kl_estimate
from lightning_grpo.logprobs import token_logprobs

KINDS = ("k1", "k2", "k3", "reverse")
THETA = [0.2, -0.5, 0.7]
REFERENCE = [0.0, 0.3, -0.1]


def three_way(kind):
    """Exact mean of an estimator over a 3-way softmax, and the gradient of that mean in the loss."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    tokens = torch.arange(3).unsqueeze(1)  # one completion of one token for each token
    logprobs = token_logprobs(theta.expand(3, 1, 3), tokens)
    ref_logprobs = token_logprobs(reference.expand(3, 1, 3), tokens)
    estimate = kl_estimate(logprobs, ref_logprobs, torch.ones(3, 1, dtype=torch.bool), kind)
    mean = (logprobs.detach().exp() * estimate).sum()
    (gradient,) = torch.autograd.grad(mean, theta)
    return mean.item(), gradient.tolist()


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def exact_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def finite_difference(f, point, step=1e-6):
    gradient = []
    for i in range(len(point)):
        up = [v + step * (j == i) for j, v in enumerate(point)]
        down = [v - step * (j == i) for j, v in enumerate(point)]
        gradient.append((f(up) - f(down)) / (2 * step))
    return gradient


@pytest.mark.parametrize(
    ("kind", "mean"), [("k1", 0.1908), ("k2", 0.1792), ("k3", 0.1908), ("reverse", 0.1908)]
)
def test_the_mean_of_each_estimator_by_enumeration(kind, mean):
    assert three_way(kind)[0] == pytest.approx(mean, abs=5e-5)


@pytest.mark.parametrize("kind", ["k1", "k3", "reverse"])
def test_k1_k3_and_reverse_are_unbiased(kind):
    exact = exact_kl(softmax(THETA), softmax(REFERENCE))
    assert three_way(kind)[0] == pytest.approx(exact, abs=1e-14)


@pytest.mark.parametrize(
    ("kind", "gradient"),
    [
        ("k1", [0.0, 0.0, 0.0]),
        ("k2", [-0.04980, -0.18261, 0.23241]),
        ("k3", [0.01069, -0.25686, 0.24617]),
        ("reverse", [-0.04980, -0.18261, 0.23241]),
    ],
)
def test_the_expected_gradient_of_each_estimator_by_enumeration(kind, gradient):
    assert three_way(kind)[1] == pytest.approx(gradient, abs=6e-6)


def test_k2_and_reverse_descend_the_reverse_kl_and_k3_the_forward_kl():
    q = softmax(REFERENCE)
    reverse = finite_difference(lambda t: exact_kl(softmax(t), q), THETA)
    forward = finite_difference(lambda t: exact_kl(q, softmax(t)), THETA)
    assert three_way("k2")[1] == pytest.approx(reverse, abs=1e-8)
    assert three_way("reverse")[1] == pytest.approx(reverse, abs=1e-8)
    assert three_way("k3")[1] == pytest.approx(forward, abs=1e-8)
    assert three_way("k1")[1] == pytest.approx([0, 0, 0], abs=1e-15)


def estimate_one(d, kind, dtype=torch.float64):
    logprobs = torch.tensor([[-1.0]], dtype=dtype, requires_grad=True)
    other = torch.tensor([[-1.0 + d]], dtype=dtype)
    value = kl_estimate(logprobs, other, torch.tensor([[True]]), kind)
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    return value.item(), gradient.item()


@pytest.mark.parametrize(
    ("kind", "d", "value", "gradient"),
    [
        ("k1", 0.5, -0.5, 1.0),
        ("k1", -0.5, 0.5, 1.0),
        ("k2", 0.5, 0.125, -0.5),
        ("k2", -2.0, 2.0, 2.0),
        ("k3", 0.5, math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        ("k3", -2.0, math.exp(-2) + 1, 1 - math.exp(-2)),
        ("k3", 10.0, 22015.465794806718, 1 - math.exp(10)),
        ("k3", -100.0, 99.0, 1.0),
        ("k3", 100.0, math.exp(100) - 101, 1 - math.exp(100)),
        ("reverse", 0.5, math.exp(0.5) - 1.5, -0.5),
        ("reverse", -2.0, math.exp(-2) + 1, 2.0),
        ("reverse", 100.0, math.exp(100) - 101, -100.0),
        ("reverse", -100.0, 99.0, 100.0),
    ],
)
def test_value_and_gradient_of_one_token_with_nothing_clamped(kind, d, value, gradient):
    found = estimate_one(d, kind)
    assert found[0] == pytest.approx(value, rel=1e-13)
    assert found[1] == pytest.approx(gradient, rel=1e-13)


@pytest.mark.parametrize("kind", ["k3", "reverse"])
def test_k3_of_a_small_step_keeps_its_digits_in_float32(kind):
    d = 3 * 2.0**-12
    exact = d**2 / 2 + d**3 / 6
    assert estimate_one(d, kind, torch.float32)[0] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_kl_and_k2_k3_no_gradient(kind):
    value, gradient = estimate_one(0.0, kind)
    assert value == 0.0
    assert gradient == (1.0 if kind == "k1" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e4, -1e4])
@pytest.mark.parametrize("poisoned", ["logprobs", "other", "both"])
def test_nothing_under_the_mask_reaches_a_kl_or_its_gradient(kind, poison, poisoned):
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def value_and_gradient(fill_logprobs, fill_other):
        logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]])
        other = torch.tensor([[-1.5, -1.0, 0.0], [-0.1, 0.0, 0.0]])
        logprobs = logprobs.masked_fill(~mask, fill_logprobs).requires_grad_()
        value = kl_estimate(logprobs, other.masked_fill(~mask, fill_other), mask, kind)
        value.square().sum().backward()
        return value, logprobs.grad

    value, gradient = value_and_gradient(
        poison if poisoned != "other" else 0.0, poison if poisoned != "logprobs" else 0.0
    )
    clean_value, clean_gradient = value_and_gradient(0.0, 0.0)
    assert torch.equal(value, clean_value)
    assert torch.equal(gradient, clean_gradient)
    assert torch.all(value[~mask] == 0)
    assert torch.all(gradient[~mask] == 0)


# A policy over two tokens a and b, two steps: logits of the first token, of the second after a, after b.
POLICY = [0.4, -0.3, 1.1, 0.2, -0.6, 0.9]
SEQUENCE_REFERENCE = [-0.2, 0.5, 0.3, -0.4, 0.8, 0.1]


def sequence_logprobs(logits):
    """Log-probs (4, 2) of the tokens of the four sequences aa, ab, ba, bb."""
    sequences = list(itertools.product(range(2), range(2)))
    rows = [
        torch.stack([logits[0:2], logits[2 + 2 * first : 4 + 2 * first]]) for first, _ in sequences
    ]
    return token_logprobs(torch.stack(rows), torch.tensor(sequences))


def sequence_kl(policy):
    """KL between the distributions over whole sequences, in plain Python."""

    def probabilities(logits):
        first = softmax(logits[0:2])
        second = [softmax(logits[2:4]), softmax(logits[4:6])]
        return [first[i] * second[i][j] for i in range(2) for j in range(2)]

    return exact_kl(probabilities(policy), probabilities(SEQUENCE_REFERENCE))


def sequence_gradient(surrogate):
    """Exact expected gradient of `surrogate(logprobs, ref_logprobs)` (4, 2) over the four sequences."""
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    logprobs = sequence_logprobs(policy)
    ref_logprobs = sequence_logprobs(torch.tensor(SEQUENCE_REFERENCE, dtype=torch.float64))
    probability = logprobs.detach().sum(dim=1, keepdim=True).exp()
    loss = (probability * surrogate(logprobs, ref_logprobs)).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    return gradient.tolist()


EVERY_TOKEN = torch.ones(4, 2, dtype=torch.bool)


def test_k1_in_the_reward_with_reward_to_go_has_the_exact_gradient_of_the_sequence_kl():
    def surrogate(logprobs, ref_logprobs):
        cost = kl_estimate(logprobs, ref_logprobs, EVERY_TOKEN, "k1").detach()
        to_go = cost.flip(1).cumsum(1).flip(1)
        return to_go * logprobs

    exact = finite_difference(sequence_kl, POLICY)
    assert sequence_gradient(surrogate) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("kind", ["k2", "reverse"])
def test_a_per_token_kl_in_the_loss_misses_how_the_first_token_changes_the_second(kind):
    found = sequence_gradient(lambda lp, ref: kl_estimate(lp, ref, EVERY_TOKEN, kind))
    exact = finite_difference(sequence_kl, POLICY)
    # The KL of the first token alone: what is left when the second token's context is held fixed.
    first_only = finite_difference(
        lambda t: exact_kl(softmax(t), softmax(SEQUENCE_REFERENCE[:2])), POLICY[:2]
    )
    assert found[2:] == pytest.approx(exact[2:], abs=1e-8)
    assert found[:2] == pytest.approx(first_only, abs=1e-8)
    assert abs(found[0] - exact[0]) > 0.01


def test_the_mean_of_the_per_token_estimates_is_the_kl_of_the_sequences():
    policy = torch.tensor(POLICY, dtype=torch.float64)
    logprobs = sequence_logprobs(policy)
    ref_logprobs = sequence_logprobs(torch.tensor(SEQUENCE_REFERENCE, dtype=torch.float64))
    for kind in ("k1", "k3", "reverse"):
        per_sequence = kl_estimate(logprobs, ref_logprobs, EVERY_TOKEN, kind).sum(dim=1)
        mean = (logprobs.sum(dim=1).exp() * per_sequence).sum().item()
        assert mean == pytest.approx(sequence_kl(POLICY), abs=1e-14)


def test_unknown_kinds_and_shapes_are_refused():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'k4'.*reverse"):
        kl_estimate(x, x, mask, "k4")
    with pytest.raises(ValueError, match="other_logprobs"):
        kl_estimate(x, x[:, :1], mask, "k3")
    with pytest.raises(ValueError, match="bool"):
        kl_estimate(x, x, mask.float(), "k3")


def controlled(kl, beta=0.15, target=6.0, horizon=1e4, n=64):
    return adaptive_beta(
        beta,
        kl,
        target_nats_per_completion=target,
        horizon_completions=horizon,
        num_completions=n,
    )


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.150192),  # error 1, clipped to 0.2
        (6.3, 0.150048),  # error 0.05
        (6.0, 0.15),
        (5.7, 0.149952),
        (0.0, 0.149808),  # error -1, clipped to -0.2
        (7.2, 0.150192),
        (4.8, 0.149808),
    ],
)
def test_beta_moves_as_in_the_reference_numbers(kl, expected):
    assert controlled(kl) == pytest.approx(expected, rel=1e-12)


def test_a_kl_that_is_not_finite_leaves_beta_alone():
    for kl in (math.nan, math.inf, -math.inf):
        assert controlled(kl) == 0.15


def test_beta_moves_in_proportion_to_itself_and_to_the_completions():
    assert controlled(12.0, beta=0.3) == pytest.approx(0.300384, rel=1e-12)
    assert controlled(12.0, n=128) == pytest.approx(0.150384, rel=1e-12)
    assert controlled(12.0, horizon=2e4) == pytest.approx(0.150096, rel=1e-12)


def test_a_batch_beyond_the_horizon_cannot_turn_beta_negative():
    assert controlled(0.0, horizon=10, n=1000) == pytest.approx(0.12, rel=1e-12)
    assert controlled(60.0, horizon=10, n=1000) == pytest.approx(0.18, rel=1e-12)


def test_targets_and_horizons_must_be_positive():
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="target_nats_per_completion"):
            controlled(6.0, target=bad)
        with pytest.raises(ValueError, match="horizon_completions"):
            controlled(6.0, horizon=bad)
