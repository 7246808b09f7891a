"""Stopping together: an error on one rank stops the others before they wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lightning_grpo.types import SumOverRanks


class TrainingStopped(RuntimeError):
    """A run that cannot go on, with all that its user needs to know; the same on every rank."""


class HasSum(Protocol):
    """Anything that adds a tensor over the ranks, such as the LightningModule."""

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all ranks."""
        ...


@contextlib.contextmanager
def failing_together(module: HasSum, what: str) -> Iterator[None]:
    """Raise on every rank when the block raised on any.

    Every rank has to enter it, and the block must not contain an exchange between the ranks.

    Args:
        module: adds over the ranks.
        what: what the block does, for the message on the other ranks.

    Raises:
        RuntimeError: another rank failed; it shows the cause.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # whatever it is, the others have to hear of it before it goes on
        error = caught
    num_failed = module.sum_over_ranks(torch.tensor(0.0 if error is None else 1.0))
    if error is not None:
        raise error
    if float(num_failed) > 0:
        raise RuntimeError(f"another rank failed while {what}; its own output has the cause")


def gather_rows(values: Tensor, rank: int, num_ranks: int, sum_over_ranks: SumOverRanks) -> Tensor:
    """The values of all ranks, which may hold different numbers of them. Collective.

    Args:
        values: (b,) of this rank.
        rank: this data-parallel rank.
        num_ranks: data-parallel ranks.
        sum_over_ranks: adds a tensor over the ranks.

    Returns:
        (B,) float64, those of rank 0 first; NaN stays NaN.
    """
    counts = torch.zeros(num_ranks, dtype=torch.float64)
    counts[rank] = len(values)
    ends = sum_over_ranks(counts).cpu().long().cumsum(0).tolist()
    gathered = torch.zeros(ends[-1], dtype=torch.float64)
    gathered[ends[rank] - len(values) : ends[rank]] = values.detach().double().cpu()
    return sum_over_ranks(gathered).cpu()
