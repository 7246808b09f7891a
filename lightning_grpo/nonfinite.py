"""What is written down when a loss or a gradient is not finite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.types import Rollout


def row_is_finite(logprobs: Tensor, per_token: Tensor, mask: Tensor) -> Tensor:
    """Whether all log-probs and losses of a row are finite.

    Args:
        logprobs: (B, C).
        per_token: (B, C) token losses.
        mask: (B, C) bool, True where the policy acted.

    Returns:
        (B,) bool.
    """
    finite = torch.isfinite(logprobs) & torch.isfinite(per_token)
    return (finite | ~mask).all(dim=1)


def write_nonfinite_rows(
    path: Path, parts: Sequence[tuple[Rollout, Tensor]], *, reason: str
) -> int:
    """Append the rows behind a skipped step to a JSONL file.

    Args:
        path: the file; its folder is made.
        parts: micro-batches with (B,) bool of `row_is_finite`. When every row is finite by
            itself, only the gradient was not, and all rows are written.
        reason: what was not finite.

    Returns:
        The number of rows written.
    """
    everything_finite = all(bool(finite.all()) for _, finite in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    with path.open("a", encoding="utf-8") as file:
        for part, finite in parts:
            for row in range(len(part)):
                if everything_finite or not finite[row]:
                    file.write(json.dumps(_describe(part, row, reason), default=str) + "\n")
                    num_rows += 1
    return num_rows


def _describe(part: Rollout, row: int, reason: str) -> dict[str, Any]:
    length = int(part.completion_mask[row].sum())
    description: dict[str, Any] = {
        "reason": reason,
        "prompt": part.prompts[row],
        "completion": part.completions[row],
        "completion_ids": part.completion_ids[row, :length].tolist(),
    }
    if part.rewards is not None:
        description["reward"] = float(part.rewards[row])
    if part.advantages is not None:
        description["advantage"] = float(part.advantages[row, 0])
    for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs"):
        values = getattr(part, name)
        if values is not None:
            description[f"{name}_min"] = float(values[row, :length].min())
    return description
