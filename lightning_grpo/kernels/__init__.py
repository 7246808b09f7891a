"""Triton kernels for what takes a GPU several passes in PyTorch; nothing on a CPU needs them."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType

import torch

# Differences of log-probs, entropies and gradients from those of PyTorch, by rounding.
_TOLERANCE = 1e-4


def has_triton() -> bool:
    """Whether the Triton package is there; PyTorch's wheels for CUDA bring it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def logit_kernels(device: str) -> ModuleType | None:
    """The kernels for logits, where there are any that give what PyTorch gives; else None.

    Args:
        device: the kind of device: "cuda" has kernels.
    """
    if device != "cuda" or not has_triton():
        return None
    try:
        from lightning_grpo.kernels import triton_logits

        difference = logit_difference(triton_logits, device)
    except Exception as error:  # how a compiler or a driver fails is up to it
        reason = f"{type(error).__name__}: {error}"
    else:
        if difference <= _TOLERANCE:
            return triton_logits
        reason = f"they are off by {difference:.2g}"
    warnings.warn(f"log-probs are computed without Triton kernels ({reason})", stacklevel=2)
    return None


@torch.no_grad()
def logit_difference(kernels: ModuleType, device: str) -> float:
    """Largest difference of what kernels give for some random logits from what PyTorch gives.

    Args:
        kernels: the module `kernels.triton_logits`.
        device: where they run.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(5, 3000, device=device, generator=generator)
    token_ids = torch.arange(5, device=device) * 700
    rows = torch.arange(5, device=device)
    temperature, scales = 0.7, torch.linspace(-1, 1, 5, device=device)
    logprobs = (logits / temperature).log_softmax(-1)
    probabilities = logprobs.exp()
    entropies = -(probabilities * logprobs).sum(-1)
    normalizers = (logits / temperature).logsumexp(-1)
    gradients = -probabilities * (scales.unsqueeze(1) * (1 + logprobs + entropies.unsqueeze(1)))
    gradients[rows, token_ids] += scales
    found = kernels.token_statistics(logits, token_ids, temperature, True)
    expected = [logprobs[rows, token_ids], normalizers, entropies, gradients]
    found_gradients = kernels.logit_gradients(
        logits.clone(), token_ids, normalizers, entropies, scales, scales, temperature
    )
    pairs = list(zip([*found, found_gradients], expected, strict=True))
    shares = torch.nn.functional.pad(logits.softmax(-1), (0, 72)).unflatten(1, (3, 1024)).sum(-1)
    sums = kernels.block_sums(logits, 1024)
    pairs += [(sums[0], logits.logsumexp(-1)), (sums[1], shares)]
    return max(float((one - other).abs().max()) for one, other in pairs)
