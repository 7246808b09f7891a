"""The critic's loss against a table worked by hand, and the explained variance."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from lightning_grpo.value_loss import clipped_value_loss, explained_variance

POISONS = [math.nan, math.inf, -math.inf, 1e4, -1e4]


def one_token(value, old, target, clip):
    """Loss, gradient and metrics of a single token."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    output = clipped_value_loss(
        values,
        torch.tensor([[old]], dtype=torch.float64),
        torch.tensor([[target]], dtype=torch.float64),
        torch.tensor([[True]]),
        clip=clip,
    )
    (gradient,) = torch.autograd.grad(output.per_token.sum(), values)
    return output.per_token.item(), gradient.item(), output.metrics


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient", "clipped"),
    [
        (1.5, 1.0, 2.0, 0.2, 0.32, 0.0, 1),
        (1.5, 1.0, 0.0, 0.2, 1.125, 1.5, 0),
        (1.1, 1.0, 2.0, 0.2, 0.405, -0.9, 0),
        (0.5, 1.0, 0.0, 0.2, 0.32, 0.0, 1),
        (0.5, 1.0, 2.0, 0.2, 1.125, -1.5, 0),
        (0.9, 1.0, 0.0, 0.2, 0.405, 0.9, 0),
        (1.5, 1.0, 1.3, 0.2, 0.02, 0.2, 0),
        (1.5, 1.0, 1.4, 0.2, 0.02, 0.0, 1),
        (1.5, 1.0, 2.0, 0.6, 0.125, -0.5, 0),
        (1.5, 1.0, 2.0, None, 0.125, -0.5, 0),
        (1.5, math.nan, 2.0, None, 0.125, -0.5, 0),
        (1.5, 1.0, 1.5, 0.2, 0.045, 0.0, 1),
        (1.0, 1.0, 1.0, 0.2, 0.0, 0.0, 0),
    ],
)
def test_the_value_table(value, old, target, clip, loss, gradient, clipped):
    found_loss, found_gradient, metrics = one_token(value, old, target, clip)
    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert found_gradient == pytest.approx(gradient, abs=1e-12)
    assert [t.item() for t in metrics["value/loss"]] == pytest.approx([loss, 1], abs=1e-12)
    assert [t.item() for t in metrics["value/clip_frac"]] == [clipped, 1]


def printed_form(value, old, target, clip):
    clipped = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def test_value_and_gradient_match_the_printed_form_by_finite_differences():
    draw, step, clip = random.Random(0), 1e-6, 0.3
    for _ in range(300):
        value, old, target = (draw.uniform(-1, 1) for _ in range(3))
        loss, gradient, _ = one_token(value, old, target, clip)
        assert loss == pytest.approx(printed_form(value, old, target, clip), abs=1e-13)
        up = printed_form(value + step, old, target, clip)
        down = printed_form(value - step, old, target, clip)
        bound = min(max(value, old - clip), old + clip)
        crossing = abs(value - target) - abs(bound - target)  # 0 where the larger term changes
        if abs(abs(value - old) - clip) > 1e-4 and (bound == value or abs(crossing) > 1e-4):
            assert gradient == pytest.approx((up - down) / (2 * step), abs=1e-6)


def ragged():
    generator = torch.Generator().manual_seed(2)
    tensors = dict(
        zip(("values", "old_values", "returns"), torch.randn(3, 3, 4, generator=generator))
    )
    mask = torch.tensor([[True, True, True, False], [True, False, True, False], [False] * 4])
    return tensors, mask


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("poisoned", [["values"], ["old_values"], ["returns"], "all"])
@pytest.mark.parametrize("clip", [0.2, None])
def test_nothing_under_the_mask_reaches_the_loss_the_gradient_or_a_metric(poison, poisoned, clip):
    tensors, mask = ragged()

    def found(value, names):
        dirty = {
            name: tensor.masked_fill(~mask, value) if name in names else tensor
            for name, tensor in tensors.items()
        }
        dirty["values"].requires_grad_()
        output = clipped_value_loss(**dirty, mask=mask, clip=clip)
        (gradient,) = torch.autograd.grad(output.per_token.sum(), dirty["values"])
        metrics = {name: [t.item() for t in pair] for name, pair in output.metrics.items()}
        return output.per_token, gradient, metrics

    clean = found(0.0, tensors)
    dirty = found(poison, tensors if poisoned == "all" else poisoned)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[1], clean[1])
    assert dirty[2] == clean[2]
    assert torch.all(clean[0][~mask] == 0)
    assert torch.all(clean[1][~mask] == 0)


def test_old_values_and_returns_are_constants_and_metrics_have_no_graph():
    values, old, target = (torch.tensor([[x]], requires_grad=True) for x in (1.5, 1.0, 0.0))
    output = clipped_value_loss(values, old, target, torch.tensor([[True]]), clip=0.2)
    output.per_token.sum().backward()
    assert values.grad.tolist() == [[1.5]]
    assert old.grad is None and target.grad is None
    assert not any(t.requires_grad for pair in output.metrics.values() for t in pair)


