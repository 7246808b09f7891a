"""Calls reward functions with the rows of a rollout, where they have not been called early."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_grpo.rewards.binding import bind
from lightning_grpo.rewards.early import EarlyScores
from lightning_grpo.rewards.function_log import FunctionLog
from lightning_grpo.rewards.running import Failure, run_all


class Calls(NamedTuple):
    """What the functions said, in their order."""

    outcomes: list[list[Any] | Failure]
    """The list that each returned, or its failure."""
    logs: list[FunctionLog]
    reasons: dict[int, str]
    """Index of a function that was called early to no avail -> why."""


def call_functions(
    functions: Sequence[Callable[..., Any]],
    given: Mapping[str, Sequence[Any]],
    arguments: Mapping[str, Any],
    early: EarlyScores,
) -> Calls:
    """Call each function with all rows, unless it has scored each of them early.

    Args:
        functions: reward functions.
        given: prompts, completions, completion ids and columns, B values each.
        arguments: further arguments.
        early: what was scored while the rollout was made.

    Returns:
        What they returned and logged. Without rows no function is called.

    Raises:
        KeyboardInterrupt: when it is raised, here or in a function.
    """
    size = len(given["completions"])
    calls = Calls([[] for _ in functions], [FunctionLog(size) for _ in functions], {})
    if not size:
        return calls

    def call_with_all(indices: Sequence[int]) -> None:
        bound = [
            bind(functions[i], {**given, **arguments, **calls.logs[i].arguments()}) for i in indices
        ]
        for i, outcome in zip(indices, run_all(bound)):
            calls.outcomes[i] = outcome

    try:
        # Meanwhile the threads go on with the rows of the others.
        call_with_all([i for i in range(len(functions)) if i not in early.functions])
        for i in early.functions:
            values, log, reason = early.take(i, given)
            if values is not None:
                calls.outcomes[i], calls.logs[i] = values, log
            else:
                calls.reasons[i] = reason
        call_with_all(list(calls.reasons))
    except BaseException:  # such as Ctrl-C: no call is to go on behind it
        early.cancel()
        raise
    return calls
