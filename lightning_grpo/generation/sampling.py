"""Drawing tokens: a random number for each draw from its key, and the inverse of the CDF.

Nothing here asks the device for a value, so that a GPU can capture it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lightning_grpo.generation.protocol import Sampling, SamplingKey
from lightning_grpo.kernels import logit_kernels

# Tokens whose probabilities are summed before one of them is looked for.
_BLOCK = 1024
# Up to so many tokens the search goes through all of them at once.
_MAX_DIRECT = 2048
# splitmix64: increment and multipliers as signed 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask makes it a logical shift.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _INCREMENT
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def keyed_uniforms(
    key: SamplingKey, group_ids: Tensor, rows: Tensor, position: int | Tensor
) -> Tensor:
    """One uniform number per draw that depends on its key and on nothing else.

    u = hash(seed, iteration, group, row, position) / 2^53

    No generator state is involved, so a draw does not depend on the rank that makes it, on the
    other rows of the batch, or on what was drawn before.

    Source: splitmix64, Steele, Lea, Flood, "Fast splittable pseudorandom number generators"
    (OOPSLA 2014), chained over the parts of the key.

    Args:
        key: seed and iteration.
        group_ids: (B,) int64, the group of each row.
        rows: (B,) int64, the row's number within its group.
        position: token position in the completion, from 0; with (B, 1) groups and rows it may be
            (B, n) int64.

    Returns:
        (B,) or (B, n) float64 in [0, 1).
    """
    state = torch.full_like(group_ids, key.seed)
    for part in (key.iteration, group_ids, rows, position):
        state = _mix(state) ^ part
    return _shift_right(_mix(_mix(state)), 11).double() * 2.0**-53


def sample_tokens(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the CDF.

    token = the first i with p_0 + ... + p_i > u * sum(p),  p = softmax(truncated(logits / T))

    The sums are in float64; those over many tokens are made of the float32 sums of blocks.

    Args:
        logits: (B, V) float32.
        sampling: temperature, top_k and top_p.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        token ids (B,) int64, and their log-probs (B,) float32 under p; 0 for greedy decoding,
        NaN where the logits hold one.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1), logits.new_zeros(logits.shape[0])
    scores = logits / sampling.temperature
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(min(sampling.top_k, scores.shape[-1]))(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return _inverse_cdf(scores, uniforms)


class OwnSettings(NamedTuple):
    """The settings of (R,) rows, each its own."""

    temperature: Tensor
    """(R,) float32, >= 0."""
    top_k: Tensor
    """(R,) int64; 0 keeps all."""
    top_p: Tensor
    """(R,) float32, (0, 1]."""


def sample_own_tokens(
    logits: Tensor, own: OwnSettings, uniforms: Tensor, *, truncates: bool
) -> tuple[Tensor, Tensor]:
    """Draw one token per row at the settings of the row.

    A row gets what `sample_tokens` gives it at these settings; on a CPU to the bit.

    Args:
        logits: (R, V) float32.
        own: the settings.
        uniforms: (R,) float64 in [0, 1).
        truncates: whether any row has a top_k or top_p, which costs two sorts.

    Returns:
        As `sample_tokens`.
    """
    is_greedy = own.temperature == 0
    scores = logits / own.temperature.masked_fill(is_greedy, 1.0).unsqueeze(1)
    if truncates:
        scores = _truncated(scores, own)
    tokens, logprobs = _inverse_cdf(scores, uniforms)
    tokens = torch.where(is_greedy, logits.argmax(dim=-1), tokens)
    return tokens, logprobs.masked_fill(is_greedy, 0.0)


def _truncated(scores: Tensor, own: OwnSettings) -> Tensor:
    """Scores (R, V) with -inf for what top_k and top_p of the row leave out."""
    num_tokens = scores.shape[1]
    kept = own.top_k.masked_fill(own.top_k == 0, num_tokens).clamp(max=num_tokens).unsqueeze(1)
    least = scores.sort(dim=-1, descending=True).values.gather(1, kept - 1)
    scores = scores.masked_fill(scores < least, -torch.inf)
    ascending, indices = scores.sort(dim=-1)
    # Without a top_p not even tokens whose probability rounds to 0 are left out.
    most = (1 - own.top_p).masked_fill(own.top_p == 1, -1.0).unsqueeze(1)
    is_left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= most
    is_left_out[:, -1] = False
    return scores.masked_fill(is_left_out.scatter(1, indices, is_left_out), -torch.inf)


def _inverse_cdf(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and their log-probs (R,) from scores (R, V) and uniforms (R,)."""
    if scores.shape[1] > _MAX_DIRECT:
        return _inverse_cdf_in_blocks(scores, uniforms)
    logprobs = torch.log_softmax(scores, dim=-1)
    # In float64 u * total stays below the total, so that the search always ends on a real token;
    # a token of probability 0 repeats the sum before it and cannot be the first to pass u.
    cdf = logprobs.double().exp().cumsum(dim=-1)
    threshold = (uniforms * cdf[:, -1]).unsqueeze(1)
    # A NaN has no place in the order and would be searched past the end; it shows in the log-prob.
    tokens = torch.searchsorted(cdf, threshold, right=True).clamp(max=scores.shape[1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)


def _inverse_cdf_in_blocks(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The same for many tokens: first find the block, then the token in it.

    Only the sums of the blocks and the tokens of one block are taken to float64.
    """
    num_tokens = scores.shape[1]
    kernels = logit_kernels(scores.device.type)
    find = _block_sums if kernels is None else kernels.block_sums
    normalizers, sums = find(scores, _BLOCK)
    sums = sums.double()
    ends = sums.cumsum(dim=-1)
    threshold = (uniforms * ends[:, -1]).unsqueeze(1)
    block = torch.searchsorted(ends, threshold, right=True).clamp(max=ends.shape[1] - 1)
    share_of_block = sums.gather(1, block)
    share = (threshold - (ends.gather(1, block) - share_of_block)) / share_of_block
    ids = block * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    inside = scores.gather(1, ids.clamp(max=num_tokens - 1)) - normalizers.unsqueeze(1)
    inside = inside.masked_fill(ids >= num_tokens, -torch.inf)
    cdf = inside.double().exp().cumsum(dim=-1)
    # Rounding may take the share to 1, at which the search would leave the block.
    threshold = share.clamp(0, 1 - 2.0**-53) * cdf[:, -1:]
    place = torch.searchsorted(cdf, threshold, right=True).clamp(max=_BLOCK - 1)
    tokens = ids.gather(1, place).clamp(max=num_tokens - 1).squeeze(1)
    return tokens, scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - normalizers


def _block_sums(scores: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Normalizer (R,) of each row, log sum exp, and probability (R, V / block) of each block."""
    normalizers = scores.logsumexp(dim=-1)
    probabilities = (scores - normalizers.unsqueeze(1)).exp_()
    num_full = scores.shape[1] // block * block
    sums = probabilities[:, :num_full].unflatten(1, (-1, block)).sum(dim=-1)
    rest = probabilities[:, num_full:]
    return normalizers, torch.cat([sums, rest.sum(dim=-1, keepdim=True)], dim=1)


def refuse_nonfinite(logprobs: Tensor, mask: Tensor) -> None:
    """Refuse log-probs of sampled tokens that no working policy gives.

    Args:
        logprobs: (B, C).
        mask: (B, C) bool, True where a token was sampled.

    Raises:
        RuntimeError: one is not finite.
    """
    if not bool(torch.isfinite(logprobs[mask]).all()):
        raise RuntimeError(
            "the policy's logits are not finite: its weights may be broken; lower the learning "
            "rate, or go back to an earlier checkpoint"
        )