def test_metrics_are_sums_and_counts_over_the_tokens():
    values = torch.tensor([[1.5, 1.5, 1.1], [1.5, 9.0, 9.0]], dtype=torch.float64)
    targets = torch.tensor([[2.0, 0.0, 2.0], [2.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    output = clipped_value_loss(values, torch.ones_like(values), targets, mask, clip=0.2)
    found = {name: [t.item() for t in pair] for name, pair in output.metrics.items()}
    assert found["value/loss"] == pytest.approx([0.32 + 1.125 + 0.405 + 0.32, 4], abs=1e-12)
    assert found["value/clip_frac"] == [2, 4]
    assert set(found) == {"value/loss", "value/clip_frac"}
    assert all(t.shape == () for pair in output.metrics.values() for t in pair)


def test_no_tokens_give_empty_metrics_and_keep_the_graph():
    values = torch.full((1, 2), math.nan, requires_grad=True)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    output = clipped_value_loss(values, values, values, mask, clip=0.2)
    output.per_token.sum().backward()
    assert values.grad.tolist() == [[0.0, 0.0]]
    assert all([t.item() for t in pair] == [0, 0] for pair in output.metrics.values())


def test_the_loss_has_the_dtype_of_the_values():
    mask = torch.ones(1, 1, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, 1, dtype=dtype)
        assert clipped_value_loss(x, x, x, mask, clip=0.2).per_token.dtype == dtype


def test_wrong_shapes_half_precision_and_a_clip_out_of_range_are_refused():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for value in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="clip"):
            clipped_value_loss(x, x, x, mask, clip=value)
    with pytest.raises(ValueError, match="^values"):
        clipped_value_loss(x[:, :1], x, x, mask, clip=0.2)
    with pytest.raises(ValueError, match="old_values"):
        clipped_value_loss(x, x[:, :1], x, mask, clip=0.2)
    with pytest.raises(ValueError, match="returns"):
        clipped_value_loss(x, x, x[:, :1], mask, clip=0.2)
    with pytest.raises(ValueError, match="bfloat16"):
        clipped_value_loss(x.bfloat16(), x, x, mask, clip=0.2)
    with pytest.raises(ValueError, match="^returns"):
        explained_variance(x, x[:, :1], mask, sum_over_ranks=alone)
    with pytest.raises(ValueError, match="^values"):
        explained_variance(x[:, :1], x, mask, sum_over_ranks=alone)


def alone(tensor):
    """The sum over the ranks of a run of one process."""
    return tensor


def explained(values, returns, mask=None):
    v, r = (torch.tensor([x], dtype=torch.float64) for x in (values, returns))
    mask = torch.ones(v.shape, dtype=torch.bool) if mask is None else torch.tensor([mask])
    return explained_variance(v, r, mask, sum_over_ranks=alone)


def test_explained_variance_by_hand():
    returns = [1.0, 2.0, 4.0]
    assert explained(returns, returns) == 1.0
    assert explained([5.0, 6.0, 8.0], returns) == pytest.approx(1.0, abs=1e-15)  # off by a constant
    assert explained([3.0, 3.0, 3.0], returns) == pytest.approx(0.0, abs=1e-15)
    # Residuals 1, 0, 1 have variance 2/9; the returns 14/9.
    assert explained([0.0, 2.0, 3.0], returns) == pytest.approx(1 - 2 / 14, abs=1e-14)
    assert explained([-1.0, -2.0, -4.0], returns) == pytest.approx(-3.0, abs=1e-13)


def test_explained_variance_matches_the_statistics_module():
    draw = random.Random(1)
    values, returns = ([draw.gauss(3, 2) for _ in range(50)] for _ in range(2))
    residual = [r - v for r, v in zip(returns, values)]
    expected = 1 - statistics.pvariance(residual) / statistics.pvariance(returns)
    assert explained(values, returns) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_returns_that_do_not_vary_leave_nothing_to_explain(constant):
    assert explained([0.3, 0.2, 0.7], [constant] * 3) == 0.0
    assert explained([constant] * 3, [constant] * 3) == 0.0
    assert explained([0.0, 0.5], [1e6, 1e6 + 0.5]) == 0.0  # half a millionth of their size
    assert explained([0.0, 3.0], [1e6, 1e6 + 3.0]) == pytest.approx(1.0, abs=1e-12)


def test_no_tokens_explain_nothing():
    assert explained([1.0, 2.0], [3.0, 5.0], mask=[False, False]) == 0.0


@pytest.mark.parametrize("poison", POISONS)
def test_explained_variance_does_not_read_under_the_mask(poison):
    mask = [True, True, False, True]
    clean = explained([0.0, 2.0, 0.0, 3.0], [1.0, 2.0, 0.0, 4.0], mask)
    assert explained([0.0, 2.0, poison, 3.0], [1.0, 2.0, poison, 4.0], mask) == clean
    assert clean == pytest.approx(1 - 2 / 14, abs=1e-14)


def test_explained_variance_sums_over_ranks():
    values, returns = torch.tensor([[0.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    single = explained_variance(values, returns, mask, sum_over_ranks=alone)
    # Two ranks with the same rows have twice every sum, and the same share.
    sums = []

    def doubled(tensor):
        sums.append(tensor)
        return 2 * tensor

    assert explained_variance(values, returns, mask, sum_over_ranks=doubled) == single
    assert [s.dtype for s in sums] == [torch.float64] * 2


def test_small_spreads_around_a_large_mean_keep_their_digits():
    far = 1e5
    found = explained([far, far + 2, far + 3], [far + 1, far + 2, far + 4])
    assert found == pytest.approx(1 - 2 / 14, abs=1e-9)
