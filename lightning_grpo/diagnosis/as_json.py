"""A diagnosis as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from lightning_grpo.diagnosis.records import Diagnosis
from lightning_grpo.intervals import Interval


def to_json(found: Diagnosis) -> str:
    """The records as JSON; a number that is not known is null.

    Args:
        found: the diagnosis.

    Returns:
        The text.
    """
    return json.dumps(_plain(found), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Dicts, lists, text and finite numbers only."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Interval):
        return {"low": _plain(value.low), "high": _plain(value.high)}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
