"""The policy losses against tables worked by hand, finite differences and poisoned masks."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_grpo.kl import kl_estimate
from lightning_grpo.logprobs import token_logprobs
from lightning_grpo.losses import (
    cispo_policy_loss,
    clipped_policy_loss,
    sequence_clipped_policy_loss,
)
from lightning_grpo.masking import reduce_loss

POISONS = [math.nan, math.inf, -math.inf, 1e4, -1e4]


def one_token(ratio, advantage, dtype=torch.float64, **options):
    """Loss, gradient to the log-prob and metrics of a single token with a given ratio."""
    old = torch.tensor([[-1.3]], dtype=dtype)
    logprobs = (old + math.log(ratio)).requires_grad_()
    output = clipped_policy_loss(
        logprobs, old, torch.tensor([[advantage]], dtype=dtype), torch.tensor([[True]]), **options
    )
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    return output.per_token.item(), gradient.item(), output.metrics


DUAL = {"dual_clip": 3.0}
HIGHER = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.mark.parametrize(
    ("options", "advantage", "ratio", "loss", "gradient", "clipped"),
    [
        ({}, 1.0, 0.5, -0.5, -0.5, 0),
        ({}, 1.0, 0.9, -0.9, -0.9, 0),
        ({}, 1.0, 1.1, -1.1, -1.1, 0),
        ({}, 1.0, 1.5, -1.2, 0.0, 1),
        ({}, -1.0, 0.5, 0.8, 0.0, 1),
        ({}, -1.0, 0.9, 0.9, 0.9, 0),
        ({}, -1.0, 1.5, 1.5, 1.5, 0),
        ({}, -1.0, 5.0, 5.0, 5.0, 0),
        ({}, 2.5, 1.5, -3.0, 0.0, 1),
        ({}, -2.5, 0.5, 2.0, 0.0, 1),
        ({}, 0.0, 1.5, 0.0, 0.0, 0),
        ({}, 0.0, 0.5, 0.0, 0.0, 0),
        (DUAL, -1.0, 2.0, 2.0, 2.0, 0),
        (DUAL, -1.0, 5.0, 3.0, 0.0, 0),
        (DUAL, -2.0, 5.0, 6.0, 0.0, 0),
        (DUAL, -1.0, 0.5, 0.8, 0.0, 1),
        (DUAL, 1.0, 5.0, -1.2, 0.0, 1),
        (HIGHER, 1.0, 1.25, -1.25, -1.25, 0),
        (HIGHER, 1.0, 1.3, -1.28, 0.0, 1),
        (HIGHER, 1.0, 0.75, -0.75, -0.75, 0),
        (HIGHER, -1.0, 0.75, 0.8, 0.0, 1),
        (HIGHER, -1.0, 0.85, 0.85, 0.85, 0),
        (HIGHER, -1.0, 1.3, 1.3, 1.3, 0),
        ({"clip_low": 0.3, "clip_high": 0.1}, -1.0, 0.75, 0.75, 0.75, 0),
        ({"clip_low": 0.3, "clip_high": 0.1}, -1.0, 0.65, 0.7, 0.0, 1),
        ({"clip_low": 0.3, "clip_high": 0.1}, 1.0, 1.15, -1.1, 0.0, 1),
    ],
)
def test_the_clip_table(options, advantage, ratio, loss, gradient, clipped):
    found_loss, found_gradient, metrics = one_token(ratio, advantage, **options)
    assert found_loss == pytest.approx(loss, abs=1e-14)
    assert found_gradient == pytest.approx(gradient, abs=1e-14)
    total, count = metrics["policy/clip_frac"]
    assert (total.item(), count.item()) == (clipped, 1)


def surrogate(log_ratio, advantage, low, high, dual):
    """The loss of one token in plain Python, in the form in which the papers print it."""
    ratio = math.exp(log_ratio)
    loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        loss = min(loss, -dual * advantage)
    return loss


@pytest.mark.parametrize("dual", [None, 2.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.4, 0.1)])
def test_value_and_gradient_match_the_printed_form_by_finite_differences(low, high, dual):
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages = torch.randn(2, 1, 400, generator=generator, dtype=torch.float64)
    logprobs = (log_ratio - 1.5).requires_grad_()
    old, mask = torch.full_like(log_ratio, -1.5), torch.ones(1, 400, dtype=torch.bool)
    output = clipped_policy_loss(
        logprobs, old, advantages, mask, clip_low=low, clip_high=high, dual_clip=dual
    )
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)

    step = 1e-6
    kinks = [math.log(1 - low), math.log(1 + high), math.log(dual or 1)]
    for i in range(400):
        x, a = log_ratio[0, i].item(), advantages[0, i].item()
        expected = surrogate(x, a, low, high, dual)
        assert output.per_token[0, i].item() == pytest.approx(expected, abs=1e-13)
        if min(abs(x - kink) for kink in kinks) < 10 * step:
            continue
        up = surrogate(x + step, a, low, high, dual)
        down = surrogate(x - step, a, low, high, dual)
        assert gradient[0, i].item() == pytest.approx((up - down) / (2 * step), abs=1e-7)


def test_on_the_first_minibatch_the_gradient_is_that_of_reinforce():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 4, generator=generator).requires_grad_()
    advantages = torch.randn(3, 4, generator=generator)
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    output = clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    assert torch.equal(gradient, torch.where(mask, -advantages, 0.0))
    assert torch.equal(output.per_token, torch.where(mask, -advantages, 0.0))
    assert [t.item() for t in output.metrics["policy/clip_frac"]] == [0, 6]
    assert [t.item() for t in output.metrics["policy/approx_kl"]] == [0, 6]


def test_old_log_probs_and_advantages_are_constants():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0]], requires_grad=True)
    output = clipped_policy_loss(logprobs, logprobs, advantages, torch.tensor([[True, True]]))
    output.per_token.sum().backward()
    assert logprobs.grad.tolist() == [[-1.0, 1.0]]
    assert advantages.grad is None
    assert not any(t.requires_grad for pair in output.metrics.values() for t in pair)


def small_batch():
    mask = torch.tensor([[True, True, True, False], [True, False, True, False], [False] * 4])
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(3, 4, generator=generator).masked_fill(~mask, 0.0)
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "advantages")
    }
    return tensors, mask


def whole_loss(tensors, mask, reduction, kind):
    """Policy loss plus KL, reduced: value, gradient and metrics."""
    logprobs = tensors["logprobs"].clone().requires_grad_()
    output = clipped_policy_loss(
        logprobs, tensors["old_logprobs"], tensors["advantages"], mask, dual_clip=3.0
    )
    kl = kl_estimate(logprobs, tensors["ref_logprobs"], mask, kind)
    loss = reduce_loss(output.per_token + 0.04 * kl, mask, reduction, denominator=2.0)
    loss.backward()
    metrics = {name: [t.item() for t in pair] for name, pair in output.metrics.items()}
    return loss.item(), logprobs.grad, metrics, output.per_token


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    "poisoned", [["logprobs"], ["old_logprobs"], ["ref_logprobs"], ["advantages"], "all"]
)
@pytest.mark.parametrize(
    ("reduction", "kind"), [("completion", "k3"), ("token", "reverse"), ("constant", "k2")]
)
def test_nothing_under_the_mask_reaches_the_loss_the_gradient_or_a_metric(
    poison, poisoned, reduction, kind
):
    tensors, mask = small_batch()
    clean = whole_loss(tensors, mask, reduction, kind)
    names = list(tensors) if poisoned == "all" else poisoned
    dirty = {
        name: tensor.masked_fill(~mask, poison) if name in names else tensor
        for name, tensor in tensors.items()
    }
    found = whole_loss(dirty, mask, reduction, kind)
    assert found[0] == clean[0]
    assert torch.equal(found[1], clean[1])
    assert found[2] == clean[2]
    assert torch.equal(found[3], clean[3])
    assert torch.all(found[3][~mask] == 0)
    assert torch.all(found[1][~mask] == 0)


def test_a_token_that_was_impossible_is_clipped_and_not_a_nan():
    # exp(200) overflows float32: the gradient must be the 0 of a clipped token, not 0 * inf.
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-201.0, -201.0, -201.0]])
    advantages = torch.tensor([[1.0, -1.0, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    output = clipped_policy_loss(logprobs, old, advantages, mask, dual_clip=3.0)
    output.per_token.sum().backward()
    assert output.per_token[0].tolist() == pytest.approx([-1.2, 3.0, 0.0], rel=1e-6)
    assert logprobs.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_an_unclipped_overflow_shows_in_the_loss_of_its_token_alone():
    logprobs, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-201.0, -201.0]])
    mask = torch.tensor([[True, True]])
    output = clipped_policy_loss(logprobs, old, torch.tensor([[-1.0, 0.0]]), mask)
    assert output.per_token.tolist() == [[math.inf, 0.0]]


@pytest.mark.parametrize(
    ("log_ratio", "kl"),
    [
        (0.5, math.exp(0.5) - 1.5),
        (-0.5, math.exp(-0.5) - 0.5),
        (-100.0, 99.0),
        (100.0, math.exp(100) - 101),
    ],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_approx_kl_is_k3_of_the_unclipped_ratio(log_ratio, kl, advantage):
    old = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64)
    logprobs = old + torch.tensor([[log_ratio, 0.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    output = clipped_policy_loss(
        logprobs, old, torch.full_like(old, advantage), mask, dual_clip=2.0
    )
    total, count = output.metrics["policy/approx_kl"]
    assert total.item() == pytest.approx(kl, rel=1e-13)
    assert count.item() == 2
    assert total.shape == count.shape == ()


def test_approx_kl_estimates_the_kl_from_old_to_new_by_enumeration():
    p, q = [0.2, 0.5, 0.3], [0.4, 0.35, 0.25]
    old, new = (torch.tensor(v, dtype=torch.float64).log().view(3, 1, 1) for v in (p, q))
    mask = torch.tensor([[True]])
    mean = 0.0
    for token in range(3):
        output = clipped_policy_loss(new[token], old[token], torch.ones(1, 1), mask)
        mean += p[token] * output.metrics["policy/approx_kl"][0].item()
    assert mean == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)), abs=1e-14)


def test_clip_frac_counts_the_tokens_where_the_clip_binds():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0, 1.5], [0.5, 9.0, 1.0, 1.0, 1.5, 0.5]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 0.0], [-1.0, -1.0, 1.0, 1.0, 1.0, -1.0]])
    mask = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    old = torch.full((2, 6), -1.0)
    output = clipped_policy_loss(old + ratio.log(), old, advantages, mask, dual_clip=3.0)
    assert [t.item() for t in output.metrics["policy/clip_frac"]] == [3, 9]
    assert set(output.metrics) == {"policy/clip_frac", "policy/approx_kl"}


def test_no_tokens_give_empty_metrics():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), math.nan)
    output = clipped_policy_loss(x, x, x, mask)
    assert output.per_token.tolist() == [[0.0] * 3] * 2
    for total, count in output.metrics.values():
        assert (total.item(), count.item()) == (0, 0)


def test_the_second_minibatch_sees_the_ratio_to_the_frozen_old_policy():
    tokens = torch.tensor([[0, 2], [1, 1]])
    advantages = torch.tensor([[1.0, 1.0], [-0.5, -0.5]], dtype=torch.float64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    theta = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    old = token_logprobs(theta.expand(2, 2, 3), tokens).detach()

    def per_token():
        logprobs = token_logprobs(theta.expand(2, 2, 3), tokens)
        return clipped_policy_loss(logprobs, old, advantages, mask, clip_high=9.0).per_token

    (gradient,) = torch.autograd.grad(per_token().sum(), theta)
    p_0 = theta.detach().softmax(0).tolist()
    # Sum over the four tokens of -A * (onehot - p), by hand.
    hand = [-1 + p_0[0], 1 + p_0[1], -1 + p_0[2]]
    assert gradient.tolist() == pytest.approx(hand, abs=1e-14)
    with torch.no_grad():
        theta -= 0.1 * gradient
    p_1 = theta.detach().softmax(0).tolist()
    ratios = [p_1[v] / p_0[v] for v in range(3)]
    assert min(abs(r - 1) for r in ratios) > 0.01
    expected = [-ratios[0], -ratios[2], 0.5 * ratios[1], 0.5 * ratios[1]]
    assert per_token().flatten().tolist() == pytest.approx(expected, abs=1e-13)


def test_the_loss_has_the_dtype_of_the_log_probs():
    mask = torch.ones(1, 1, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, 1, dtype=dtype)
        assert clipped_policy_loss(x, x, torch.ones(1, 1), mask).per_token.dtype == dtype


def test_bounds_out_of_range_wrong_shapes_and_half_precision_are_refused():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for name, values in {
        "clip_low": (-0.1, 1.0, math.nan),
        "clip_high": (-0.1, math.nan),
        "dual_clip": (1.0, 0.5, math.nan),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                clipped_policy_loss(x, x, x, mask, **{name: value})
    with pytest.raises(ValueError, match="advantages"):
        clipped_policy_loss(x, x, torch.zeros(1), mask)
    with pytest.raises(ValueError, match="old_logprobs"):
        clipped_policy_loss(x, x[:, :1], x, mask)
    with pytest.raises(ValueError, match="bool"):
        clipped_policy_loss(x, x, x, mask.float())
    with pytest.raises(ValueError, match="bfloat16"):
        clipped_policy_loss(x.bfloat16(), x, x, mask)


def one_completion(ratios, advantage, mask=None, loss=sequence_clipped_policy_loss, **options):
    """Reduced loss, gradient and metrics of one completion with given token ratios."""
    old = torch.linspace(-1, -2, len(ratios), dtype=torch.float64).unsqueeze(0)
    logprobs = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    mask = torch.tensor([mask or [True] * len(ratios)])
    output = loss(logprobs, old, torch.full_like(old, advantage), mask, **options)
    reduced = reduce_loss(output.per_token, mask, "completion", denominator=1.0)
    (gradient,) = torch.autograd.grad(reduced, logprobs)
    return reduced.item(), gradient[0].tolist(), output


WIDE = {"clip_low": 0.2, "clip_high": 0.2}


@pytest.mark.parametrize(
    ("options", "advantage", "ratios", "loss", "gradient", "clipped"),
    [
        # s is the geometric mean of the ratios: 1.1, from 1.21 and 1
        (WIDE, 1.0, [1.21, 1.0], -1.1, -0.55, 0),
        (WIDE, -1.0, [1.21, 1.0], 1.1, 0.55, 0),
        (WIDE, 2.0, [1.0, 1.21], -2.2, -1.1, 0),
        (WIDE, 1.0, [1.69, 1.0], -1.2, 0.0, 2),
        (WIDE, -1.0, [1.69, 1.0], 1.3, 0.65, 0),
        (WIDE, -1.0, [0.36, 1.0], 0.8, 0.0, 2),
        (WIDE, 1.0, [0.36, 1.0], -0.6, -0.3, 0),
        (WIDE, 0.0, [9.0, 1.0], 0.0, 0.0, 0),
        # ratios of tokens far outside, whose mean is not
        (WIDE, 1.0, [4.0, 0.25], -1.0, -0.5, 0),
        ({}, 1.0, [math.exp(3.5e-4)] * 2, -math.exp(3.5e-4), -math.exp(3.5e-4) / 2, 0),
        ({}, 1.0, [math.exp(4.5e-4)] * 2, -1.0004, 0.0, 2),
        ({}, -1.0, [math.exp(-3.5e-4)] * 2, 0.9997, 0.0, 2),
        ({}, -1.0, [math.exp(-2.5e-4)] * 2, math.exp(-2.5e-4), math.exp(-2.5e-4) / 2, 0),
    ],
)
def test_the_sequence_clip_table(options, advantage, ratios, loss, gradient, clipped):
    found_loss, found_gradient, output = one_completion(ratios, advantage, **options)
    assert found_loss == pytest.approx(loss, abs=1e-13)
    assert found_gradient == pytest.approx([gradient] * len(ratios), abs=1e-13)
    assert [t.item() for t in output.metrics["policy/clip_frac"]] == [clipped, len(ratios)]


def test_the_sequence_ratio_is_the_mean_over_the_mask_alone():
    mask = [True, False, True, False]
    loss, gradient, output = one_completion([1.21, 9.0, 1.0, 7.0], 1.0, mask, **WIDE)
    assert loss == pytest.approx(-1.1, abs=1e-13)
    assert gradient == pytest.approx([-0.55, 0, -0.55, 0], abs=1e-13)
    assert output.per_token[0, 1].item() == output.per_token[0, 3].item() == 0


def test_a_sequence_ratio_is_that_of_its_own_row():
    old = torch.zeros(2, 2, dtype=torch.float64)
    logprobs = torch.tensor([[1.21, 1.0], [0.81, 1.0]], dtype=torch.float64).log()
    mask = torch.ones(2, 2, dtype=torch.bool)
    output = sequence_clipped_policy_loss(logprobs, old, torch.ones(2, 2), mask, **WIDE)
    assert output.per_token[0].tolist() == pytest.approx([-1.1, -1.1], abs=1e-13)
    assert output.per_token[1].tolist() == pytest.approx([-0.9, -0.9], abs=1e-13)


def test_the_sequence_gradient_is_that_of_the_printed_loss_by_finite_differences():
    draw = torch.Generator().manual_seed(4)
    log_ratios = (torch.randn(5, generator=draw, dtype=torch.float64) * 0.2).tolist()

    def printed(values):
        s, a = math.exp(sum(values) / len(values)), -1.5
        return -min(s * a, min(max(s, 0.2), 1.8) * a)

    _, gradient, _ = one_completion(
        [math.exp(v) for v in log_ratios], -1.5, clip_low=0.8, clip_high=0.8
    )
    step = 1e-6
    for t in range(5):
        up = printed([v + step * (i == t) for i, v in enumerate(log_ratios)])
        down = printed([v - step * (i == t) for i, v in enumerate(log_ratios)])
        assert gradient[t] == pytest.approx((up - down) / (2 * step), abs=1e-9)


def test_tokens_of_one_completion_may_have_their_own_advantages():
    logprobs = torch.tensor([[1.21, 1.0]], dtype=torch.float64).log().requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    output = sequence_clipped_policy_loss(
        logprobs, torch.zeros_like(logprobs), advantages, mask, **WIDE
    )
    reduce_loss(output.per_token, mask, "completion", denominator=1.0).backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-0.55, 1.65], abs=1e-13)


@pytest.mark.parametrize(
    ("advantage", "ratio", "gradient", "clipped"),
    [
        (1.0, 2.0, -1.28, 1),
        (-1.0, 2.0, 1.28, 1),
        (1.0, 1.2, -1.2, 0),
        (2.0, 0.1, -0.2, 0),
        (-2.0, 0.1, 0.2, 0),
        (1.0, math.exp(200), -1.28, 1),
    ],
)
def test_the_cispo_table(advantage, ratio, gradient, clipped):
    loss, found, output = one_completion([ratio], advantage, loss=cispo_policy_loss, clip_high=0.28)
    assert found == pytest.approx([gradient], abs=1e-13)
    # The log-prob of the token is its factor: -1 was the old one.
    assert loss == pytest.approx(gradient * (math.log(ratio) - 1), rel=1e-12)
    assert [t.item() for t in output.metrics["policy/clip_frac"]] == [clipped, 1]


def test_the_default_weight_of_cispo_ends_at_5():
    assert one_completion([6.0], 1.0, loss=cispo_policy_loss)[1] == pytest.approx([-5.0], abs=1e-13)
    assert one_completion([4.0], 1.0, loss=cispo_policy_loss)[1] == pytest.approx([-4.0], abs=1e-13)


OTHER_LOSSES = [sequence_clipped_policy_loss, cispo_policy_loss]


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_on_the_first_minibatch_every_policy_loss_has_the_gradient_of_reinforce(loss):
    mask = torch.arange(4) < torch.tensor([[4], [2], [0]])
    logprobs = torch.full((3, 4), -0.5, requires_grad=True)
    advantages = torch.tensor([[2.0], [-1.0], [3.0]]).expand(3, 4)
    output = loss(logprobs, logprobs.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(output.per_token.sum(), logprobs)
    assert torch.equal(gradient, torch.where(mask, -advantages, 0.0))
    assert [t.item() for t in output.metrics["policy/clip_frac"]] == [0, 6]
    assert [t.item() for t in output.metrics["policy/approx_kl"]] == [0, 6]


@pytest.mark.parametrize("loss", OTHER_LOSSES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("poisoned", ["logprobs", "old_logprobs", "advantages", "all"])
def test_nothing_under_the_mask_reaches_the_other_policy_losses(loss, poison, poisoned):
    tensors, mask = small_batch()
    del tensors["ref_logprobs"]

    def found(names):
        dirty = {
            name: tensor.masked_fill(~mask, poison if name in names else 0.0)
            for name, tensor in tensors.items()
        }
        dirty["logprobs"].requires_grad_()
        output = loss(**dirty, mask=mask)
        (gradient,) = torch.autograd.grad(output.per_token.sum(), dirty["logprobs"])
        metrics = {name: [t.item() for t in pair] for name, pair in output.metrics.items()}
        return output.per_token, gradient, metrics

    clean, dirty = found([]), found(list(tensors) if poisoned == "all" else [poisoned])
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1], clean[1])
    assert dirty[2] == clean[2]
    assert torch.all(clean[0][~mask] == 0)
    assert torch.all(clean[1][~mask] == 0)


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_the_other_losses_log_the_kl_of_the_tokens(loss):
    old = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    logprobs = old + torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True]])
    metrics = loss(logprobs, old, torch.ones(1, 2), mask).metrics
    expected = math.exp(0.5) + math.exp(-0.5) - 2
    assert [t.item() for t in metrics["policy/approx_kl"]] == pytest.approx([expected, 2])
    assert set(metrics) == {"policy/clip_frac", "policy/approx_kl"}


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_in_the_other_losses_too_old_log_probs_and_advantages_are_constants(loss):
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0]], requires_grad=True)
    output = loss(logprobs, logprobs, advantages, torch.tensor([[True, True]]))
    output.per_token.sum().backward()
    assert logprobs.grad.tolist() == [[-1.0, 1.0]]
    assert advantages.grad is None
    assert not any(t.requires_grad for pair in output.metrics.values() for t in pair)


def test_the_other_losses_refuse_what_the_first_one_does():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for value in (-0.1, math.nan):
        for name in ("clip_low", "clip_high"):
            with pytest.raises(ValueError, match=name):
                sequence_clipped_policy_loss(x, x, x, mask, **{name: value})
        with pytest.raises(ValueError, match="clip_high"):
            cispo_policy_loss(x, x, x, mask, clip_high=value)
    for loss in OTHER_LOSSES:
        with pytest.raises(ValueError, match="advantages"):
            loss(x, x, torch.zeros(1), mask)
        with pytest.raises(ValueError, match="bfloat16"):
            loss(x.bfloat16(), x, x, mask)
