"""The trainer learns what the reward says, and nothing where the reward says nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from runs import make_data, make_trainer

from lightning_grpo.callbacks import ColdStart, ValidateAtEnds
from lightning_grpo.critic import CriticSettings
from lightning_grpo.module import GRPOModule
from lightning_grpo.tasks import SortDigits, sorted_exactly
from lightning_grpo.tools.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def sorter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a policy of 84,000 parameters."""
    folder = str(tmp_path_factory.mktemp("sorter"))
    write_tiny_model(
        folder,
        characters="0123456789=",
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        max_positions=32,
        weights=False,
    )
    return folder


def shuffled(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The right rewards, given to the wrong completions."""
    rewards = sorted_exactly(completions, answer)
    random.Random(str(completions)).shuffle(rewards)
    return rewards


def learn(
    folder: str, reward: Any, num_steps: int = 120, algorithm: str = "grpo"
) -> tuple[float, float]:
    """Sampled pass@1 on 256 prompts before and after reinforcement learning."""
    digits: dict[str, Any] = {"min_digits": 4, "max_digits": 4, "distinct": True}
    rows = SortDigits(2048, **digits)
    ends = ValidateAtEnds()

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)

    trainer = make_trainer(
        reward=[sorted_exactly, reward],
        reward_options={"weights": [0.0, 1.0], "success_function": "sorted_exactly"},
        group_size=8,
        max_completion_tokens=5,
        num_minibatches=2,
        rollout={"num_val_samples": 2, "seed": 0},
        switch={"algorithm": algorithm},
        callbacks=[ColdStart(rows, num_steps=90, learning_rate=2e-3), ends],
        max_epochs=-1,
        max_steps=num_steps,
        gradient_clip_val=1.0,
    )
    module = GRPOModule(
        folder,
        init="random",
        beta=0.01,
        optimizer=optimizer,
        lr_schedule="linear",
        num_warmup_steps=10,
        critic=CriticSettings(learning_rate=2e-3) if algorithm == "ppo" else None,
    )
    data = make_data(
        rows,
        val_data=SortDigits(256, split="val", **digits),
        prompts_per_iteration=32,
        val_prompts_per_batch=256,
        shuffle=True,
    )
    trainer.fit(module, datamodule=data)
    before, after = ends.results[0][1], ends.results[-1][1]
    return before["val/pass_at_1"], after["val/pass_at_1"]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_right_or_wrong_rewards_teach_the_policy_to_sort(sorter: str, algorithm: str):
    before, after = learn(sorter, sorted_exactly, algorithm=algorithm)
    assert 0.15 < before < 0.75
    assert after > max(before + 0.2, 0.85)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_rewards_of_other_completions_teach_nothing(sorter: str, algorithm: str):
    before, after = learn(sorter, shuffled, num_steps=40, algorithm=algorithm)
    assert after < before + 0.05
