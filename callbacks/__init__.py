"""Callbacks: one phase of the iteration each. Import them from `lightning_grpo.callbacks`."""

from __future__ import annotations

import lightning as L

from lightning_grpo.callbacks.checkpoint import IterationCheckpoint
from lightning_grpo.callbacks.cold_start import ColdStart
from lightning_grpo.callbacks.dynamic_sampling import DynamicSampling
from lightning_grpo.callbacks.health import HealthWarnings
from lightning_grpo.callbacks.kl import KLMonitor
from lightning_grpo.callbacks.predictions import PredictionWriter
from lightning_grpo.callbacks.progress import IterationProgress
from lightning_grpo.callbacks.push_to_hub import PushToHub
from lightning_grpo.callbacks.replay import InnerEpochReplay
from lightning_grpo.callbacks.reward import RewardScoring
from lightning_grpo.callbacks.rollout import RolloutGeneration
from lightning_grpo.callbacks.sample_table import SampleTable
from lightning_grpo.callbacks.summary import RunSummary
from lightning_grpo.callbacks.switch import AlgorithmSwitch
from lightning_grpo.callbacks.validation import ValidateAtEnds

__all__ = [
    "AlgorithmSwitch",
    "ColdStart",
    "DynamicSampling",
    "HealthWarnings",
    "InnerEpochReplay",
    "IterationCheckpoint",
    "IterationProgress",
    "KLMonitor",
    "PredictionWriter",
    "PushToHub",
    "RewardScoring",
    "RolloutGeneration",
    "RunSummary",
    "SampleTable",
    "ValidateAtEnds",
    "standard",
]


def standard(
    reward: RewardScoring,
    rollout: RolloutGeneration | None = None,
    replay: InnerEpochReplay | None = None,
    kl: KLMonitor | None = None,
    sampling: DynamicSampling | None = None,
    switch: AlgorithmSwitch | None = None,
) -> list[L.Callback]:
    """The callbacks that make an iteration, in the order in which they have to run.

    Args:
        reward: the reward functions.
        rollout: how completions are made; 8 per prompt by default.
        replay: inner epochs and minibatches; one of each by default.
        kl: adaptive beta, early stop, rollback; none of them by default.
        sampling: refills in place of groups that teach nothing; none by default.
        switch: GRPO or PPO; GRPO by default.

    Returns:
        Callbacks for `Trainer(callbacks=[*yours, *standard(...)])`.
    """
    return [
        rollout or RolloutGeneration(),
        reward,
        switch or AlgorithmSwitch(),
        sampling or DynamicSampling(),
        replay or InnerEpochReplay(),
        kl or KLMonitor(),
    ]
