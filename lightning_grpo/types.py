"""The dimension legend and the records that travel through one iteration.

Dimensions, used in every shape comment of the project:

    N   prompts of one iteration
    G   completions per prompt (the group size)
    B   rows, B = N * G; the G rows of a group are contiguous when they are made
    P   prompt tokens (left-padded)
    C   completion tokens (right-padded)
    T   P + C
    V   vocabulary
    F   reward functions

A mask is named for what is True in it. Log-probabilities are in nats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Adds a tensor over the ranks, in float64; on one process it returns the tensor itself.
SumOverRanks = Callable[[Tensor], Tensor]
# A prompt is a string, or the messages of a chat: [{"role": ..., "content": ...}, ...].
Prompt = str | list[dict[str, Any]]
# A completion as a reward function sees it: a string, or for a chat prompt one assistant message.
CompletionText = str | list[dict[str, Any]]


@dataclass(frozen=True)
class PromptBatch:
    """N prompts, tokenized, with the columns of their rows."""

    prompts: list[Prompt]
    """The prompts as the reward functions get them."""
    prompt_ids: list[list[int]]
    """N lists of token ids, unpadded."""
    columns: dict[str, list[Any]]
    """All other columns of the data, N values each; they go to the reward functions."""
    group_ids: list[int]
    """One id per prompt, unique over all ranks; the same text twice is two groups."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Completions:
    """What an engine returns: G completions for each of N prompts, the rows of a group together."""

    completion_ids: Tensor
    """(B, C) sampled token ids, right-padded."""
    completion_mask: Tensor
    """(B, C) bool, True up to and including the token that ended the completion."""
    sampler_logprobs: Tensor
    """(B, C) float32, log-prob under the distribution the token was drawn from; 0 off the mask."""
    truncated: Tensor
    """(B,) bool, True where the token limit ended the completion, not EOS or a stop string."""


@dataclass(frozen=True)
class Rollout:
    """The completions of one iteration on this rank, and what later phases add to them."""

    prompt_ids: Tensor
    """(B, P) left-padded."""
    prompt_mask: Tensor
    """(B, P) bool, True = real token."""
    completion_ids: Tensor
    """(B, C) right-padded."""
    completion_mask: Tensor
    """(B, C) bool, True up to and including EOS."""
    action_mask: Tensor
    """(B, C) bool, True where the policy chose the token; the loss counts these."""
    sampler_logprobs: Tensor
    """(B, C) as the engine reported them."""
    group_ids: Tensor
    """(B,) int64, explicit group of each row."""
    truncated: Tensor
    """(B,) bool."""
    prompts: list[Prompt] = field(default_factory=list)
    """B prompts as the reward functions get them."""
    completions: list[CompletionText] = field(default_factory=list)
    """B completions as text or messages, for rewards and for people; never tokenized again."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Data columns, B values each."""
    rewards: Tensor | None = None
    """(B,) float64, weighted sum over reward functions; NaN where no function scored the row."""
    function_rewards: dict[str, Tensor] = field(default_factory=dict)
    """(B,) float64 per reward function, unweighted; NaN where the function returned None."""
    extra_columns: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that reward functions logged with log_extra, B values each."""
    advantages: Tensor | None = None
    """(B, C) float32."""
    old_logprobs: Tensor | None = None
    """(B, C) log-probs under the policy that acted; None: the loss uses its own, detached."""
    ref_logprobs: Tensor | None = None
    """(B, C) log-probs under the frozen reference; None when beta is 0."""
    values: Tensor | None = None
    """(B, C) float32, the critic's value of the state before each token, when it was sampled."""
    final_values: Tensor | None = None
    """(B,) float32, the critic's value of the state after the last token."""
    returns: Tensor | None = None
    """(B, C) float32, what the critic learns to predict at each token."""

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    def replace(self, **changes: Any) -> Rollout:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device) -> Rollout:
        """Return the rollout with its tensors on `device`; Lightning asks it of predictions."""
        return to_device(self, device)


@dataclass(frozen=True)
class Minibatch:
    """Rows of a rollout that make one Lightning batch: whole groups, one loss, one backward."""

    rollout: Rollout
    """The rows, in the order in which they are forwarded."""
    microbatches: list[Tensor]
    """Row indices of each forward; as many on every rank, so that some may be empty."""
    denominator: float
    """What the summed loss is divided by: the count over the optimizer step and all ranks."""
    iteration: int
    """Which iteration the rows belong to, from 0."""
    index: int
    """Position among the minibatches of the iteration, from 0."""
    is_window_end: bool
    """True when the optimizer steps after this minibatch."""


