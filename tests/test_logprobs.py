"""Token log-probabilities and entropy against hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_grpo.logprobs import token_entropy, token_logprobs


def random_logits(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(3).to(dtype)


def test_log_probabilities_of_a_two_token_vocabulary():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]], dtype=torch.float64)
    logprobs = token_logprobs(logits, torch.tensor([[0, 1]]))
    assert logprobs[0].tolist() == pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-15)


@pytest.mark.parametrize(
    ("temperature", "probability"),
    [(0.5, 0.9), (1.0, 0.75), (2.0, math.sqrt(3) / (1 + math.sqrt(3)))],
)
def test_temperature_divides_the_logits(temperature, probability):
    logits = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64)
    logprobs = token_logprobs(logits, torch.tensor([[1]]), temperature=temperature)
    assert logprobs.item() == pytest.approx(math.log(probability), abs=1e-15)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_over_the_vocabulary_sum_to_one(temperature):
    vocabulary = 11
    logits = random_logits(2, 3, vocabulary)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for token in range(vocabulary):
        ids = torch.full((2, 3), token)
        total += token_logprobs(logits, ids, temperature=temperature).exp()
    assert (total - 1).abs().max().item() < 1e-14


def test_each_row_and_position_uses_its_own_logits():
    logits = random_logits(2, 3, 5)
    ids = torch.tensor([[4, 0, 2], [1, 1, 3]])
    logprobs = token_logprobs(logits, ids, temperature=2.0)
    for row in range(2):
        for position in range(3):
            values = [v / 2 for v in logits[row, position].tolist()]
            log_z = math.log(sum(math.exp(v) for v in values))
            expected = values[ids[row, position]] - log_z
            assert logprobs[row, position].item() == pytest.approx(expected, abs=1e-13)


def test_the_gradient_is_onehot_minus_probability_over_temperature():
    logits = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64, requires_grad=True)
    token_logprobs(logits, torch.tensor([[0]]), temperature=0.5).sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([(1 - 0.1) * 2, -0.9 * 2], abs=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_the_input_left_alone(dtype, temperature):
    logits = random_logits(2, 3, 7, dtype=dtype)
    before = logits.clone()
    ids = torch.tensor([[0, 1, 2], [3, 4, 6]])
    logprobs = token_logprobs(logits, ids, temperature=temperature)
    entropy = token_entropy(logits, temperature=temperature)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logprobs.dtype == entropy.dtype == wide
    assert torch.equal(logits, before)
    exact = token_logprobs(logits.double(), ids, temperature=temperature)
    assert (logprobs.double() - exact).abs().max().item() < 2e-6
    exact = token_entropy(logits.double(), temperature=temperature)
    assert (entropy.double() - exact).abs().max().item() < 2e-6


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1000.0, 1000.0, -1000.0]]])
    assert token_logprobs(logits, torch.tensor([[0]])).item() == pytest.approx(
        -math.log(2), abs=1e-4
    )
    assert token_entropy(logits).item() == pytest.approx(math.log(2), abs=1e-4)


def test_entropy_of_uniform_logits_is_the_log_of_the_vocabulary():
    for temperature in (0.5, 1.0, 2.0):
        entropy = token_entropy(torch.full((2, 3, 7), 0.3).double(), temperature=temperature)
        assert entropy.flatten().tolist() == pytest.approx([math.log(7)] * 6, abs=1e-14)


@pytest.mark.parametrize(("temperature", "p"), [(1.0, 0.75), (0.5, 0.9)])
def test_entropy_of_a_two_token_vocabulary(temperature, p):
    logits = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64)
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert token_entropy(logits, temperature=temperature).item() == pytest.approx(
        expected, abs=1e-15
    )


def test_following_the_gradient_of_the_entropy_raises_it():
    logits = random_logits(1, 2, 6).requires_grad_()
    entropy = token_entropy(logits)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert torch.all(token_entropy(logits + 0.01 * gradient) > entropy)


def test_the_gradient_of_the_entropy_matches_finite_differences():
    logits = random_logits(1, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, temperature=0.7), logits)


def test_impossible_tokens_add_neither_entropy_nor_gradient():
    logits = torch.tensor([[[0.0, -math.inf, math.log(3), -math.inf]]], dtype=torch.float64)
    logits.requires_grad_()
    entropy = token_entropy(logits)
    entropy.sum().backward()
    kept = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64, requires_grad=True)
    token_entropy(kept).sum().backward()
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy.item() == pytest.approx(expected, abs=1e-15)
    assert logits.grad[0, 0, [1, 3]].tolist() == [0.0, 0.0]
    assert logits.grad[0, 0, [0, 2]].tolist() == pytest.approx(
        kept.grad.flatten().tolist(), abs=1e-15
    )


def test_impossible_tokens_leave_log_probabilities_finite():
    logits = torch.tensor(
        [[[0.0, -math.inf, math.log(3)]]], dtype=torch.float64, requires_grad=True
    )
    logprobs = token_logprobs(logits, torch.tensor([[2]]))
    logprobs.sum().backward()
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-15)
    assert logits.grad.flatten().tolist() == pytest.approx([-0.25, 0.0, 0.25], abs=1e-15)


def test_empty_completions_give_empty_results():
    assert token_logprobs(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)
    assert token_entropy(torch.zeros(0, 3, 5)).shape == (0, 3)


def test_bad_temperatures_and_shapes_are_refused():
    logits, ids = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature is"):
            token_logprobs(logits, ids, temperature=temperature)
        with pytest.raises(ValueError, match="temperature is"):
            token_entropy(logits, temperature=temperature)
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(logits, ids[:, :1])
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(logits[0], ids)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        token_entropy(logits[0])
