"""What a reward function logs besides its rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FunctionLog:
    """Takes what one call of a function hands to log_metric and log_extra.

    Args:
        size: completions of the call.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.metrics: list[tuple[str, float]] = []
        self.columns: dict[str, list[Any]] = {}

    def arguments(self) -> dict[str, Any]:
        """The arguments of a reward function that write to this log."""
        return {"log_metric": self.log_metric, "log_extra": self.log_extra}

    def log_metric(self, name: str, value: float) -> None:
        """Note one number."""
        self.metrics.append((str(name), float(value)))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Note a column with a value for each completion.

        Raises:
            ValueError: another number of values.
        """
        values = list(values)
        if len(values) != self.size:
            raise ValueError(
                f"log_extra('{column}') got {len(values)} values, expected {self.size}, one per "
                "completion"
            )
        self.columns[str(column)] = values
