"""Which algorithm moves the policy, and what becomes of the critic meanwhile.

grpo       the group is the baseline; there is no critic
handover   GRPO goes on while a new critic learns beside it
warmup     the critic learns and the policy rests, at the start of a PPO run
ppo        the critic is the baseline, and learns along

grpo -> handover -> ppo -> grpo,    warmup -> ppo,    and back to grpo from each
"""

from __future__ import annotations

from typing import Literal

AlgorithmName = Literal["grpo", "ppo"]
Stage = Literal["grpo", "handover", "warmup", "ppo"]


def has_critic(stage: Stage) -> bool:
    """Whether a critic exists."""
    return stage != "grpo"


def is_ppo(stage: Stage) -> bool:
    """Whether the advantages are those of PPO."""
    return stage in ("warmup", "ppo")


def moves_policy(stage: Stage) -> bool:
    """Whether the policy learns."""
    return stage != "warmup"


def value_gradient_reaches_policy(stage: Stage) -> bool:
    """Whether the gradients of a value head flow into the trunk it shares with the policy."""
    return stage == "ppo"
