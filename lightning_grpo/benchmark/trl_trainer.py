"""The contestant that is TRL's GRPOTrainer, without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from lightning_grpo.benchmark.clock import StepClock
from lightning_grpo.benchmark.regimes import Regime
from lightning_grpo.benchmark.workload import prompt_rows, varied_reward


class StepStart(TrainerCallback):
    """A step begins where TRL says so: before it generates."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the request."""
        self.clock.arrive()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """All gradients are there and clipped."""
        self.clock.enter("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step is made."""
        self.clock.enter("other")


def make_trainer(
    folder: Path,
    work: Path,
    regime: Regime,
    rows: list[dict[str, str]],
    *,
    rollout_func: Any = None,
    **options: Any,
) -> Any:
    """A GRPOTrainer on a model folder.

    Args:
        folder: of the model.
        work: where TRL may write.
        regime: sizes.
        rows: with a column `prompt`.
        rollout_func: makes the completions in TRL's place.
        **options: of GRPOConfig; the others are those of the benchmark.

    Returns:
        The trainer.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    make: Any = GRPOTrainer
    is_cuda = torch.cuda.is_available()
    rows_per_forward = regime.rows_per_forward or regime.num_completions
    settings: dict[str, Any] = {
        "per_device_train_batch_size": rows_per_forward,
        "gradient_accumulation_steps": regime.num_completions // rows_per_forward,
        "num_generations": regime.group_size,
        "max_completion_length": regime.completion_tokens,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "loss_type": "grpo",
        "max_steps": len(rows) // regime.num_prompts,
        "shuffle_dataset": False,
        "bf16": is_cuda,
        "use_cpu": not is_cuda,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return make(
        model=model,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        reward_funcs=varied_reward,
        rollout_func=rollout_func,
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(output_dir=str(work), **(settings | options)),
    )


def train_trl(
    clock: StepClock, regime: Regime, folder: Path, work: Path, *, num_steps: int, **options: Any
) -> None:
    """Train until the clock stops.

    Args:
        clock: says when a step is made.
        regime: sizes.
        folder: of the model.
        work: where TRL may write.
        num_steps: steps that there are prompts for.
        **options: of GRPOConfig.
    """
    trainer = make_trainer(folder, work, regime, prompt_rows(regime, num_steps), **options)
    trainer.add_callback(StepStart(clock))
    mark_phases(trainer, clock)
    trainer.train()


def mark_phases(trainer: Any, clock: StepClock) -> None:
    """Tell the clock of the phases, by wrapping the methods that make them.

    Args:
        trainer: a GRPOTrainer.
        clock: is told.
    """
    make = clock.timed("rollout", trainer._generate)

    def generate(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        clock.lengths = [len(ids) for ids in made[1]]
        return made

    trainer._generate = generate
    trainer._calculate_rewards = clock.timed("reward", trainer._calculate_rewards)
    trainer._generate_and_score_completions = clock.timed(
        "scoring", trainer._generate_and_score_completions
    )
    trainer._compute_loss = clock.timed("forward", trainer._compute_loss)
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_pre_hook(clock.count_tokens)
