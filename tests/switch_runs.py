"""Runs that switch between GRPO and PPO, for tests on one process and on two."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning as L
from distributed_runs import Record, strategy_options, whole
from lightning.pytorch.callbacks import Checkpoint
from runs import make_data, make_module, make_trainer

from lightning_grpo.adapters import Lora
from lightning_grpo.critic import CriticSettings
from lightning_grpo.evidence import Evidence
from lightning_grpo.module import GRPOModule

# Completions end at a digit, so that their lengths differ.
STOPS = {"stop_strings": list("012345")}


class PPOBetween:
    """A rule: PPO from one iteration to another, GRPO before and after."""

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last

    def __call__(self, evidence: Evidence) -> str:
        return "ppo" if self.first <= evidence.iteration < self.last else "grpo"


class SaveEveryIteration(Checkpoint):
    """Saves at the end of every iteration, behind all other callbacks."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: L.Trainer, module: GRPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module.marks.after_batch(module)
        if not module.queue:
            trainer.save_checkpoint(f"{self.folder}/{module.counters.iterations}")


class RecordStages(L.Callback):
    """Keeps the stage of each iteration, and how many parameters and moments there were."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.num_optimizer_states: list[int] = []

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Any) -> None:
        self.stages.append(module.stage)
        self.num_optimizer_states.append(len(trainer.optimizers[0].state))


def switching_fit(
    model: str,
    strategy: str = "single",
    *,
    form: Any = "head",
    num_iterations: int = 7,
    save_to: str | None = None,
    resume_from: str | None = None,
    switch: dict[str, Any] | None = None,
    critic: dict[str, Any] | None = None,
    module_options: dict[str, Any] | None = None,
    callbacks: list[L.Callback] | None = None,
    **trainer_options: Any,
) -> tuple[L.Trainer, GRPOModule, Record, RecordStages]:
    """GRPO, handover, PPO, and GRPO again: 2 minibatches per iteration."""
    record, stages = Record(), RecordStages()
    options: dict[str, Any] = {"form": form, "learning_rate": 1e-2} | (critic or {})
    module = make_module(
        model,
        critic=CriticSettings(**options),
        learning_rate=1e-2,
        lr_schedule="linear",
        **({"lora": Lora(4)} if form == "lora" else {}),
        **({"beta": 0.1} | (module_options or {})),
    )
    rule = {
        "rule": PPOBetween(0, 4),
        "patience": 1,
        "min_stay_iterations": 0,
        "handover_ratio": None,
    }
    saver = [SaveEveryIteration(save_to)] if save_to else []
    trainer = make_trainer(
        num_minibatches=2,
        rollout=STOPS,
        max_completion_tokens=12,
        switch=rule if switch is None else switch,
        max_epochs=-1,
        max_steps=2 * num_iterations,
        gradient_clip_val=0.5,
        callbacks=[record, stages, *(callbacks or []), *saver],
        enable_checkpointing=bool(save_to),
        **strategy_options(strategy),
        **trainer_options,
    )
    trainer.fit(module, datamodule=make_data(shuffle=True), ckpt_path=resume_from)
    return trainer, module, record, stages


def end_of(trainer: L.Trainer, module: GRPOModule) -> dict[str, Any]:
    """What a run ends with, to compare."""
    return {
        "weights": {name: whole(p) for name, p in module.named_parameters()},
        "counters": dataclasses.asdict(module.counters),
        "stage": module.stage,
        "beta": module.beta,
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
    }


def switch_and_resume(model: str, strategy: str, form: str, folder: str, resumes: list[int]) -> Any:
    """A whole run that saves after every iteration, and runs that resume from some of them."""
    whole = switching_fit(model, strategy, form=form, save_to=folder)
    resumed = {}
    for iteration in resumes:
        again = switching_fit(model, strategy, form=form, resume_from=f"{folder}/{iteration}")
        resumed[iteration] = end_of(*again[:2]) | {"stages": again[3].stages}
    return end_of(*whole[:2]) | {"stages": whole[3].stages, "resumed": resumed}
