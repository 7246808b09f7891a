"""The replay queue: a rollout cut into minibatches, the same on every rank, the same again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_grpo.distributed import failing_together
from lightning_grpo.masking import reduction_count
from lightning_grpo.replay import split_microbatches, split_minibatches
from lightning_grpo.types import Minibatch, Rollout, select_rows

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule


class ReplayShape(NamedTuple):
    """How often a rollout is gone through, and in how many parts."""

    num_epochs: int
    """K, passes over the rollout."""
    num_minibatches: int
    """M, minibatches per pass."""


class Cut(NamedTuple):
    """The rows of each minibatch, and those of each of its forwards."""

    rows: list[Tensor]
    microbatches: list[list[Tensor]]
    """Numbers of rows within the minibatch."""


def cut_rollout(module: GRPOModule, rollout: Rollout, shape: ReplayShape) -> Cut:
    """Cut a rollout. Lengths, groups and the number of the iteration alone decide how. Collective.

    Args:
        module: with the counters, the budget of a forward, and the ranks.
        rollout: B rows.
        shape: into how many minibatches.

    Returns:
        K * M minibatches.
    """
    key = f"{module.settings.seed}/{module.counters.iterations}"
    with failing_together(module, "cutting the rollout into minibatches"):
        rows = [
            part
            for epoch in range(shape.num_epochs)
            for part in split_minibatches(
                rollout, shape.num_minibatches, shuffle_key=f"{key}/{epoch}"
            )
        ]
    microbatches = cut_over_ranks(module, [select_rows(rollout, part) for part in rows])
    return Cut(rows, microbatches)


def make_minibatches(
    module: GRPOModule, rollout: Rollout, cut: Cut, window: int, *, first: int = 0
) -> list[Minibatch]:
    """Make the minibatches of a rollout. Collective.

    Args:
        module: whose algorithm says what the loss is divided by.
        rollout: with all that the loss needs.
        cut: of this rollout.
        window: minibatches per optimizer step.
        first: how many to leave out, whole windows.

    Returns:
        The minibatches in order.
    """
    parts = [select_rows(rollout, rows) for rows in cut.rows[first:]]
    if not parts:
        return []
    denominators = window_denominators(module, parts, window)
    return [
        Minibatch(
            rollout=part,
            microbatches=cut.microbatches[first + number],
            denominator=denominators[number // window],
            iteration=module.counters.iterations,
            index=first + number,
            is_window_end=(number + 1) % window == 0,
        )
        for number, part in enumerate(parts)
    ]


def cut_over_ranks(module: GRPOModule, parts: list[Rollout]) -> list[list[Tensor]]:
    """Cut minibatches into micro-batches, of which every rank makes the same number. Collective.

    Args:
        module: with its token budget and its ranks.
        parts: the minibatches.

    Returns:
        Of each minibatch the rows of each forward; the last may be none, where a rank has fewer
        groups than another has forwards.
    """

    def cut(num_parts: list[int]) -> list[list[Tensor]]:
        return [
            split_microbatches(
                part,
                module.microbatch_tokens,
                is_packed=module.policy.is_packing,
                num_parts=number,
            )
            for part, number in zip(parts, num_parts, strict=True)
        ]

    microbatches = cut([1] * len(parts))
    counts = [len(rows) for rows in microbatches]
    found = module.max_over_ranks(torch.tensor(counts, dtype=torch.float64))
    most = [int(count) for count in found.tolist()]
    if most != counts:
        microbatches = cut(most)
    for rows, count in zip(microbatches, most, strict=True):
        rows += [torch.zeros(0, dtype=torch.int64)] * (count - len(rows))
    return microbatches


def window_denominators(module: GRPOModule, parts: list[Rollout], window: int) -> list[float]:
    """Counts that the loss of each optimizer step is divided by, over all ranks.

    Args:
        module: whose algorithm says what is counted.
        parts: the minibatches in order.
        window: minibatches per optimizer step.

    Returns:
        One count per step, at least 1.
    """
    num_max = module.settings.sampling.max_completion_tokens
    counts = torch.stack(
        [
            reduction_count(part.action_mask, module.acting_algorithm.reduction, num_max).double()
            for part in parts
        ]
    )
    totals = module.sum_over_ranks(counts).reshape(-1, window).sum(dim=1)
    return [max(total, 1.0) for total in totals.tolist()]
