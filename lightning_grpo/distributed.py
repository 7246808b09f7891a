"""Stopping together: an error on one rank stops the others before they wait for it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lightning_grpo.resume.stopping import STOP, LeftAtOnce
from lightning_grpo.types import SumOverRanks


class TrainingStopped(RuntimeError):
    """A run that cannot go on, with all that its user needs to know; the same on every rank."""

    is_on_all_ranks = True


class HasSum(Protocol):
    """Anything that adds a tensor over the ranks, such as the LightningModule."""

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all ranks."""
        ...


@contextlib.contextmanager
def failing_together(module: HasSum, what: str) -> Iterator[None]:
    """Raise on every rank when the block raised on any, or when a signal asked any to stop.

    Every rank has to enter it, and the block must not contain an exchange between the ranks.
    What is raised has `is_on_all_ranks` set.

    Args:
        module: adds over the ranks.
        what: what the block does, for the message on the other ranks.

    Raises:
        RuntimeError: another rank failed; it shows the cause.
        SIGTERMException: a rank was asked to stop.
        KeyboardInterrupt: the same, by a Ctrl-C on one of several ranks.
    """
    error: Exception | None = None
    try:
        yield
    except LeftAtOnce:
        pass
    except Exception as caught:  # whatever it is, the others have to hear of it before it goes on
        error = caught
    asked = STOP.signal
    told = torch.tensor([error is not None, asked == signal.SIGTERM, asked == signal.SIGINT])
    num_failed, num_terminated, num_interrupted = module.sum_over_ranks(told.double()).tolist()
    if num_failed and error is None:
        error = RuntimeError(f"another rank failed while {what}; its own output has the cause")
    if error is not None:
        with contextlib.suppress(AttributeError):  # of an exception with slots
            error.is_on_all_ranks = True  # type: ignore[attr-defined]
        raise error
    if num_terminated or num_interrupted:
        STOP.stop_together(int(signal.SIGTERM if num_terminated else signal.SIGINT))


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
