"""Stopping together: an error on one rank stops the others before they wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


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
