"""PredictionWriter: what `predict` leaves behind."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from upath import UPath

from lightning_grpo.json_lines import append_text
from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Rollout


class PredictionWriter(L.Callback):
    """Write the completions of `predict` to JSONL, one line per completion.

    Args:
        path: the file; predictions.jsonl in the run's folder when null. With several ranks each
            writes a file of its own, with its number before the ending.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._file: UPath | None = None

    def on_predict_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Open an empty file."""
        module.phase.enter("predicting")
        file = UPath(self.path) if self.path else module.run_dir / "predictions.jsonl"
        if trainer.world_size > 1:
            file = file.with_suffix(f".{trainer.global_rank}{file.suffix}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        self._file = file

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: GRPOModule, outputs: Rollout, batch: Any, batch_idx: int
    ) -> None:
        """Append a batch."""
        assert self._file is not None
        lines = [
            json.dumps(prediction(outputs, row), default=str) + "\n" for row in range(len(outputs))
        ]
        append_text(self._file, "".join(lines))

    def on_predict_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Say where the file is."""
        rank_zero_info(f"predictions: {self._file}")


def prediction(rollout: Rollout, row: int) -> dict[str, Any]:
    """One completion as a line of JSON: the data's columns, prompt, completion, log-prob."""
    return {
        **{name: values[row] for name, values in rollout.columns.items()},
        "prompt": rollout.prompts[row],
        "completion": rollout.completions[row],
        "logprob": float(rollout.sampler_logprobs[row].sum()),
        "num_tokens": int(rollout.completion_mask[row].sum()),
        "is_truncated": bool(rollout.truncated[row]),
    }
