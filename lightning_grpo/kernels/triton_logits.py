"""What a softmax over the vocabulary needs, as Triton kernels that pass over the logits once.

PyTorch takes about eight passes for a log-prob with its entropy, and as many for the gradient, and
makes float32 copies on the way; these read logits of any type and compute in float32.

Run in Triton's interpreter only: correct there; speed is not measured on a GPU.
"""

# Triton compiles its kernels; their arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of one program.
_BLOCK = 1024


class _Blocks(NamedTuple):
    """Of (R, blocks) blocks of tokens, z their scaled logits."""

    maxima: Tensor
    """Max z."""
    sums: Tensor
    """Sum of exp(z - max)."""
    products: Tensor
    """Sum of exp(z - max) * (z - max)."""


@triton.jit
def _blocks_kernel(
    logits, maxima, sums, products, stride, num_tokens, temperature, BLOCK: tl.constexpr
):
    """Maximum, sum and product of one block of one row."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + token, mask=token < num_tokens, other=float("-inf"))
    z = z.to(tl.float32) / temperature
    maximum = tl.max(z, 0)
    difference = z - tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp(difference)
    place = row * tl.num_programs(1) + block
    tl.store(maxima + place, maximum)
    tl.store(sums + place, tl.sum(weights, 0))
    finite_difference = tl.where(weights == 0, 0.0, difference)  # 0 * -inf is NaN
    tl.store(products + place, tl.sum(weights * finite_difference, 0))


@triton.jit
def _gradients_kernel(
    logits,
    token_ids,
    normalizers,
    entropies,
    scales,
    entropy_scales,
    stride,
    num_tokens,
    temperature,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put gradients in the place of one block of logits of one row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    place = logits + row * stride + token
    z = tl.load(place, mask=is_token, other=float("-inf")).to(tl.float32) / temperature
    logprobs = z - tl.load(normalizers + row)
    probabilities = tl.exp(logprobs)
    scale = tl.load(scales + row)
    factor = tl.zeros((BLOCK,), tl.float32) + scale
    if HAS_ENTROPY:
        distance = tl.where(probabilities == 0, 0.0, logprobs + tl.load(entropies + row))
        factor += tl.load(entropy_scales + row) * distance
    gradient = tl.where(token == tl.load(token_ids + row), scale, 0.0) - probabilities * factor
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=is_token)


def block_sums(scores: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What inverse-CDF sampling in blocks starts from.

    Args:
        scores: (R, V).
        block: tokens of a block, a power of 2.

    Returns:
        log sum exp of each row (R,), and the probability of each block (R, V / block), float32.
    """
    normalizers, shares, _, _ = _combined(_block_statistics(scores, 1.0, block))
    return normalizers, shares


def token_statistics(
    logits: Tensor, token_ids: Tensor, temperature: float, has_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs of tokens, log sum exp, and entropies.

    Args:
        logits: (N, V), not scaled.
        token_ids: (N,).
        temperature: divides the logits.
        has_entropy: whether to compute the entropies.

    Returns:
        (N,) float32 each, or None in the place of entropies.
    """
    blocks = _block_statistics(logits, temperature, _BLOCK)
    normalizers, shares, log_total, scaled = _combined(blocks)
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).float() / temperature
    entropies = None
    if has_entropy:
        # sum p (z - max), of each block by its own maximum and then by that of the row.
        means = blocks.products / blocks.sums.clamp(min=torch.finfo(torch.float32).tiny) + scaled
        entropies = log_total - torch.where(shares == 0, 0.0, shares * means).sum(-1)
    return chosen - normalizers, normalizers, entropies


def logit_gradients(
    logits: Tensor,
    token_ids: Tensor,
    normalizers: Tensor,
    entropies: Tensor,
    scales: Tensor,
    entropy_scales: Tensor | None,
    temperature: float,
) -> Tensor:
    """Gradients of log-probs and entropies with respect to logits.

    d logprob / dz = onehot(token) - p,    d entropy / dz = -p (log p + entropy),    p = softmax z

    Args:
        logits: (N, V), not scaled; overwritten.
        token_ids: (N,).
        normalizers: (N,) log sum exp.
        entropies: (N,).
        scales: (N,) gradients of the log-probs, over the temperature.
        entropy_scales: (N,) gradients of the entropies, over the temperature, if any.
        temperature: divides the logits.

    Returns:
        (N, V) in the type of the logits, in their place.
    """
    num_rows, num_tokens = logits.shape
    _gradients_kernel[(num_rows, triton.cdiv(num_tokens, _BLOCK))](
        logits,
        token_ids,
        normalizers,
        entropies,
        scales,
        scales if entropy_scales is None else entropy_scales,
        logits.stride(0),
        num_tokens,
        temperature,
        HAS_ENTROPY=entropy_scales is not None,
        BLOCK=_BLOCK,
    )
    return logits


def _block_statistics(logits: Tensor, temperature: float, block: int) -> _Blocks:
    num_rows, num_tokens = logits.shape
    assert logits.stride(1) == 1
    num_blocks = triton.cdiv(num_tokens, block)
    empty = torch.empty(3, num_rows, num_blocks, device=logits.device, dtype=torch.float32)
    blocks = _Blocks(*empty.unbind())
    _blocks_kernel[(num_rows, num_blocks)](
        logits, *blocks, logits.stride(0), num_tokens, temperature, BLOCK=block
    )
    return blocks


def _combined(blocks: _Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log sum exp (R,), probabilities of blocks (R, blocks), and two parts of the entropy."""
    maximum = blocks.maxima.amax(-1, keepdim=True)
    distance = blocks.maxima - maximum
    weights = blocks.sums * distance.exp()
    total = weights.sum(-1, keepdim=True)
    log_total = total.log()
    normalizers = (maximum + log_total).squeeze(-1)
    return normalizers, weights / total, log_total.squeeze(-1), distance
