"""A rollout as tensors and plain values, and back."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
from torch import Tensor

from lightning_grpo.types import Rollout

_told: set[str] = set()


class NotPlain(TypeError):
    """A value that no checkpoint can hold, since reading it back would run code."""


def encoded(rollout: Rollout) -> dict[str, Any]:
    """The fields of a rollout that are set, tensors on the CPU.

    A column of the data that holds anything but text, numbers, lists and dicts of them (images,
    dates, objects) is left out, with a warning: its rewards are there, so that nothing is lost but
    what callbacks of one's own might have read in it.

    Args:
        rollout: B rows.

    Returns:
        Name -> tensor, list or dict.
    """
    found: dict[str, Any] = {}
    for item in dataclasses.fields(rollout):
        value = getattr(rollout, item.name)
        if isinstance(value, dict):
            columns = {k: _kept(f"{item.name}[{k!r}]", column) for k, column in value.items()}
            found[item.name] = {k: column for k, column in columns.items() if column is not None}
        elif value is not None:
            kept = _kept(item.name, value)
            found[item.name] = [None] * len(rollout) if kept is None else kept
    return found


def decoded(fields: dict[str, Any]) -> Rollout:
    """The rollout that `encoded` was given, on the CPU."""
    return Rollout(**fields)


def _kept(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return plain(value)
    except NotPlain as error:
        if name not in _told:
            _told.add(name)
            warnings.warn(
                f"a checkpoint cannot keep {error} in {name} of a rollout: where it is resumed "
                "before the rollout is used up, callbacks get the rollout without it",
                stacklevel=2,
            )
        return None


def plain(value: Any) -> Any:
    """A copy of a value of which nothing is left but plain values.

    Args:
        value: of a column of the data: what JSON can say, numpy's numbers, tensors and tuples.

    Returns:
        The same with numpy's numbers as Python's.

    Raises:
        NotPlain: anything else, named by its type.
    """
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (np.bool_, np.integer, np.floating, np.str_)):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    if type(value) is dict:
        return {plain(key): plain(entry) for key, entry in value.items()}
    raise NotPlain(f"values of type {type(value).__name__}")
