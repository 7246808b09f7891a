"""Masks, positions, masked sums and loss reductions against hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_grpo.masking import (
    eos_mask,
    masked_mean,
    masked_sum,
    position_ids,
    reduce_loss,
    reduction_count,
    reduction_weights,
)

A, B, EOS, EOS2, PAD = 5, 6, 1, 2, 0
REDUCTIONS = ("completion", "token", "constant")


@pytest.mark.parametrize(
    ("ids", "eos_ids", "expected"),
    [
        pytest.param([A, EOS, PAD, PAD], [EOS], [1, 1, 0, 0], id="the EOS counts, pads do not"),
        pytest.param([A, B, A, B], [EOS], [1, 1, 1, 1], id="cut off by the token limit"),
        pytest.param([EOS, PAD, PAD, PAD], [EOS], [1, 0, 0, 0], id="EOS at once"),
        pytest.param([A, EOS, EOS, EOS], [EOS], [1, 1, 0, 0], id="the pad id is the EOS id"),
        pytest.param([A, EOS2, PAD, PAD], [EOS, EOS2], [1, 1, 0, 0], id="a second EOS id"),
        pytest.param([A, EOS2, EOS, A], [EOS, EOS2], [1, 1, 0, 0], id="the first EOS of several"),
        pytest.param([A, B, A, EOS], [EOS], [1, 1, 1, 1], id="EOS at the last position"),
        pytest.param([PAD, A, EOS, PAD], [EOS], [1, 1, 1, 0], id="a sampled pad id is a token"),
        pytest.param([A, EOS, PAD, PAD], [], [1, 1, 1, 1], id="no EOS id at all"),
    ],
)
def test_eos_mask_ends_with_the_first_eos(ids, eos_ids, expected):
    mask = eos_mask(torch.tensor([ids]), eos_ids)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[bool(e) for e in expected]]


def test_eos_mask_treats_each_row_alone():
    mask = eos_mask(torch.tensor([[A, EOS, A], [A, A, A], [EOS, A, EOS]]), (EOS,))
    assert mask.sum(dim=1).tolist() == [2, 3, 1]


def test_eos_mask_refuses_a_flat_row():
    with pytest.raises(ValueError, match="completion_ids"):
        eos_mask(torch.tensor([A, EOS]), [EOS])


def test_positions_count_from_the_first_real_token():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 2, 2]]
    for mask in (attention_mask, attention_mask.bool(), attention_mask.to(torch.int32)):
        positions = position_ids(mask)
        assert positions.tolist() == expected
        assert positions.dtype == torch.int64


def test_positions_refuse_a_flat_mask():
    with pytest.raises(ValueError, match="attention_mask"):
        position_ids(torch.tensor([1, 1]))


def test_masked_sum_and_mean_take_only_what_the_mask_keeps():
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_sum(x, mask).item() == 5.0
    assert masked_mean(x, mask).item() == 2.5
    assert masked_sum(x, mask, dim=1).tolist() == [5.0, 0.0]
    assert masked_mean(x, mask, dim=1).tolist() == [2.5, 0.0]
    assert masked_mean(x, mask, dim=0).tolist() == [1.0, 0.0, 4.0]
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e4, -1e4])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_nothing_under_the_mask_reaches_a_masked_mean_or_its_gradient(poison, dim):
    mask = torch.tensor([[True, False, True], [False, False, False]])
    clean = torch.tensor([[1.0, 0.0, 4.0], [0.0, 0.0, 0.0]])

    def value_and_gradient(x):
        x = x.clone().requires_grad_()
        value = masked_mean(x, mask, dim=dim)
        value.square().sum().backward()
        return value.tolist(), x.grad.tolist()

    assert value_and_gradient(clean.masked_fill(~mask, poison)) == value_and_gradient(clean)


def test_masked_sum_keeps_the_dtype():
    mask = torch.tensor([True, False])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert masked_sum(torch.ones(2, dtype=dtype), mask).dtype == dtype
        assert masked_mean(torch.ones(2, dtype=dtype), mask).dtype == dtype


def test_a_mask_must_be_bool_and_fit():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="bool"):
        masked_mean(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        masked_sum(x, torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        reduction_weights(torch.ones(2, 3), "token")
    with pytest.raises(ValueError, match="bool"):
        reduction_count(torch.ones(2, 3), "token", 8)


# Two completions: two tokens of loss 1, and six tokens of loss 3.
PER_TOKEN = torch.tensor([[1.0, 1.0, 7.0, 7.0, 7.0, 7.0], [3.0] * 6], dtype=torch.float64)
MASK = torch.tensor([[True, True, False, False, False, False], [True] * 6])


@pytest.mark.parametrize(
    ("reduction", "count", "loss"),
    [("completion", 2.0, 2.0), ("token", 8.0, 2.5), ("constant", 16.0, 1.25)],
)
def test_reductions_give_the_hand_worked_loss(reduction, count, loss):
    denominator = reduction_count(MASK, reduction, 8)
    assert denominator.dtype == torch.float64
    assert denominator.shape == ()
    assert denominator.item() == count
    reduced = reduce_loss(PER_TOKEN, MASK, reduction, denominator=denominator.item())
    assert reduced.shape == ()
    assert reduced.item() == pytest.approx(loss, abs=1e-15)


def test_weights_are_one_over_the_length_or_one():
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    by_completion = [[0.5, 0.5, 0.0, 0.0], [0.25] * 4, [0.0] * 4]
    ones = [[1.0, 1.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4]
    assert reduction_weights(mask, "completion").tolist() == by_completion
    assert reduction_weights(mask, "token").tolist() == ones
    assert reduction_weights(mask, "constant").tolist() == ones


def test_weights_have_the_asked_precision():
    mask = torch.tensor([[True, True, True]])
    assert reduction_weights(mask, "completion").dtype == torch.float32
    weights = reduction_weights(mask, "completion", dtype=torch.float64)
    assert weights[0, 0].item() == 1 / 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loss_keeps_its_dtype(reduction):
    for dtype in (torch.float32, torch.float64):
        loss = reduce_loss(PER_TOKEN.to(dtype), MASK, reduction, denominator=2.0)
        assert loss.dtype == dtype


@pytest.mark.parametrize(
    ("reduction", "count"), [("completion", 2), ("token", 8), ("constant", 16)]
)
def test_a_row_without_tokens_is_as_if_it_was_not_there(reduction, count):
    mask = torch.cat([MASK, torch.zeros(1, 6, dtype=torch.bool)])
    per_token = torch.cat([PER_TOKEN, torch.full((1, 6), 9.0, dtype=torch.float64)])
    assert reduction_count(mask, reduction, 8).item() == count
    assert reduce_loss(per_token, mask, reduction, denominator=float(count)) == reduce_loss(
        PER_TOKEN, MASK, reduction, denominator=float(count)
    )


def ragged_batch(seed):
    """Twelve rows of 0 to 7 tokens with random losses."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 7, 0, 1, 5, 2, 7, 4, 1, 6, 0, 3])
    mask = torch.arange(7) < lengths[:, None]
    per_token = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    return per_token, mask, lengths.tolist()


