"""Reinforcement learning of causal language models on PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_grpo.algorithms import GRPO, PPO
    from lightning_grpo.critic import CriticSettings
    from lightning_grpo.data import PromptDataModule
    from lightning_grpo.module import GRPOModule

__version__ = "0.1.0"
__all__ = ["GRPO", "PPO", "CriticSettings", "GRPOModule", "PromptDataModule"]

_HOMES = {
    "GRPO": "lightning_grpo.algorithms",
    "PPO": "lightning_grpo.algorithms",
    "CriticSettings": "lightning_grpo.critic",
    "GRPOModule": "lightning_grpo.module",
    "PromptDataModule": "lightning_grpo.data",
}


def __getattr__(name: str) -> Any:
    # The pure functions import without Lightning and transformers, which take seconds.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
