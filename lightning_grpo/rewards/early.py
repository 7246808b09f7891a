"""Rewards of rows that have ended, while the others are still being completed.

A function is called early only when it scores each row by itself, and what comes of it is what one
call with all rows after the rollout would give: where the calls with some rows cannot tell (one of
them fails, or logs a metric of its rows), that one call is made after all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch

from lightning_grpo.rewards.binding import bind, copied
from lightning_grpo.rewards.function_log import FunctionLog
from lightning_grpo.rewards.running import Failure, Workers, outcome_of, run_all
from lightning_grpo.types import CompletionText, Prompt

_NOT_SEEN = object()
# Rows wait for others, so that a cheap function is not called for every single one.
_SECONDS_BETWEEN_CALLS = 0.05


class _Call(NamedTuple):
    """A call of a function with some rows."""

    rows: list[int]
    log: FunctionLog
    future: Future[Any]


class EarlyOutcome(NamedTuple):
    """What a function returned and logged for B rows."""

    values: list[Any] | None
    """None when it has to be called with all rows."""
    log: FunctionLog
    reason: str = ""
    """Why there are no values; empty when none of the rows was scored early."""


class EarlyScores:
    """Scores the rows of one rollout as they end.

    It is a context for the rollout: an error inside drops the calls that wait.

    Args:
        functions: index to function, of those that score each row by itself; perhaps none.
        prompts: B prompts.
        columns: data columns, B values each.
        arguments: further arguments of the functions.
        num_threads: rows scored at a time, at least 1 where there are functions.
    """

    def __init__(
        self,
        functions: Mapping[int, Callable[..., Any]],
        prompts: Sequence[Prompt] = (),
        columns: Mapping[str, Sequence[Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        num_threads: int = 1,
    ) -> None:
        self.functions = dict(functions)
        # Copies, so that rows that are changed in place after they were scored are found.
        self.rows: dict[str, list[Any]] = {
            "prompts": copied(list(prompts)),
            "completions": [_NOT_SEEN] * len(prompts),
            "completion_ids": [_NOT_SEEN] * len(prompts),
        }
        self.rows.update({name: copied(list(x)) for name, x in (columns or {}).items()})
        self.arguments = dict(arguments or {})
        # A new thread would have it on, whatever it is here.
        self.is_grad_enabled = torch.is_grad_enabled()
        self.workers = Workers(num_threads)
        self.calls: dict[int, list[_Call]] = {index: [] for index in self.functions}
        self._waiting: list[int] = []
        self._called_at = time.monotonic()

    def __enter__(self) -> EarlyScores:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._start_waiting()
            self.workers.close()
        else:
            self.workers.cancel()

    def add(
        self,
        rows: Sequence[int],
        completions: Sequence[CompletionText],
        completion_ids: Sequence[list[int]],
    ) -> None:
        """Score rows that have ended, now or soon.

        Args:
            rows: b row numbers, from 0 to B - 1, each given once.
            completions: b completions.
            completion_ids: b lists of token ids, unpadded.
        """
        if not self.functions:
            return
        for row, completion, ids in zip(rows, completions, completion_ids, strict=True):
            self.rows["completions"][row] = copied(completion)
            self.rows["completion_ids"][row] = list(ids)
        self._waiting += rows
        if time.monotonic() - self._called_at >= _SECONDS_BETWEEN_CALLS:
            self._start_waiting()

    def _start_waiting(self) -> None:
        """Start to score the rows that wait, split over the threads."""
        rows, self._waiting = self._waiting, []
        self._called_at = time.monotonic()
        size = max(1, -(-len(rows) // self.workers.num_threads))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            for index, function in self.functions.items():
                log = FunctionLog(len(part))
                future = self.workers.start(partial(self._score, function, part, log))
                self.calls[index].append(_Call(part, log, future))

    def cancel(self) -> None:
        """Drop the calls that wait, and stop the async ones."""
        self.workers.cancel()

    def take(self, index: int, given: Mapping[str, Sequence[Any]]) -> EarlyOutcome:
        """Wait for what one function gave the rows.

        Rows that are not those that were scored, since something changed them or they were never
        added, are scored now.

        Args:
            index: of the function.
            given: prompts, completions, completion ids and columns, as a call with all rows would
                have them.

        Returns:
            The values of all rows of `given`, in their order.
        """
        size = len(given["completions"])
        changed = self._changed_rows(given)
        merged = FunctionLog(size)
        if len(changed) == size:
            self.workers.cancel()
            return EarlyOutcome(None, merged)
        values: list[Any] = [None] * size
        outcomes = [(call.rows, call.log, outcome_of(call.future)) for call in self.calls[index]]
        if changed:
            log = FunctionLog(len(changed))
            again = bind(self.functions[index], self._arguments(given, changed, log))
            outcomes.append((changed, log, run_all([again])[0]))
        names = outcomes[0][1].columns.keys()
        for rows, log, outcome in outcomes:
            reason = _reason(rows, log, outcome, names)
            if reason or isinstance(outcome, Failure):
                return EarlyOutcome(None, merged, reason)
            for place, (row, value) in enumerate(zip(rows, outcome, strict=True)):
                values[row] = value
                for name in names:
                    merged.columns.setdefault(name, [None] * size)[row] = log.columns[name][place]
        return EarlyOutcome(values, merged)

    def _score(self, function: Callable[..., Any], rows: list[int], log: FunctionLog) -> Any:
        with torch.set_grad_enabled(self.is_grad_enabled):
            return bind(function, self._arguments(self.rows, rows, log))()

    def _arguments(
        self, given: Mapping[str, Sequence[Any]], rows: Sequence[int], log: FunctionLog
    ) -> dict[str, Any]:
        picked = {name: [values[row] for row in rows] for name, values in given.items()}
        return picked | self.arguments | log.arguments()

    def _changed_rows(self, given: Mapping[str, Sequence[Any]]) -> list[int]:
        size = len(given["completions"])
        if given.keys() != self.rows.keys() or size != len(self.rows["prompts"]):
            return list(range(size))
        pairs = [(self.rows[name], values) for name, values in given.items()]
        return [
            row
            for row in range(size)
            if not all(_is_same(own[row], values[row]) for own, values in pairs)
        ]


def _reason(rows: Sequence[int], log: FunctionLog, outcome: list[Any] | Failure, names: Any) -> str:
    """Why a call with some rows cannot stand for its part of a call with all; empty if it can."""
    if isinstance(outcome, Failure):
        return f"it raised {type(outcome.error).__name__}: {outcome.error}"
    if len(outcome) != len(rows):
        return f"it returned {len(outcome)} values for {len(rows)} rows"
    if log.metrics:
        return f"it logged the metric {log.metrics[0][0]!r} of some rows"
    if log.columns.keys() != names:
        return "it logged a column for some rows only"
    return ""


def _is_same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    try:
        return type(old) is type(new) and bool(old == new)
    except (ValueError, RuntimeError, TypeError):  # arrays and tensors have no one answer
        return False
