"""One forward over some rows of a rollout: log-probs of the policy and values of the critic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.critic import Critic
from lightning_grpo.logprobs import Entropy
from lightning_grpo.policy import Policy, PolicyOutput
from lightning_grpo.replay import trim_padding
from lightning_grpo.types import Rollout, select_rows


class Forward(NamedTuple):
    """What a forward gave."""

    output: PolicyOutput | None
    """Of the policy; None when its log-probs were not asked for."""
    values: Tensor | None
    """(B, C + 1) of the states before each token and after the last position; None without a
    critic."""


def forward_rows(
    policy: Policy,
    critic: Critic | None,
    rows: Rollout,
    *,
    temperature: float,
    entropy: Entropy = "none",
    with_logprobs: bool = True,
    detach_hidden: bool = False,
) -> Forward:
    """Forward policy and critic; a value head shares the policy's forward.

    Args:
        policy: whose log-probs are asked for.
        critic: whose values are asked for, if any.
        rows: of a micro-batch.
        temperature: the sampling temperature.
        entropy: see `Policy.forward`.
        with_logprobs: whether the policy's log-probs are needed; without them the output layer is
            not computed, and no gradient reaches the policy.
        detach_hidden: keep the gradients of a value head out of the policy.

    Returns:
        Log-probs and values.
    """
    needs_hidden = critic is not None and critic.needs_policy_hidden
    ids = (rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask)
    output, hidden = None, None
    if with_logprobs:
        output = policy(
            *ids,
            temperature=temperature,
            entropy=entropy,
            with_hidden=needs_hidden,
            group_ids=rows.group_ids,
        )
        hidden = output.hidden
    elif needs_hidden:
        with torch.no_grad():
            hidden = policy.hidden_states(*ids, group_ids=rows.group_ids)
    if hidden is not None and detach_hidden:
        hidden = hidden.detach()
    values = None if critic is None else critic(policy, rows, hidden)
    return Forward(output, values)


def microbatch(rollout: Rollout, rows: Tensor) -> Rollout:
    """The rows of one forward, without common padding; the first row stands in for none."""
    return trim_padding(select_rows(rollout, rows if len(rows) else torch.tensor([0])))
