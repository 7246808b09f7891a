"""From completions to rewards: calls the reward functions, checks their values, adds them up.

A reward function is any callable `f(prompts, completions, **columns) -> list[float | None]`, plain
or async, with one value per completion; None means that it does not score the row. It is called
with keywords: prompts, completions, completion_ids, trainer_state, log_metric, log_extra, and every
column of the data. Functions written for the GRPOTrainer of TRL fit unchanged; one that has no
`**kwargs` gets only the arguments that it names.

It is called once, with all rows after the rollout, unless it says that it scores each row by itself
(see `per_row`): then it is called with rows as they end, for the same result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_grpo.rewards.binding import function_names, is_per_row, required_arguments
from lightning_grpo.rewards.calling import Calls, call_functions
from lightning_grpo.rewards.checking import CheckedValues, check_values
from lightning_grpo.rewards.early import EarlyScores
from lightning_grpo.rewards.function_log import FunctionLog
from lightning_grpo.types import CompletionText, Prompt

if TYPE_CHECKING:
    from transformers import TrainerState

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

_STANDARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_metric",
    "log_extra",
)

_logger = logging.getLogger(__name__)


class RewardError(ValueError):
    """A reward function cannot be called, failed, or returned what is not a reward."""


@dataclass(frozen=True)
class Scores:
    """What the reward functions said about B completions."""

    function_rewards: dict[str, Tensor]
    """(B,) float64 per function, unweighted; NaN where the function returned None."""
    rewards: Tensor
    """(B,) float64, weighted sum over the functions that scored the row; NaN where none did."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Values given to log_metric, in the order of the functions."""
    extra_columns: dict[str, list[Any]] = field(default_factory=dict)
    """Columns given to log_extra, B values each; a name in use becomes `function/name`."""
    num_errors: int = 0
    """Values, over rows and functions, that `on_error` had to fill in."""


