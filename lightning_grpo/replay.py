"""Cutting a rollout into minibatches and micro-batches: whole groups, balanced by tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.packing import num_packed_tokens
from lightning_grpo.types import Rollout


def split_minibatches(rollout: Rollout, num_minibatches: int, *, shuffle_key: str) -> list[Tensor]:
    """Cut a rollout into minibatches of whole groups with about the same number of tokens.

    Groups are dealt, the longest first and equal ones in random order, to the minibatch that has
    the fewest tokens among those that still need a group.

    Args:
        rollout: B rows.
        num_minibatches: M, at most the number of groups.
        shuffle_key: decides the random order; the same key gives the same minibatches.

    Returns:
        M tensors of row indices; every row is in exactly one.

    Raises:
        ValueError: there are fewer groups than minibatches.
    """
    groups = rows_by_group(rollout)
    if len(groups) < num_minibatches:
        raise ValueError(
            f"replay.num_minibatches is {num_minibatches} but this rank holds only {len(groups)} "
            "prompts per iteration: lower it, or raise data.prompts_per_iteration"
        )
    lengths = (rollout.prompt_mask.sum(1) + rollout.completion_mask.sum(1)).tolist()
    tokens = [sum(lengths[row] for row in group) for group in groups]
    order = list(range(len(groups)))
    random.Random(shuffle_key).shuffle(order)
    order.sort(key=lambda i: -tokens[i])
    most_groups = -(-len(groups) // num_minibatches)
    dealt: list[list[int]] = [[] for _ in range(num_minibatches)]
    loads = [0] * num_minibatches
    for group in order:
        open_ones = [m for m in range(num_minibatches) if len(dealt[m]) < most_groups]
        m = min(open_ones, key=lambda m: (loads[m], len(dealt[m])))
        dealt[m].append(group)
        loads[m] += tokens[group]
    rows = [[row for i in sorted(part) for row in groups[i]] for part in dealt]
    return [torch.tensor(part, dtype=torch.int64) for part in rows]


def split_microbatches(
    rollout: Rollout, max_tokens: int, *, is_packed: bool = False, num_parts: int = 1
) -> list[Tensor]:
    """Cut a minibatch into as few forwards of at most `max_tokens` tokens as it takes, all alike.

    A group that is larger than the budget is split, and its prompt is then forwarded with each
    part. Groups fill parts up to the budget, and then up to the lowest limit that makes no more
    parts.

    Source: Coffman, Garey, Johnson, "An application of bin-packing to multiprocessor scheduling"
    (MULTIFIT, SIAM J. Comput. 1978); departs where rows are padded, which keeps groups of similar
    length together.

    Args:
        rollout: the rows of one minibatch.
        max_tokens: budget of one forward; a single row may exceed it.
        is_packed: whether a forward takes the prompt of a group once and no padding; otherwise
            every row counts as the longest prompt and the longest completion.
        num_parts: fewest forwards, as far as there are groups for them.

    Returns:
        Tensors of row indices; every row is in exactly one.
    """
    group_ids: list[int] = rollout.group_ids.tolist()
    prompt_lengths: list[int] = rollout.prompt_mask.sum(1).tolist()
    completion_lengths: list[int] = rollout.completion_mask.sum(1).tolist()

    def size(rows: list[int]) -> _Size:
        columns = (group_ids, prompt_lengths, completion_lengths)
        packed = num_packed_tokens(*([column[r] for r in rows] for column in columns))
        prompt, completion = (max(column[r] for r in rows) for column in columns[1:])
        return _Size(len(rows), prompt, completion, packed if is_packed else None)

    pieces = [
        part
        for group in rows_by_group(rollout)
        for part in _cut(group, lambda rows: size(rows).cost, max_tokens)
    ]
    pieces.sort(key=lambda rows: -size(rows).width)
    sizes = [size(rows) for rows in pieces]
    parts = _filled(sizes, max_tokens)
    num_parts = max(num_parts, len(parts))
    low, high = max((s.cost for s in sizes), default=0), max_tokens
    while num_parts > 1 and low < high:
        middle = (low + high) // 2
        filled = _filled(sizes, middle)
        if len(filled) > num_parts:
            low = middle + 1
        else:
            parts, high = filled, middle
    rows = [[row for piece in sorted(part) for row in pieces[piece]] for part in parts]
    return [torch.tensor(part, dtype=torch.int64) for part in rows]


class _Size(NamedTuple):
    """What decides the tokens of a forward."""

    num_rows: int
    prompt: int
    completion: int
    packed: int | None

    @property
    def width(self) -> int:
        """Tokens of a row with the longest prompt and the longest completion."""
        return self.prompt + self.completion

    @property
    def cost(self) -> int:
        """Tokens that are forwarded."""
        return self.width * self.num_rows if self.packed is None else self.packed

    def join(self, other: _Size) -> _Size:
        """The size of both in one forward."""
        packed = None
        if self.packed is not None and other.packed is not None:
            packed = self.packed + other.packed
        return _Size(
            self.num_rows + other.num_rows,
            max(self.prompt, other.prompt),
            max(self.completion, other.completion),
            packed,
        )


def _filled(sizes: list[_Size], limit: int) -> list[list[int]]:
    """Put pieces, the widest first, into parts of at most `limit` tokens, if a piece alone is not.

    Packed ones go, the largest first, to the first part with room; padded ones to the last part or
    a new one, as narrow rows among wide ones would be padded most.
    """
    order = list(range(len(sizes)))
    is_packed = bool(sizes) and sizes[0].packed is not None
    if is_packed:
        order.sort(key=lambda i: -sizes[i].cost)
    parts: list[list[int]] = []
    totals: list[_Size] = []
    for piece in order:
        for part in range(0 if is_packed else max(len(parts) - 1, 0), len(parts)):
            joined = totals[part].join(sizes[piece])
            if joined.cost <= limit:
                parts[part].append(piece)
                totals[part] = joined
                break
        else:
            parts.append([piece])
            totals.append(sizes[piece])
    return parts


def _cut(group: list[int], cost: Callable[[list[int]], int], max_tokens: int) -> list[list[int]]:
    """The fewest parts of equal size, but for the last, that stay within the budget."""
    for size in range(len(group), 1, -1):
        parts = [group[i : i + size] for i in range(0, len(group), size)]
        if all(cost(part) <= max_tokens for part in parts):
            return parts
    return [[row] for row in group]


def trim_padding(rollout: Rollout) -> Rollout:
    """Cut off the columns that are padding in every row.

    Args:
        rollout: B rows, prompts padded on the left and completions on the right.

    Returns:
        The same rows with P and C as small as they can be; C is at least 1.
    """
    width = rollout.prompt_mask.shape[1]
    num_prompt = int(rollout.prompt_mask.sum(1).max()) if len(rollout) else 0
    num_completion = int(rollout.completion_mask.sum(1).max()) if len(rollout) else 0
    num_completion = max(num_completion, 1)
    changes: dict[str, Tensor] = {
        "prompt_ids": rollout.prompt_ids[:, width - num_prompt :],
        "prompt_mask": rollout.prompt_mask[:, width - num_prompt :],
    }
    for name in (
        "completion_ids",
        "completion_mask",
        "action_mask",
        "sampler_logprobs",
        "advantages",
        "old_logprobs",
        "ref_logprobs",
        "values",
        "returns",
    ):
        value = getattr(rollout, name)
        if value is not None:
            changes[name] = value[:, :num_completion]
    return rollout.replace(**changes)


def rows_by_group(rollout: Rollout) -> list[list[int]]:
    """The rows of each group, in the order of their first rows."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(rollout.group_ids.tolist()):
        rows.setdefault(group, []).append(row)
    return list(rows.values())
