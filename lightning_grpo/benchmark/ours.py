"""The contestant that is this package: the module, the standard callbacks, and Lightning's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_grpo.benchmark.clock import StepClock
from lightning_grpo.benchmark.regimes import Regime
from lightning_grpo.benchmark.workload import prompt_rows, varied_reward
from lightning_grpo.callbacks import RewardScoring, RolloutGeneration, standard
from lightning_grpo.data import PromptDataModule
from lightning_grpo.generation import NativeEngine
from lightning_grpo.module import GRPOModule
from lightning_grpo.run_files import run_loggers
from lightning_grpo.types import Rollout


class StepStart(L.Callback):
    """Stands before all other callbacks: a step begins."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        """Wait for the request."""
        self.clock.arrive()
        self.clock.enter("rollout")


class PhaseMarks(L.Callback):
    """Stands after all other callbacks: tells the clock which phase begins."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """Count what the model forwards."""
        embedding = module.policy.causal_lm.get_input_embeddings()
        embedding.register_forward_pre_hook(self.clock.count_tokens)

    def on_rollout_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Rewards come next."""
        self.clock.lengths = rollout.completion_mask.sum(1).tolist()
        if isinstance(module.engine, NativeEngine):
            # A decoder of its own goes around the embedding that counts.
            counts = module.engine.counts
            own = counts.num_prefill_tokens + counts.num_row_steps
            self.clock.tokens["rollout"] = max(self.clock.tokens["rollout"], own)
        self.clock.enter("reward")

    def on_rewards_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Old and reference log-probs and advantages come next."""
        self.clock.enter("scoring")

    def on_train_batch_start(self, *args: Any) -> None:
        """The minibatch is there."""
        self.clock.enter("forward")

    def on_before_backward(self, *args: Any) -> None:
        """A micro-batch has its loss."""
        self.clock.enter("backward")

    def on_after_backward(self, *args: Any) -> None:
        """Another micro-batch comes next, or the step."""
        self.clock.enter("forward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        """All gradients are there."""
        self.clock.enter("optimizer")

    def on_train_batch_end(self, *args: Any) -> None:
        """The step is made."""
        self.clock.enter("other")


def train_ours(
    clock: StepClock,
    regime: Regime,
    folder: Path,
    work: Path,
    *,
    num_steps: int,
    module: dict[str, Any],
    rollout: dict[str, Any],
) -> None:
    """Train until the clock stops.

    Args:
        clock: says when a step is made.
        regime: sizes.
        folder: of the model.
        work: for what the loggers write.
        num_steps: steps that there are prompts for.
        module: options of GRPOModule.
        rollout: options of RolloutGeneration.
    """
    is_cuda = clock.device.type == "cuda"
    trainer = L.Trainer(
        accelerator="gpu" if is_cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if is_cuda else "32-true",
        max_epochs=-1,
        max_steps=num_steps,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        inference_mode=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=run_loggers(work / "runs" / "version_0", None),
        callbacks=[
            StepStart(clock),
            *standard(
                RewardScoring([varied_reward]),
                RolloutGeneration(
                    group_size=regime.group_size,
                    max_completion_tokens=regime.completion_tokens,
                    **rollout,
                ),
            ),
            PhaseMarks(clock),
        ],
    )
    data = PromptDataModule(
        prompt_rows(regime, num_steps), prompts_per_iteration=regime.num_prompts, shuffle=False
    )
    trainer.fit(GRPOModule(str(folder), beta=0.0, **module), datamodule=data)
