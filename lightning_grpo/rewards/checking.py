"""Checks what a reward function returned: a finite number or None per completion."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lightning_grpo.rewards.answers import completion_text
from lightning_grpo.rewards.running import Failure
from lightning_grpo.types import CompletionText

_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class CheckedValues:
    """B values of one reward function, and which of them are not rewards."""

    numbers: list[float]
    """B rewards; NaN for None and for bad rows."""
    bad_rows: list[int] = field(default_factory=list)
    """Rows without a usable value; all rows when the function failed as a whole."""
    problem: str = ""
    """What is wrong, to follow "reward function 'name' "; empty when nothing is."""
    cause: BaseException | None = None
    """The exception behind the problem, if there is one."""


def check_values(outcome: list[Any] | Failure, completions: list[CompletionText]) -> CheckedValues:
    """Turn what a function returned into numbers.

    Args:
        outcome: the list that the function returned, or its failure.
        completions: the B completions that it was to score.

    Returns:
        B numbers with the bad rows named.
    """
    size = len(completions)
    if isinstance(outcome, Failure):
        error = outcome.error
        return _all_bad(size, f"raised {type(error).__name__}: {error}", error)
    if len(outcome) != size:
        return _all_bad(
            size, f"returned {len(outcome)} values, expected {size}, one per completion"
        )
    values = [_number(value) for value in outcome]
    filled = [math.nan if value is None else value for value in values]
    bad_rows = [row for row, value in enumerate(values) if value is None]
    if not bad_rows:
        return CheckedValues(filled)
    row = bad_rows[0]
    shown = completion_text(completions[row])[:_SHOWN_CHARACTERS]
    problem = (
        f"returned {_described(outcome[row])} for row {row} (completion {shown!r}); return a "
        "finite number, or None for a row that it does not score"
    )
    return CheckedValues(filled, bad_rows, problem)


def _all_bad(size: int, problem: str, cause: BaseException | None = None) -> CheckedValues:
    return CheckedValues([math.nan] * size, list(range(size)), problem, cause)


def _number(value: Any) -> float | None:
    """Return a reward as float: NaN if it is None, and None if it is no reward."""
    if value is None:
        return math.nan
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.item() if value.ndim == 0 else None
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _described(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
