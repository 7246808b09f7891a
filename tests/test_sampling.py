"""Drawing one of many tokens: first its block, then the token in it."""

from __future__ import annotations

import pytest
import torch
from captures import HostOperations

from lightning_grpo.generation import Sampling, SamplingKey, sampling
from lightning_grpo.generation.sampling import keyed_uniforms, sample_tokens

# 99.9 % quantiles of chi square with 36 degrees of freedom.
MOST_CHI_SQUARE = 67.99


def uniforms(num_rows: int, iteration: int = 0) -> torch.Tensor:
    rows = torch.arange(num_rows)
    return keyed_uniforms(SamplingKey(7, iteration), torch.zeros_like(rows), rows, 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("block", [4, 16, 64])
def test_tokens_found_in_blocks_have_the_distribution_that_is_reported(
    block: int, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampling, "_MAX_DIRECT", 0)
    monkeypatch.setattr(sampling, "_BLOCK", block)
    num_rows = 20000
    logits = torch.linspace(-1.0, 1.0, 37)[torch.arange(37) * 17 % 37]
    logits[20:24] = -torch.inf  # a block of 4 that is never drawn, and parts of larger ones
    tokens, logprobs = sample_tokens(
        logits.expand(num_rows, 37), Sampling(temperature), uniforms(num_rows)
    )
    probabilities = (logits.double() / temperature).softmax(-1)
    assert torch.allclose(logprobs.double().exp(), probabilities[tokens], atol=1e-6)
    counts, expected = torch.bincount(tokens, minlength=37), probabilities * num_rows
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[possible].sum()
    assert float(chi_square) < MOST_CHI_SQUARE


@pytest.mark.parametrize("num_tokens", [2049, 4096, 5000])
def test_the_draws_are_those_of_the_search_through_all_tokens(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(300, num_tokens, generator=generator)
    logits[:100, 1000:] = -torch.inf
    logits[100:200, :-2] = -torch.inf
    u = uniforms(300)
    u[:200:3], u[1:200:3] = 0.0, 1 - 2.0**-53
    options = Sampling(0.7)
    with HostOperations() as seen:
        found = sample_tokens(logits, options, u)
    assert seen.names == []
    monkeypatch.setattr(sampling, "_MAX_DIRECT", num_tokens)
    right = sample_tokens(logits, options, u)
    assert torch.equal(found[0], right[0])
    torch.testing.assert_close(found[1], right[1], atol=1e-5, rtol=0)


def test_a_broken_row_shows_in_its_log_prob_and_leaves_the_others_alone():
    logits = torch.zeros(3, 3000)
    logits[1, 5] = torch.nan
    tokens, logprobs = sample_tokens(logits, Sampling(), uniforms(3))
    assert logprobs.isnan().tolist() == [False, True, False]
    assert bool(((tokens >= 0) & (tokens < 3000)).all())