def loss_by_loops(per_token, lengths, reduction, limit):
    """The three losses of a whole step in plain Python."""
    rows = [[float(v) for v in row[:n]] for row, n in zip(per_token, lengths) if n]
    if reduction == "completion":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if reduction == "token":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    return sum(sum(row) for row in rows) / (len(rows) * limit)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [[12], [6, 6], [1] * 12, [2, 1, 9], [3, 0, 5, 4], [2, 1, 7, 2]])
def test_any_partition_of_the_rows_sums_to_the_loss_of_the_whole(reduction, sizes):
    per_token, mask, lengths = ragged_batch(seed=len(sizes))
    whole = per_token.clone().requires_grad_()
    counts = [reduction_count(m, reduction, 9) for m in mask.split(sizes)]
    denominator = torch.stack(counts).sum().item()
    assert denominator == reduction_count(mask, reduction, 9).item()

    reduce_loss(whole, mask, reduction, denominator=denominator).backward()
    parts = per_token.clone().requires_grad_()
    total = 0.0
    for part, part_mask in zip(parts.split(sizes), mask.split(sizes)):
        loss = reduce_loss(part, part_mask, reduction, denominator=denominator)
        loss.backward()
        total += loss.item()

    assert total == pytest.approx(loss_by_loops(per_token, lengths, reduction, 9), abs=1e-14)
    assert torch.equal(parts.grad, whole.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e4, -1e4])
def test_nothing_under_the_mask_reaches_a_loss_or_its_gradient(reduction, poison):
    def value_and_gradient(per_token):
        per_token = per_token.clone().requires_grad_()
        loss = reduce_loss(per_token, MASK, reduction, denominator=2.0)
        loss.backward()
        return loss.item(), per_token.grad.tolist()

    clean = value_and_gradient(PER_TOKEN.masked_fill(~MASK, 0.0))
    assert value_and_gradient(PER_TOKEN.masked_fill(~MASK, poison)) == clean


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("num_rows", [0, 2])
def test_a_step_without_tokens_has_a_zero_loss_that_can_go_backward(reduction, num_rows):
    per_token = torch.full((num_rows, 3), math.nan, requires_grad=True)
    mask = torch.zeros(num_rows, 3, dtype=torch.bool)
    assert reduction_count(mask, reduction, 9).item() == 0.0
    loss = reduce_loss(per_token, mask, reduction, denominator=0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert per_token.grad.tolist() == [[0.0] * 3] * num_rows


def test_a_denominator_that_cannot_be_right_is_refused():
    for denominator in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="denominator is"):
            reduce_loss(PER_TOKEN, MASK, "token", denominator=denominator)
    with pytest.raises(ValueError, match="has tokens"):
        reduce_loss(PER_TOKEN, MASK, "token", denominator=0.0)


def test_unknown_reductions_and_limits_are_refused():
    with pytest.raises(ValueError, match=r"'sequence'.*completion"):
        reduction_weights(MASK, "sequence")
    with pytest.raises(ValueError, match=r"'sequence'.*completion"):
        reduction_count(MASK, "sequence", 8)
    with pytest.raises(ValueError, match="max_completion_tokens is 0"):
        reduction_count(MASK, "constant", 0)
