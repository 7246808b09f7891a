"""Algorithms: small objects that compose the pure functions into advantages and a loss."""

from __future__ import annotations

from lightning_grpo.algorithms.cispo import CISPO
from lightning_grpo.algorithms.grpo import GRPO
from lightning_grpo.algorithms.gspo import GSPO
from lightning_grpo.algorithms.ppo import PPO
from lightning_grpo.algorithms.protocol import Algorithm
from lightning_grpo.algorithms.reinforce import ReinforcePlusPlus

__all__ = ["CISPO", "GRPO", "GSPO", "PPO", "Algorithm", "ReinforcePlusPlus"]
