"""Metrics as sums and counts, so that a mean over ranks is the mean over rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_grpo.types import SumOverRanks


class MetricSums:
    """Adds up (sum, count) pairs over micro-batches and divides once, after all ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add one micro-batch.

        Args:
            metrics: name -> (sum, count), 0-d tensors.
        """
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().double(), count.detach().double()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduce(self, sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """The means over all ranks, in one exchange. Every rank must hold the same names.

        Args:
            sum_over_ranks: adds a tensor over the ranks.

        Returns:
            Name -> sum / count; names that nothing was counted for are left out.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        # Some were counted where the model is, and some, such as rewards, on the CPU.
        device = self.sums[names[0]].device
        local = torch.stack([self.sums[name].to(device) for name in names])
        pairs = sum_over_ranks(local).tolist()
        return {
            name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count
        }
