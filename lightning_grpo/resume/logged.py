"""The numbers that Lightning has been given to log, which later rows of the metrics repeat.

What was logged once in an iteration, such as the mean reward, stands in the row of every step of
the iteration; callbacks read it from `trainer.callback_metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultMetric,
    _Sync,
)
from torch import Tensor


@dataclass(frozen=True)
class Logged:
    """References to what Lightning holds, none of which it changes in place."""

    entries: list[tuple[Any, bool, Tensor, Tensor | None, Tensor | None]]
    """Metadata, whether it was reset, sum, weight, and value of the last step."""
    callback_metrics: dict[str, Any]
    logged_metrics: dict[str, Any]
    is_first_batch: bool | None
    """Of an epoch; None before the first."""
    hook: str | None
    """That has logged last."""


def logged_now(trainer: L.Trainer) -> Logged:
    """What Lightning holds now of training.

    Args:
        trainer: in fit.
    """
    connector = trainer._logger_connector
    entries = [
        (
            metric.meta,
            metric.has_reset,
            metric.value,
            metric.cumulated_batch_size if metric.meta.is_mean_reduction else None,
            metric._forward_cache,
        )
        for metric in trainer.fit_loop.epoch_loop._results.values()
        if metric.is_tensor  # a torchmetrics object is for its owner to keep
    ]
    return Logged(
        entries,
        dict(connector._callback_metrics),
        dict(connector._logged_metrics),
        connector._first_loop_iter,
        connector._current_fx,
    )


def encoded(logged: Logged) -> dict[str, Any]:
    """The same as tensors and plain values."""
    entries = []
    for meta, was_reset, value, weight, cache in logged.entries:
        entry = {name: getattr(meta, name) for name in _PLAIN_METADATA}
        entry |= {
            "reduce_fx": meta.reduce_fx.__name__,
            "is_synced": bool(meta.sync.should),
            "is_rank_zero_only": bool(meta.sync.rank_zero_only),
            "was_reset": was_reset,
            "value": _number(value),
            "weight": None if weight is None else _number(weight),
            "cache": None if cache is None else _number(cache),
        }
        entries.append(entry)
    return {
        "entries": entries,
        "callback_metrics": {k: _number(v) for k, v in logged.callback_metrics.items()},
        "logged_metrics": {k: _number(v) for k, v in logged.logged_metrics.items()},
        "is_first_batch": logged.is_first_batch,
        "hook": logged.hook,
    }


def put_back(trainer: L.Trainer, state: dict[str, Any], *, repeats_batch: bool) -> None:
    """Let Lightning hold what `encoded` describes.

    Args:
        trainer: in fit, about to go on.
        state: of `encoded`.
        repeats_batch: whether the batch in which it was taken is begun again.
    """
    device = trainer.strategy.root_device
    results = trainer.fit_loop.epoch_loop._results
    results.clear()
    for entry in state["entries"]:
        meta = _Metadata(
            **{name: entry[name] for name in _PLAIN_METADATA}, reduce_fx=entry["reduce_fx"]
        )
        # The same as `LightningModule.log` will ask for, or it would refuse to log the name again.
        meta.sync = _Sync(
            _should=entry["is_synced"],
            fn=trainer.strategy.reduce,
            rank_zero_only=entry["is_rank_zero_only"],
        )
        metric = _ResultMetric(meta, True).to(device)
        metric.value = _tensor(entry["value"], device)
        if entry["weight"] is not None:
            metric.cumulated_batch_size = _tensor(entry["weight"], device)
        if entry["cache"] is not None:
            metric._forward_cache = _tensor(entry["cache"], device)
        metric.has_reset = entry["was_reset"]
        metric._update_count = 1
        results[f"{meta.fx}.{meta.name}"] = metric
    connector = trainer._logger_connector
    for name in ("callback_metrics", "logged_metrics"):
        restored = {key: _tensor(number, device) for key, number in state[name].items()}
        setattr(connector, f"_{name}", restored)
    is_first: bool | None = state["is_first_batch"]
    # Beginning a batch turns None into True, and True into False.
    connector._first_loop_iter = None if repeats_batch and is_first else is_first
    connector._current_fx = state["hook"]


_PLAIN_METADATA = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch"),
    *("enable_graph", "add_dataloader_idx", "metric_attribute"),
)


def _number(value: Any) -> list[Any]:
    """A number and its type: float32 is exact in a Python float, and so is float64."""
    tensor = torch.as_tensor(value)
    return [tensor.item(), str(tensor.dtype).removeprefix("torch.")]


def _tensor(number: list[Any], device: torch.device) -> Tensor:
    value, dtype = number
    return torch.tensor(value, dtype=getattr(torch, dtype), device=device)
