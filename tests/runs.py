"""Building small runs in tests: a module, data, and a Trainer with the standard callbacks."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_grpo.callbacks import (
    AlgorithmSwitch,
    DynamicSampling,
    InnerEpochReplay,
    KLMonitor,
    RewardScoring,
    RolloutGeneration,
    standard,
)
from lightning_grpo.data import PromptDataModule
from lightning_grpo.module import GRPOModule

ROWS = [{"prompt": f"{i}{(7 * i) % 10}=", "answer": str(i)} for i in range(16)]


def spread_reward(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between siblings: depends on every character."""
    return [sum(ord(c) for c in text) % 17 / 17 for text in completions]


def make_trainer(
    *,
    reward: Any = spread_reward,
    group_size: int = 4,
    max_completion_tokens: int = 6,
    num_epochs: int = 1,
    num_minibatches: int = 1,
    rollout: dict[str, Any] | None = None,
    reward_options: dict[str, Any] | None = None,
    kl: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    switch: dict[str, Any] | None = None,
    callbacks: list[L.Callback] | None = None,
    **trainer_options: Any,
) -> L.Trainer:
    """A CPU Trainer with the standard callbacks and nothing written to disk."""
    functions = reward if isinstance(reward, list) else [reward]
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "max_epochs": 1,
    } | trainer_options
    return L.Trainer(
        callbacks=[
            *(callbacks or []),
            *standard(
                RewardScoring(functions, **(reward_options or {})),
                RolloutGeneration(
                    group_size=group_size,
                    max_completion_tokens=max_completion_tokens,
                    **(rollout or {}),
                ),
                InnerEpochReplay(num_epochs, num_minibatches),
                KLMonitor(**(kl or {})),
                sampling=DynamicSampling(**(sampling or {})),
                switch=AlgorithmSwitch(**(switch or {})),
            ),
        ],
        **options,
    )


def make_data(rows: Any = None, **options: Any) -> PromptDataModule:
    """Prompts in their order, 8 per iteration."""
    defaults: dict[str, Any] = {"prompts_per_iteration": 8, "shuffle": False}
    return PromptDataModule(ROWS if rows is None else rows, **(defaults | options))


def make_module(model: str, learning_rate: float = 1e-3, **options: Any) -> GRPOModule:
    """A module with AdamW at a rate that shows within a few steps."""
    import torch

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=learning_rate, weight_decay=0.0)

    return GRPOModule(model, optimizer=optimizer, **options)
