"""Steps that must not happen: a loss or a gradient that is not finite."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from upath import UPath

from lightning_grpo.distributed import TrainingStopped
from lightning_grpo.types import Rollout


class NonfiniteGuard:
    """Decides before each optimizer step whether it may happen, and writes down why not.

    Args:
        max_in_a_row: raise at so many skipped steps in a row, >= 1.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.num_in_a_row = 0
        self._window: list[tuple[Rollout, Tensor]] = []
        self._window_loss = 0.0

    def note_rows(self, rows: Rollout, is_finite: Tensor) -> None:
        """Remember the rows of a forward until the step they belong to.

        Args:
            rows: (b) rows.
            is_finite: (b,) bool of `row_is_finite`.
        """
        self._window.append((rows, is_finite))

    def note_loss(self, loss: float) -> None:
        """Add the loss of a minibatch to that of the step it belongs to.

        Args:
            loss: over all ranks.
        """
        self._window_loss += loss

    def must_skip(self, grad_norm: float, path: UPath) -> bool:
        """Say whether to skip the step; the rows behind a skipped one go to a file.

        Args:
            grad_norm: of the whole gradient, over all ranks.
            path: where this rank writes its rows.

        Returns:
            True when the step must not happen; the same on every rank.

        Raises:
            TrainingStopped: too many in a row.
        """
        window, self._window = self._window, []
        loss, self._window_loss = self._window_loss, 0.0
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.num_in_a_row = 0
            return False
        self.num_in_a_row += 1
        reason = f"loss {loss}, gradient norm {grad_norm}"
        # A finite loss has no bad row on any rank: then all rows share the gradient that is not.
        num_rows = write_rows(path, window, reason=reason, only_bad=not math.isfinite(loss))
        where = f"{num_rows} rows are in {path}" if num_rows else "this rank wrote no rows"
        message = f"{reason}: the step was skipped on all ranks; {where}"
        if self.num_in_a_row >= self.max_in_a_row:
            raise TrainingStopped(
                f"{message}. This was step {self.num_in_a_row} in a row "
                "(model.max_nonfinite_steps): lower the learning rate, or look at those rows"
            )
        warnings.warn(message, stacklevel=2)
        return True


def row_is_finite(per_token: Tensor, mask: Tensor) -> Tensor:
    """Whether all numbers of a row are finite.

    Args:
        per_token: (B, C) log-probs or losses.
        mask: (B, C) bool, True where the policy acted.

    Returns:
        (B,) bool.
    """
    return (torch.isfinite(per_token) | ~mask).all(dim=1)


def write_rows(
    path: UPath, parts: Sequence[tuple[Rollout, Tensor]], *, reason: str, only_bad: bool
) -> int:
    """Write the rows behind a skipped step to a JSONL file.

    Args:
        path: the file; it and its folder are made when there is a row. A run that is resumed
            before this step writes it again.
        parts: micro-batches with (B,) bool of `row_is_finite`.
        reason: what was not finite.
        only_bad: leave out the rows that are finite. Rows that count nothing are never written.

    Returns:
        The number of rows written; 0 with a warning when the file cannot be written.
    """
    lines = [
        json.dumps(_describe(part, row, reason), default=str) + "\n"
        for part, finite in parts
        for row in range(len(part))
        if part.action_mask[row].any() and not (only_bad and finite[row])
    ]
    if not lines:
        return 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:  # one rank must not stop alone, while the others go on
        warnings.warn(f"{path} cannot be written: {error}", stacklevel=2)
        return 0
    return len(lines)


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
        if values is not None and length:
            description[f"{name}_min"] = float(values[row, :length].min())
    return description