@dataclass(frozen=True)
class LossOutput:
    """A loss before its reduction over tokens, and the sums that make its metrics."""

    per_token: Tensor
    """(B, C) loss of each token, unreduced, finite under the mask."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count) of this micro-batch; summed over all of them before dividing."""


@dataclass(frozen=True)
class MinibatchOutput:
    """What a minibatch turned out to be, the same on every rank."""

    metrics: dict[str, float]
    """Name -> mean over the rows or tokens of all ranks, as logged."""
    is_skipped: bool = False
    """True when the optimizer step after it was skipped because something was not finite."""


def select_rows(rollout: Rollout, rows: Tensor) -> Rollout:
    """Return the rows of a rollout in the given order.

    Args:
        rollout: B rows.
        rows: (b,) int64 row indices.

    Returns:
        A rollout of b rows; columns and texts follow.
    """
    picked = rows.tolist()
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(rollout):
        value = getattr(rollout, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value[rows.to(value.device)]
        elif isinstance(value, list) and value:
            changes[item.name] = [value[i] for i in picked]
        elif isinstance(value, dict):
            changes[item.name] = {
                name: column[rows.to(column.device)]
                if isinstance(column, Tensor)
                else [column[i] for i in picked]
                for name, column in value.items()
            }
    return rollout.replace(**changes)


def join_rollouts(rollouts: Sequence[Rollout], pad_token_id: int) -> Rollout:
    """Put the rows of some rollouts one below the other.

    Prompts are padded on the left and completions on the right, to the widest.

    Args:
        rollouts: one or more, some perhaps without rows; group ids are kept as they are.
        pad_token_id: fills prompt and completion ids; masks get False, and the rest 0.

    Returns:
        All rows in order. A column that a rollout lacks is None in its rows, and a reward function
        that it lacks NaN.

    Raises:
        ValueError: a tensor that some of the rollouts have and others lack.
    """
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(Rollout):
        values = [getattr(rollout, item.name) for rollout in rollouts]
        if all(value is None for value in values):
            continue
        if any(value is None for value in values):
            raise ValueError(f"some of the rollouts have {item.name} and others have not")
        if isinstance(values[0], Tensor):
            fill = pad_token_id if item.name in ("prompt_ids", "completion_ids") else 0
            on_left = item.name in ("prompt_ids", "prompt_mask")
            changes[item.name] = _stacked(values, fill, on_left=on_left)
        elif isinstance(values[0], list):
            changes[item.name] = [entry for value in values for entry in value]
        else:
            names = dict.fromkeys(name for value in values for name in value)
            changes[item.name] = {
                name: _joined_column(
                    [(value.get(name), len(r)) for value, r in zip(values, rollouts)]
                )
                for name in names
            }
    return rollouts[0].replace(**changes)


def _stacked(tensors: list[Tensor], fill: int, *, on_left: bool) -> Tensor:
    """Rows of (b,) or (b, width) tensors below each other, padded to the widest."""
    if tensors[0].ndim == 1:
        return torch.cat(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    padded = []
    for tensor in tensors:
        missing = width - tensor.shape[1]
        sides = (missing, 0) if on_left else (0, missing)
        padded.append(torch.nn.functional.pad(tensor, sides, value=fill))
    return torch.cat(padded)


def _joined_column(parts: list[tuple[Any, int]]) -> Any:
    """Join (column, number of rows) pairs, where None stands for a column that is not there."""
    tensors = [column for column, _ in parts if isinstance(column, Tensor)]
    if tensors:
        return torch.cat(
            [
                tensors[0].new_full((num_rows,), math.nan) if column is None else column
                for column, num_rows in parts
            ]
        )
    return [
        entry
        for column, num_rows in parts
        for entry in ([None] * num_rows if column is None else column)
    ]


def to_device(rollout: Rollout, device: torch.device) -> Rollout:
    """Return the rollout with its tensors on `device`."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(rollout):
        value = getattr(rollout, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value.to(device)
    return rollout.replace(**changes)