class Scorer:
    """Scores completions with one or more reward functions.

    reward[i] = sum over the functions f that scored row i of weight[f] * f[i]

    Source: own; the arguments of a reward function are those of TRL's GRPOTrainer.

    Args:
        functions: reward functions; at least one.
        weights: one per function, finite; 1 each if not given. A function of weight 0 is logged
            but scores nothing: a row that only it scored counts as not scored.
        on_error: what to do when a function raises, returns a wrong number of values, or returns
            something that is neither a finite number nor None. `raise` stops with a RewardError.
            `skip` takes the row of a bad value, or in the other two cases all rows, as not scored
            by this function. `value` gives them `error_value`. Both log a warning and count.
        error_value: reward of what failed under `on_error: value`, before the weight; finite.
        per_row: names of functions that score each row by itself, besides those that say so.
        num_threads: rows scored at a time while others are being completed; 0 waits for all.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        on_error: Literal["raise", "skip", "value"] = "raise",
        error_value: float = 0.0,
        per_row: Collection[str] = (),
        num_threads: int = 8,
    ) -> None:
        if not functions:
            raise ValueError("functions is empty; give at least one reward function")
        if on_error not in ("raise", "skip", "value"):
            raise ValueError(f"on_error must be raise, skip or value, not {on_error!r}")
        if not math.isfinite(error_value):
            raise ValueError(f"error_value must be finite, not {error_value}")
        self.functions = list(functions)
        self.names = function_names(self.functions)
        self.weights = _checked_weights(weights, self.names)
        self.on_error = on_error
        self.error_value = float(error_value)
        for name in per_row:
            if name not in self.names:
                raise ValueError(f"per_row names {name!r}, which is none of {self.names}")
        if num_threads < 0:
            raise ValueError(f"num_threads must not be negative, got {num_threads}")
        self.num_threads = num_threads
        self.early_functions = {
            index: function
            for index, (name, function) in enumerate(zip(self.names, self.functions))
            if num_threads and (name in per_row or is_per_row(function))
        }
        """Those that are called with rows as they end, by their index."""
        self._noted: set[str] = set()

    def start_early(
        self,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]],
        trainer_state: TrainerState | None = None,
    ) -> EarlyScores:
        """Get ready to score rows of a rollout as they end.

        Args:
            prompts: B prompts, each repeated for every completion of its group.
            columns: data columns, B values each.
            trainer_state: where training stands.

        Returns:
            What takes the rows, and then goes into the call of the scorer.
        """
        if not self.early_functions:
            return EarlyScores({})
        arguments = {"trainer_state": trainer_state}
        return EarlyScores(self.early_functions, prompts, columns, arguments, self.num_threads)

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[CompletionText],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
        trainer_state: TrainerState | None = None,
        early: EarlyScores | None = None,
    ) -> Scores:
        """Score B completions.

        Args:
            prompts: B prompts, each repeated for every completion of its group.
            completions: B completions, text or messages.
            completion_ids: B lists of token ids, unpadded, up to and including EOS.
            columns: data columns, B values each.
            trainer_state: where training stands, for functions that change with it.
            early: what was scored while the rollout was made.

        Returns:
            The rewards of the B rows. Without rows no function is called.

        Raises:
            RewardError: a column is missing, has a reserved name or a wrong length; or, under
                `on_error: raise`, a function failed.
        """
        self._check_columns(columns)
        given: dict[str, Any] = {"prompts": prompts, "completions": completions}
        given.update(completion_ids=completion_ids, **columns)
        _check_lengths(given, len(completions))
        calls = call_functions(
            self.functions, given, {"trainer_state": trainer_state}, early or EarlyScores({})
        )
        self._note_reasons(calls)
        checked = [check_values(outcome, completions) for outcome in calls.outcomes]
        function_rewards = {
            name: self._filled(name, values) for name, values in zip(self.names, checked)
        }
        return Scores(
            function_rewards=function_rewards,
            rewards=_weighted_sum(list(function_rewards.values()), self.weights),
            metrics=_merged_metrics(calls.logs),
            extra_columns=_merged_columns(self.names, calls.logs),
            num_errors=sum(len(values.bad_rows) for values in checked),
        )

    def _note_reasons(self, calls: Calls) -> None:
        """Say once why a function is called with all rows though it scores each by itself."""
        for index, reason in calls.reasons.items():
            name = self.names[index]
            if reason and name not in self._noted:
                self._noted.add(name)
                _logger.warning(
                    "reward function '%s' is to score each row by itself, but called with some "
                    "rows %s; it is called again with all rows after the rollout",
                    name,
                    reason,
                )
            if calls.logs[index].metrics:  # it will log them again
                self.early_functions.pop(index, None)

    def missing_columns(self, available: Collection[str]) -> dict[str, list[str]]:
        """Find the required arguments that the data cannot fill.

        Args:
            available: names of the data columns.

        Returns:
            Function name -> its missing columns; functions that miss nothing are left out.

        Raises:
            RewardError: a column has the name of an argument that reward functions get anyway.
        """
        for name in available:
            if name in _STANDARD_ARGUMENTS:
                raise RewardError(
                    f"the data has a column '{name}', but reward functions get another argument of "
                    "this name; rename the column"
                )
        filled = {*available, *_STANDARD_ARGUMENTS}
        missing = {
            name: [argument for argument in required_arguments(f) if argument not in filled]
            for name, f in zip(self.names, self.functions)
        }
        return {name: arguments for name, arguments in missing.items() if arguments}

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        for name, missing in self.missing_columns(columns).items():
            raise RewardError(
                f"reward function '{name}' needs the column {', '.join(map(repr, missing))}, which "
                f"the data does not have (its columns: {', '.join(columns) or 'none'}); rename the "
                "column, or give the argument a default"
            )

    def _filled(self, name: str, values: CheckedValues) -> Tensor:
        rewards = torch.tensor(values.numbers, dtype=torch.float64)
        if not values.bad_rows:
            return rewards
        message = f"reward function '{name}' {values.problem}"
        if self.on_error == "raise":
            raise RewardError(message) from values.cause
        is_skip = self.on_error == "skip"
        rewards[values.bad_rows] = math.nan if is_skip else self.error_value
        effect = "are not scored by it" if is_skip else f"get {self.error_value} from it"
        _logger.warning(
            "%s; %d of %d rows %s", message, len(values.bad_rows), len(values.numbers), effect
        )
        return rewards


def _checked_weights(weights: Sequence[float] | None, names: list[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"weights has {len(weights)} values for {len(names)} reward functions: "
            f"{', '.join(names)}"
        )
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite and not all 0, not {list(weights)}")
    return [float(weight) for weight in weights]


def _check_lengths(arguments: Mapping[str, Sequence[Any]], size: int) -> None:
    for name, values in arguments.items():
        if len(values) != size:
            raise RewardError(f"'{name}' has {len(values)} values for {size} completions")


def _weighted_sum(function_rewards: list[Tensor], weights: list[float]) -> Tensor:
    total = torch.zeros_like(function_rewards[0])
    is_scored = torch.zeros_like(total, dtype=torch.bool)
    for rewards, weight in zip(function_rewards, weights):
        if weight:
            total += weight * rewards.nan_to_num(nan=0.0)
            is_scored |= ~rewards.isnan()
    return total.masked_fill(~is_scored, math.nan)


def _merged_metrics(logs: list[FunctionLog]) -> dict[str, list[float]]:
    merged: dict[str, list[float]] = {}
    for log in logs:
        for name, value in log.metrics:
            merged.setdefault(name, []).append(value)
    return merged


def _merged_columns(names: list[str], logs: list[FunctionLog]) -> dict[str, list[Any]]:
    merged: dict[str, list[Any]] = {}
    for name, log in zip(names, logs):
        for column, values in log.columns.items():
            merged[f"{name}/{column}" if column in merged else column] = values
    return merged
