"""Masked whitening against hand-worked values, over one rank and over two."""

from __future__ import annotations

import math
import statistics
import threading

import pytest
import torch

from lightning_grpo.whitening import masked_whiten

POISONS = [math.nan, math.inf, -math.inf, 1e4, -1e4]


def alone(tensor):
    """The sum over the ranks of a run of one process."""
    return tensor


def on_two_ranks(call):
    """Run call(rank, sum_over_ranks) on two threads that meet in each sum; their results."""
    barrier = threading.Barrier(2)
    slots, results = [None, None], [None, None]

    def rank(number):
        def sum_over_ranks(tensor):
            slots[number] = tensor.clone()
            barrier.wait(timeout=30)
            total = slots[0] + slots[1]
            barrier.wait(timeout=30)
            return total

        results[number] = call(number, sum_over_ranks)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def whitened(values, **options):
    x = torch.tensor([values], dtype=torch.float64)
    mask = torch.ones(x.shape, dtype=torch.bool)
    return masked_whiten(x, mask, sum_over_ranks=alone, **options)[0].tolist()


def test_the_worked_example_with_the_sample_variance():
    found = whitened([0.14675, 0.365, 0.7])
    assert found == pytest.approx([-0.92283, -0.13965, 1.06249], abs=1e-5)


def test_without_a_shift_the_mean_stays():
    values = [1.0, 2.0, 6.0]
    mean, std = 3.0, math.sqrt(7.0)
    expected = [(v - mean) / std + mean for v in values]
    assert whitened(values, shift_mean=False) == pytest.approx(expected, abs=1e-7)


def test_eps_is_added_to_the_std():
    found = whitened([1.0, 2.0, 6.0], eps=0.5)
    assert found[0] == pytest.approx(-2 / (math.sqrt(7.0) + 0.5), abs=1e-12)
    assert whitened([0.0, 1e-8])[1] == pytest.approx(0.5 / (math.sqrt(0.5) + 1), abs=1e-9)


def test_what_is_whitened_has_mean_0_and_variance_1():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64) * 3 + 7
    mask = torch.rand(5, 8, generator=generator) < 0.6
    kept = masked_whiten(x, mask, sum_over_ranks=alone)[mask].tolist()
    assert statistics.fmean(kept) == pytest.approx(0, abs=1e-12)
    assert statistics.variance(kept) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_nothing_under_the_mask_changes_a_bit(poison, shift_mean):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 1.0]])
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    options = {"sum_over_ranks": alone, "shift_mean": shift_mean}
    clean = masked_whiten(x, mask, **options)
    assert torch.equal(masked_whiten(x.masked_fill(~mask, poison), mask, **options), clean)
    assert torch.all(clean[~mask] == 0)
    alone_values = masked_whiten(x[mask].unsqueeze(0), mask[mask].unsqueeze(0), **options)
    assert torch.equal(clean[mask], alone_values[0])


def test_one_token_or_none_gives_finite_values():
    x = torch.tensor([[3.0, math.nan]])
    one = torch.tensor([[True, False]])
    assert masked_whiten(x, one, sum_over_ranks=alone).tolist() == [[0.0, 0.0]]
    kept = masked_whiten(x, one, sum_over_ranks=alone, shift_mean=False)
    assert kept.tolist() == [[3.0, 0.0]]
    none = torch.zeros(1, 2, dtype=torch.bool)
    assert masked_whiten(x, none, sum_over_ranks=alone).tolist() == [[0.0, 0.0]]


def test_equal_values_become_zero():
    assert whitened([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]) == pytest.approx([0.0] * 7, abs=1e-7)


def test_small_spreads_around_a_large_mean_keep_their_digits():
    expected = whitened([0.0, 1.0, 2.0])
    assert whitened([1e8, 1e8 + 1, 1e8 + 2]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("num_first", [0, 1, 3])
def test_two_ranks_are_one(num_first, shift_mean):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64) + 2
    mask = torch.rand(4, 6, generator=generator) < 0.7
    parts = [slice(0, num_first), slice(num_first, 4)]
    whole = masked_whiten(x, mask, sum_over_ranks=alone, shift_mean=shift_mean)
    found = on_two_ranks(
        lambda rank, sum_over_ranks: masked_whiten(
            x[parts[rank]], mask[parts[rank]], sum_over_ranks=sum_over_ranks, shift_mean=shift_mean
        )
    )
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-12, atol=1e-13)


def test_the_dtype_stays_and_nothing_has_a_gradient():
    mask = torch.ones(1, 2, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[0.0, 1.0]], dtype=dtype, requires_grad=True)
        found = masked_whiten(x, mask, sum_over_ranks=alone)
        assert found.dtype == dtype
        assert not found.requires_grad


def test_the_sums_are_in_float64():
    mask = torch.ones(1, 3, dtype=torch.bool)
    x = torch.tensor([[16777216.0, 16777218.0, 16777226.0]])  # a float32 sum of these is off by 4
    found = masked_whiten(x, mask, sum_over_ranks=alone)
    expected = [v / math.sqrt(28) for v in (-4, -2, 6)]
    assert found[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_a_wrong_mask_or_eps_is_refused():
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="bool"):
        masked_whiten(x, mask.float(), sum_over_ranks=alone)
    with pytest.raises(ValueError, match="x has shape"):
        masked_whiten(x[:, :1], mask, sum_over_ranks=alone)
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="eps"):
            masked_whiten(x, mask, sum_over_ranks=alone, eps=value)
