"""What a cell of a file of scores says: a number, yes or no, or text."""

from __future__ import annotations

import json
import math
from typing import Any

# Reasons to finish that mean the completion was cut, as engines write them.
_CUT = ("length", "max_tokens", "truncated")


def number(value: Any) -> float:
    """A finite number: of JSON, a truth value, or text that is one, as a CSV file has it.

    Args:
        value: of a cell.

    Returns:
        The number.

    Raises:
        ValueError: it is none.
    """
    if value is None or value == "":
        raise ValueError("it is missing")
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"a number is needed, got a {type(value).__name__}")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"a number is needed, got {str(value)[:40]!r}") from None
    if not math.isfinite(found):
        raise ValueError(f"a finite number is needed, got {value}")
    return found


def optional_number(value: Any) -> float:
    """A finite number, or NaN where there is none."""
    return math.nan if value is None or value == "" else number(value)


def flag(value: Any) -> float:
    """1 for true, 0 for false, NaN for no value; text may say true or false."""
    text = str(value).strip().lower()
    if value is None or text == "":
        return math.nan
    if text in ("true", "1", "1.0"):
        return 1.0
    if text in ("false", "0", "0.0"):
        return 0.0
    raise ValueError(f"true or false is needed, got {str(value)[:40]!r}")


def is_cut(value: Any) -> float:
    """1 where a completion was cut, from a truth value or from a reason to finish."""
    try:
        return flag(value)
    except ValueError:
        if not isinstance(value, str):
            raise
        return float(value.strip().lower() in _CUT)


def text_of(value: Any) -> str:
    """A prompt or a completion as text, a chat message by message."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n".join(f"{m.get('role', '')}: {text_of(m['content'])}" for m in value)
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
