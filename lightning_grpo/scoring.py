"""Scoring a rollout: rewards, and log-probs under the policy that acted and the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import TrainerState

from lightning_grpo.policy import Policy
from lightning_grpo.replay import trim_padding
from lightning_grpo.rewards import Scorer, Scores
from lightning_grpo.types import Rollout, select_rows


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval() and back, whatever happens in between."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def score_completions(scorer: Scorer, rollout: Rollout, state: TrainerState) -> Scores:
    """Give a rollout's completions to the reward functions.

    Args:
        scorer: the reward functions.
        rollout: B rows.
        state: where the run stands, for functions that ask.

    Returns:
        Rewards of B rows and what the functions logged.
    """
    lengths = rollout.completion_mask.sum(1).tolist()
    completion_ids = [
        row[:length] for row, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)
    ]
    with plain_precision(rollout.completion_ids.device):
        return scorer(
            rollout.prompts,
            rollout.completions,
            completion_ids,
            rollout.columns,
            trainer_state=state,
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


@torch.no_grad()
def rollout_logprobs(
    policy: Policy, rollout: Rollout, microbatches: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """Log-probs of a rollout's completions, one forward per micro-batch.

    With the micro-batches of the first epoch the result is what the first forward of the update
    will give, to the bit.

    Args:
        policy: whose log-probs; its training mode is left to the caller.
        rollout: B rows.
        microbatches: row indices of each forward; an empty one still makes its forward, as
            other ranks may wait in it.
        temperature: the sampling temperature.

    Returns:
        (B, C) detached, 0 off the completion mask.
    """
    logprobs: Tensor | None = None
    for rows in microbatches:
        part = microbatch(rollout, rows)
        output = policy(
            part.prompt_ids,
            part.prompt_mask,
            part.completion_ids,
            part.completion_mask,
            temperature=temperature,
        ).logprobs
        if logprobs is None:
            logprobs = output.new_zeros(rollout.completion_ids.shape)
        if len(rows):
            output = torch.where(part.completion_mask, output, 0.0)
            logprobs[rows.to(output.device), : output.shape[1]] = output
    if logprobs is None:
        raise ValueError("there is no micro-batch to score")
    return logprobs


def microbatch(rollout: Rollout, rows: Tensor) -> Rollout:
    """The rows of one forward, without common padding; the first row stands in for none."""
    return trim_padding(select_rows(rollout, rows if len(rows) else torch.tensor([0])))
