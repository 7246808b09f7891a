"""How numbers and intervals are written for a person."""

from __future__ import annotations

import math

from lightning_grpo.intervals import Interval


def percent(share: float) -> str:
    """A share as a percentage, `-` where there is none."""
    if math.isnan(share):
        return "-"
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def percent_range(interval: Interval) -> str:
    """An interval of a share, such as 12 to 34 %."""
    low, high = (percent(end).removesuffix(" %") for end in interval)
    return f"{low} %" if low == high else f"{low} to {high} %"


def short(number: float) -> str:
    """A number with three digits, `-` where there is none."""
    return (
        "-" if math.isnan(number) else f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
    )


def short_range(interval: Interval) -> str:
    """An interval, or that it is not known."""
    if not math.isfinite(interval.low + interval.high):
        return "not known"
    return f"{short(interval.low)} to {short(interval.high)}"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun, such as 1 prompt or 1,024 prompts."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def shortened(text: str, max_chars: int) -> str:
    """A text whose middle is left out when it is too long."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[len(text) - half :]}"


def one_line(text: str, max_chars: int) -> str:
    """A text in one line that cannot move the cursor of a terminal."""
    words = " ".join(text.split())
    words = "".join(c if c.isprintable() else "?" for c in words)
    return words if len(words) <= max_chars else words[: max_chars - 3] + "..."
