"""Two processes with gloo, under DDP and FSDP2: counters, weights, resume, generation, failure."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from distributed_runs import (
    Record,
    on_two_ranks,
    same_bits,
    strategy_options,
    weights_of,
)
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import make_data, make_module, make_trainer

from lightning_grpo.module import GRPOModule

STOPS = {"stop_strings": list("012345"), "num_val_samples": 2}
VAL = [{"prompt": f"{i}=", "answer": str(i)} for i in range(5)]


def fit(
    model: str, strategy: str, *, save_to: str | None = None, resume_from: str | None = None
) -> tuple[L.Trainer, GRPOModule, Record]:
    """3 iterations of 2 epochs x 2 minibatches, in accumulation windows of 2."""
    record = Record()
    module = make_module(
        model, beta=0.1, lr_schedule="linear", old_policy="weights", learning_rate=1e-2
    )
    trainer = make_trainer(
        num_epochs=2,
        num_minibatches=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        rollout=STOPS,
        max_completion_tokens=24,
        kl={"target_nats_per_completion": 0.01, "horizon_completions": 320.0},
        max_epochs=-1,
        max_steps=6,
        callbacks=[record, *([SaveAfterFirst(save_to)] if save_to else [])],
        enable_checkpointing=bool(save_to),
        **strategy_options(strategy),
    )
    trainer.fit(module, datamodule=make_data(val_data=VAL, shuffle=True), ckpt_path=resume_from)
    return trainer, module, record


def summary(trainer: L.Trainer, module: GRPOModule, record: Record) -> dict[str, Any]:
    """What has to be the same however the run was spread over processes or sessions."""
    return {
        "counters": dataclasses.asdict(module.counters),
        "global_step": trainer.global_step,
        "beta": module.beta,
        "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        "indices": [(m.iteration, m.index) for m in record.minibatches],
        "prompts": [sorted(set(r.prompts)) for r in record.rollouts],
    }


class SaveAfterFirst(Checkpoint):
    """Saves after the first iteration, behind all other callbacks, as checkpoints do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: L.Trainer, module: GRPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.queue and module.counters.iterations == 1:
            trainer.save_checkpoint(self.path)


def run_all(model: str, strategy: str, folder: str) -> dict[str, Any]:
    """One whole run that saves on its way, a resumed one, and a validation."""
    path = f"{folder}/{strategy}"
    whole = fit(model, strategy, save_to=path)
    resumed = fit(model, strategy, resume_from=path)
    record = whole[2]
    metrics = whole[0].validate(whole[1], datamodule=make_data(val_data=VAL), verbose=False)
    return {
        "whole": summary(*whole),
        "whole_weights": weights_of(whole[1]),
        "resumed": summary(*resumed),
        "resumed_weights": weights_of(resumed[1]),
        "outputs": [output.metrics for output in record.outputs],
        "logged": record.logged[0],
        "validation": metrics[0],
        "lengths": [r.completion_mask.sum(1).tolist() for r in record.rollouts],
    }


@pytest.fixture(scope="module")
def alone(char_model, tmp_path_factory) -> dict[str, Any]:
    return run_all(char_model, "single", str(tmp_path_factory.mktemp("alone")))


