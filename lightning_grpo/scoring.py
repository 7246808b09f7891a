"""Scoring a rollout: rewards, log-probs of the policy that acted and of the reference, values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerState

from lightning_grpo.critic import Critic
from lightning_grpo.forward import forward_rows, microbatch
from lightning_grpo.policy import Policy
from lightning_grpo.rewards import EarlyScores, Scorer, Scores
from lightning_grpo.rollout import completion_lists, repeated_columns
from lightning_grpo.types import PromptBatch, Rollout


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval() and back, whatever happens in between."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def start_scoring(
    scorer: Scorer, prompts: PromptBatch, group_size: int, state: TrainerState
) -> EarlyScores:
    """Get ready to score the rows of a rollout as they end.

    Args:
        scorer: the reward functions.
        prompts: N prompts, about to be completed.
        group_size: G, completions per prompt.
        state: where the run stands, for functions that ask.

    Returns:
        What takes the rows.
    """
    if torch.get_default_dtype() != torch.float32:
        # The trainer's, which all threads share: functions would compute with it.
        return EarlyScores({})
    repeated = [prompt for prompt in prompts.prompts for _ in range(group_size)]
    return scorer.start_early(repeated, repeated_columns(prompts, group_size), state)


def score_completions(
    scorer: Scorer, rollout: Rollout, state: TrainerState, early: EarlyScores | None = None
) -> Scores:
    """Give a rollout's completions to the reward functions.

    Args:
        scorer: the reward functions.
        rollout: B rows.
        state: where the run stands, for functions that ask.
        early: rows that have been scored; any of them that the rollout has otherwise is scored
            again.

    Returns:
        Rewards of B rows and what the functions logged.
    """
    with plain_precision(rollout.completion_ids.device):
        return scorer(
            rollout.prompts,
            rollout.completions,
            completion_lists(rollout.completion_ids, rollout.completion_mask),
            rollout.columns,
            trainer_state=state,
            early=early,
        )


@contextlib.contextmanager
def plain_precision(device: torch.device) -> Iterator[None]:
    """Out of the trainer's autocast and default dtype, which are the policy's, not the rewards'."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def with_scores(rollout: Rollout, scores: Scores) -> Rollout:
    """The rollout with its rewards, on its own device."""
    device = rollout.group_ids.device
    return rollout.replace(
        rewards=scores.rewards.to(device),
        function_rewards={k: v.to(device) for k, v in scores.function_rewards.items()},
        extra_columns=scores.extra_columns,
    )


class Scored(NamedTuple):
    """What a pass over a rollout gave, without gradients."""

    logprobs: Tensor | None
    """(B, C), 0 off the completion mask; None when they were not asked for."""
    values: Tensor | None
    """(B, C) of the state before each token, 0 off the completion mask; None without a critic."""
    final_values: Tensor | None
    """(B,) of the state after each completion; None without a critic."""


@torch.no_grad()
def score_rollout(
    policy: Policy,
    rollout: Rollout,
    microbatches: Sequence[Tensor],
    *,
    temperature: float,
    critic: Critic | None = None,
    with_logprobs: bool = True,
) -> Scored:
    """Log-probs and values of a rollout's completions, one forward per micro-batch.

    With the micro-batches of the first epoch the log-probs are what the first forward of the update
    will give, to the bit.

    Args:
        policy: whose log-probs; its training mode is left to the caller.
        rollout: B rows.
        microbatches: row indices of each forward; an empty one still makes its forward, as
            other ranks may wait in it.
        temperature: the sampling temperature.
        critic: whose values, if any.
        with_logprobs: whether the log-probs are needed.

    Returns:
        Log-probs and values.
    """
    if not microbatches:
        raise ValueError("there is no micro-batch to score")
    lengths = rollout.completion_mask.sum(1)
    found: dict[str, Tensor] = {}
    for rows in microbatches:
        part = microbatch(rollout, rows)
        forward = forward_rows(
            policy, critic, part, temperature=temperature, with_logprobs=with_logprobs
        )
        if not len(rows):
            continue
        rows = rows.to(part.completion_ids.device)
        if forward.output is not None:
            _place(found, "logprobs", rollout, part, rows, forward.output.logprobs)
        if forward.values is not None:
            _place(found, "values", rollout, part, rows, forward.values[:, :-1])
            last = forward.values.gather(1, lengths[rows].unsqueeze(1)).squeeze(1)
            finals = found.setdefault("final_values", last.new_zeros(len(rollout)))
            finals[rows] = last
    return Scored(found.get("logprobs"), found.get("values"), found.get("final_values"))


def _place(
    found: dict[str, Tensor], name: str, rollout: Rollout, part: Rollout, rows: Tensor, x: Tensor
) -> None:
    whole = found.setdefault(name, x.new_zeros(rollout.completion_ids.shape))
    whole[rows, : x.shape[1]] = torch.where(part.completion_mask, x, 0.0)
