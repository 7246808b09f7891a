"""What parameters take for as long as they are trained, whatever model they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer


class StateBytes(NamedTuple):
    """What a set of parameters takes for as long as it is trained, in bytes."""

    weights: float
    gradients: float
    moments: float
    master: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def state_bytes(
    num_parameters: float,
    *,
    num_trainable: float | None = None,
    per_weight: float = 4,
    per_trainable: float | None = None,
    per_gradient: float | None = None,
    per_moments: float = 8,
    has_master: bool = False,
) -> StateBytes:
    """Bytes of weights, gradients, optimizer moments and a float32 master copy.

    Args:
        num_parameters: all parameters.
        num_trainable: those that are trained; all when None.
        per_weight: bytes of a weight: 4 in float32, 2 in bfloat16.
        per_trainable: bytes of a trainable one, when that differs, as adapters' in float32 do.
        per_gradient: bytes of a gradient; those of a trainable weight when None.
        per_moments: bytes that the optimizer keeps for each trainable parameter: 8 for AdamW in
            float32.
        has_master: whether the optimizer keeps a float32 copy beside weights of fewer bits.

    Returns:
        Bytes of each.
    """
    trainable = num_parameters if num_trainable is None else num_trainable
    own = per_weight if per_trainable is None else per_trainable
    return StateBytes(
        weights=(num_parameters - trainable) * per_weight + trainable * own,
        gradients=trainable * (own if per_gradient is None else per_gradient),
        moments=trainable * per_moments,
        master=trainable * 4.0 if has_master else 0.0,
    )


def moment_bytes(make_optimizer: Callable[[Any], Optimizer], dtype: torch.dtype) -> float:
    """Bytes that an optimizer keeps for each parameter, from a step that it makes.

    Args:
        make_optimizer: makes it from parameter groups.
        dtype: of the parameters.

    Returns:
        Bytes per parameter: 8 for AdamW in float32, 0 for SGD without momentum.
    """
    weight = nn.Parameter(torch.zeros(32, 32, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = make_optimizer([{"params": [weight], "name": "policy"}])
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [t for t in kept if isinstance(t, torch.Tensor) and t.ndim]
    return sum(t.numel() * t.element_size() for t in tensors) / weight.numel()
