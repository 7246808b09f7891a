"""Token log-probabilities and entropy against hand-worked values."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_grpo.logprobs import linear_logprobs, token_entropy, token_logprobs


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


# From hidden states


def naive(hidden, layer, ids, *, num_tokens, temperature):
    logits = torch.nn.functional.linear(hidden, *layer)[None, :, :num_tokens]
    logprobs = token_logprobs(logits, ids[None], temperature=temperature)
    return logprobs[0], token_entropy(logits, temperature=temperature)[0]


def random_layer(dtype=torch.float64, num_rows=150, vocabulary=37):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = draw(num_rows, 8), draw(vocabulary, 8), draw(vocabulary)
    ids = torch.randint(vocabulary - 4, (num_rows,), generator=generator)
    return [x.requires_grad_() for x in tensors], ids


@pytest.mark.parametrize("has_small_chunks", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_log_probs_from_hidden_states_have_the_values_and_gradients_of_the_logits(
    dtype, tolerance, temperature, has_small_chunks, monkeypatch
):
    if has_small_chunks:
        monkeypatch.setattr("lightning_grpo.logprobs._CHUNK_LOGITS", {"cpu": 1})
    (hidden, weight, bias), ids = random_layer(dtype)
    weights = torch.linspace(-1, 2, len(ids), dtype=dtype)
    options = {"num_tokens": 33, "temperature": temperature}
    right = naive(hidden, (weight, bias), ids, **options)
    for entropy in ("none", "detached", "gradient"):
        found = linear_logprobs(hidden, weight, ids, bias=bias, entropy=entropy, **options)
        loss, expected = (found[0] * weights).sum(), (right[0] * weights).sum()
        if entropy == "gradient":
            loss, expected = loss + found[1].sin().sum(), expected + right[1].sin().sum()
        assert found[1].requires_grad == (entropy == "gradient")
        leaves = (hidden, weight, bias)
        gradients = torch.autograd.grad(loss, leaves)
        exact = torch.autograd.grad(expected, leaves, retain_graph=True)
        entropies = torch.zeros_like(right[1]) if entropy == "none" else right[1]
        for one, other in zip([*found, *gradients], [right[0], entropies, *exact]):
            assert one.dtype == other.dtype
            assert float((one - other).norm()) <= tolerance * float(1 + other.norm())


def test_the_logits_are_not_kept_for_the_backward_pass():
    (hidden, weight, _), ids = random_layer(torch.float32, num_rows=300, vocabulary=1000)
    saved = []
    for function in (
        lambda: naive(hidden, (weight, None), ids, num_tokens=1000, temperature=1.0)[0],
        lambda: linear_logprobs(hidden, weight, ids, entropy="detached")[0],
    ):
        found: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, found=found: (found.__setitem__(x.data_ptr(), x.numel()), x)[1], lambda x: x
        ):
            function()
        saved.append(sum(found.values()) - weight.numel())
    assert saved[0] > 300 * 1000
    # Hidden states of width 8; a token id, a normaliser and an entropy for each token.
    assert saved[1] == 300 * (8 + 3)


def test_a_frozen_layer_gets_no_gradient_and_a_tied_one_gets_both_of_its_own():
    (hidden, weight, _), ids = random_layer()
    linear_logprobs(hidden, weight.detach(), ids)[0].sum().backward()
    assert weight.grad is None and hidden.grad is not None
    states = torch.nn.functional.embedding(ids, weight).tanh()
    gradient = torch.autograd.grad(linear_logprobs(states, weight, ids)[0].sum(), weight)[0]
    states = torch.nn.functional.embedding(ids, weight).tanh()
    right, _ = naive(states, (weight, None), ids, num_tokens=None, temperature=1.0)
    expected = torch.autograd.grad(right.sum(), weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_under_autocast_the_product_is_in_half_and_the_rest_in_float32(monkeypatch):
    monkeypatch.setattr("lightning_grpo.logprobs._CHUNK_LOGITS", {"cpu": 1})
    (hidden, weight, bias), ids = random_layer(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = linear_logprobs(hidden, weight, ids, bias=bias)
    half = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    expected, _ = naive(half[0], half[1:], ids, num_tokens=None, temperature=1.0)
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, expected)
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.float32
    # Sums over chunks that were rounded at each step would all be bfloat16 numbers.
    assert not torch.equal(weight.grad.bfloat16().float(), weight.grad)


def test_no_tokens_and_no_fit():
    (hidden, weight, _), ids = random_layer()
    logprobs, entropy = linear_logprobs(hidden[:0], weight, ids[:0], entropy="gradient")
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    with pytest.raises(ValueError, match="does not fit"):
        linear_logprobs(hidden, weight, ids[:1])
    with pytest.raises(ValueError, match="temperature is"):
        linear_logprobs(hidden, weight, ids, temperature=0.0)