def test_a_single_process_resumes_to_the_same_bits(alone):
    assert same_bits(alone["resumed_weights"], alone["whole_weights"])
    assert alone["resumed"]["counters"] == alone["whole"]["counters"]
    assert alone["resumed"]["learning_rate"] == alone["whole"]["learning_rate"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_count_train_and_resume_as_one_does(
    char_model, strategy, alone, tmp_path: Path
):
    on_both = on_two_ranks(run_all, tmp_path, char_model, strategy, str(tmp_path))
    for result in on_both:
        assert isinstance(result, dict), result
        whole, resumed = result["whole"], result["resumed"]
        assert whole["counters"]["iterations"] == 3
        assert whole["counters"]["optimizer_steps"] == whole["global_step"] == 6
        assert whole["counters"]["completions"] == 3 * 32
        assert whole["learning_rate"] == 0.0
        # 32 completions each time, KL far below or above the target: 0.1 * (1 +- 0.2 * 0.1)^3.
        assert whole["beta"] != 0.1
        lengths = [n for r in on_both for rollout in r["lengths"] for n in rollout]
        assert whole["counters"]["tokens"] == sum(lengths)
        assert whole["indices"] == alone["whole"]["indices"]
        assert {**resumed, "indices": 0, "prompts": 0} == {**whole, "indices": 0, "prompts": 0}
        # It was saved by a callback, so that the other callbacks have that step, and the end of its
        # iteration, once more.
        assert resumed["indices"] == whole["indices"][3:]
        assert resumed["prompts"] == whole["prompts"]
        assert same_bits(result["resumed_weights"], result["whole_weights"])
        assert result["validation"].keys() == alone["validation"].keys()
        assert 0 <= result["validation"]["val/reward"] <= 1
    first, second = on_both
    assert same_bits(first["whole_weights"], second["whole_weights"])
    assert first["outputs"] == second["outputs"]
    assert first["validation"] == second["validation"]
    # Rank 0 and rank 1 make the two halves of each batch, and may exchange groups then.
    both = first["lengths"][0] + second["lengths"][0]
    assert sorted(both) == sorted(alone["lengths"][0])
    for name in ("reward/mean", "reward/std", "completion/tokens_mean", "group/zero_std_frac"):
        assert first["logged"][name] == second["logged"][name]
        assert first["logged"][name] == pytest.approx(alone["logged"][name]), name
    for rank in (0, 1):
        halves = zip(on_both[rank]["whole"]["prompts"], alone["whole"]["prompts"])
        assert all(set(half) < set(all_of_them) for half, all_of_them in halves)


def fit_with_lightnings_own_strategy(model: str) -> str:
    strategy = ModelParallelStrategy()
    trainer = make_trainer(devices=2, strategy=strategy)
    try:
        trainer.fit(make_module(model), datamodule=make_data())
    except ValueError as error:
        return f"refused: {error}"
    return "trained"


def failing_on_rank_1(completions: list[str], **columns: Any) -> list[float]:
    if os.environ.get("LOCAL_RANK", "0") == "1":
        raise OSError("the judge is down on this rank")
    return [float(len(text)) for text in completions]


def fail_on_rank_1(model: str) -> dict[str, Any]:
    """A reward that raises on rank 1, in training and in validation, under both strategies."""
    found = {}
    for strategy in ("ddp", "fsdp2"):
        for stage in ("fit", "validate"):
            start = time.monotonic()
            module = make_module(model)
            options = strategy_options(strategy)
            trainer = make_trainer(reward=failing_on_rank_1, rollout=STOPS, **options)
            try:
                getattr(trainer, stage)(module, datamodule=make_data(val_data=VAL))
                found[strategy, stage] = "no error"
            except Exception as error:
                found[strategy, stage] = f"{type(error).__name__}: {error}"
            assert time.monotonic() - start < 30
    found["own"] = fit_with_lightnings_own_strategy(model)
    return found


def test_an_error_on_one_rank_stops_both(char_model, tmp_path: Path):
    first, second = on_two_ranks(fail_on_rank_1, tmp_path, char_model)
    assert isinstance(first, dict), first
    for strategy in ("ddp", "fsdp2"):
        for stage in ("fit", "validate"):
            key = (strategy, stage)
            assert "another rank failed while scoring completions" in first[key]
            assert "RewardError" in second[key] and "the judge is down" in second[key]
    for found in (first, second):
        assert found["own"].startswith("refused: trainer.strategy ModelParallelStrategy")


CONFIG = """
model: {{name_or_path: {model}, beta: 0}}
data: {{train_data: prompts.jsonl, prompts_per_iteration: 8}}
reward: {{functions: [test_distributed.failing_on_rank_1]}}
rollout: {{max_completion_tokens: 4}}
trainer: {{accelerator: cpu, devices: 2, strategy: ddp}}
"""


def test_the_command_exits_non_zero_when_a_reward_fails_on_one_rank(char_model, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=char_model))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1="}\n' * 8)
    command = [sys.executable, "-m", "lightning_grpo", "fit", "--config", "run.yaml"]
    here = Path(__file__).resolve().parent
    env = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            _, errors = run.communicate(timeout=100)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode != 0
    assert "the judge is down on this rank" in errors
    assert "another rank failed while scoring completions" in errors
