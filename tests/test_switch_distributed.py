"""GRPO, handover, PPO and GRPO again on two processes with gloo, under DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import on_two_ranks, same_bits, strategy_options, weights_of, whole
from runs import make_data, make_module, make_trainer
from switch_runs import STOPS, PPOBetween, switch_and_resume
from torch import Tensor

from lightning_grpo.critic import CriticSettings, critic_parameters
from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Rollout

STAGES = ["grpo", "handover", "handover", "ppo", "ppo", "grpo", "grpo"]
# Resumed in the handover, in PPO, and after it.
CASES: dict[tuple[str, str], list[int]] = {
    ("ddp", "head"): [2, 4],
    ("fsdp2", "head"): [2, 4, 6],
    ("fsdp2", "lora"): [4],
    ("ddp", "separate"): [4],
}
VAL = [{"prompt": f"{i}=", "answer": str(i)} for i in range(5)]


class Positions(L.Callback):
    """Where policy and critic are, as one vector each, at the end of each iteration."""

    def __init__(self) -> None:
        self.policy: list[Tensor] = []
        self.critic: list[Tensor] = []
        self.stages: list[str] = []

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        self.note(module)

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        self.stages.append(module.stage)
        self.note(module)

    def note(self, module: GRPOModule) -> None:
        policy = [whole(p).flatten() for p in module.policy.trainable().values()]
        critic = critic_parameters(module.critic, module.policy) if module.critic else []
        self.policy.append(torch.cat(policy))
        self.critic.append(torch.cat([torch.zeros(0), *(whole(p).flatten() for p in critic)]))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.2)


def positions_of(model: str, strategy: str, form: Any) -> dict[str, Any]:
    """A run of one step per iteration, which are the same rows however the ranks share them."""
    positions = Positions()
    module = GRPOModule(
        model,
        optimizer=sgd,
        critic=CriticSettings(form, learning_rate=0.2),
        beta=0.1,
        kl_in="reward",
        old_logprobs="recompute",
    )
    trainer = make_trainer(
        rollout=STOPS,
        max_completion_tokens=12,
        switch={
            "rule": PPOBetween(0, 4),
            "patience": 1,
            "min_stay_iterations": 0,
            "handover_ratio": None,
        },
        callbacks=[positions],
        gradient_clip_val=0.5,
        max_epochs=-1,
        max_steps=6,
        **strategy_options(strategy),
    )
    trainer.fit(module, datamodule=make_data())
    return {
        "policy": positions.policy,
        "critic": positions.critic,
        "stages": positions.stages,
    }


def still_after_warmup(model: str, strategy: str, form: Any, precision: Any) -> list[str]:
    """Parameters of the policy that PPO does not move after a critic's warm-up."""
    positions = KeepPolicy()
    module = make_module(
        model, critic=CriticSettings(form, learning_rate=1e-2, num_warmup_iterations=1), beta=0.1
    )
    trainer = make_trainer(
        rollout=STOPS,
        switch={"algorithm": "ppo"},
        callbacks=[positions],
        precision=precision,
        max_epochs=-1,
        max_steps=3,
        **strategy_options(strategy),
    )
    trainer.fit(module, datamodule=make_data())
    start, warmed, after = positions.policy[0], positions.policy[1], positions.policy[-1]
    assert same_bits(start, warmed)
    return [name for name in start if torch.equal(start[name], after[name])]


class KeepPolicy(L.Callback):
    """The policy's weights at the start and at the end of each iteration."""

    def __init__(self) -> None:
        self.policy: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        self.policy.append(weights_of(module))

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        self.policy.append(weights_of(module))


def run_all(model: str, folder: str) -> dict[Any, Any]:
    """All runs of one process, and a validation from a checkpoint that holds a critic."""
    found: dict[Any, Any] = {}
    for (strategy, form), resumes in CASES.items():
        path = f"{folder}/{strategy}-{form}"
        found[strategy, form] = switch_and_resume(model, strategy, form, path, resumes)
    found["warmup"] = {
        "ddp": still_after_warmup(model, "ddp", "head", "32-true"),
        "fsdp2": still_after_warmup(model, "fsdp2", "head", "32-true"),
        "fsdp2, half": still_after_warmup(model, "fsdp2", "separate", "bf16-true"),
    }
    for strategy in ("ddp", "fsdp2"):
        found[strategy, "positions"] = positions_of(model, strategy, "head")
        options = strategy_options(strategy)
        trainer = make_trainer(rollout=STOPS | {"num_val_samples": 2}, **options)
        found[strategy, "validation"] = trainer.validate(
            make_module(model, critic=CriticSettings("head")),
            datamodule=make_data(val_data=VAL),
            ckpt_path=f"{folder}/{strategy}-head/4",
            verbose=False,
        )[0]
    return found


@pytest.fixture(scope="module")
def on_both(char_model, tmp_path_factory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("on_both")
    results = on_two_ranks(run_all, folder, char_model, str(folder), timeout=300)
    for result in results:
        assert isinstance(result, dict), result
    return results


@pytest.mark.parametrize(("strategy", "form"), CASES)
def test_two_processes_stay_together_through_every_switch(on_both, strategy, form):
    first, second = (result[strategy, form] for result in on_both)
    assert same_bits(first["weights"], second["weights"])
    assert all(bool(torch.isfinite(weight).all()) for weight in first["weights"].values())
    for result in (first, second):
        assert result["stages"] == STAGES  # those of a single process
        assert result["counters"]["iterations"] == 7
        assert result["counters"]["optimizer_steps"] == 14
        assert result["counters"]["completions"] == 7 * 32
        assert result["rates"] == [0.0, 1e-2]
    assert first["beta"] == second["beta"]


@pytest.mark.parametrize(("strategy", "form"), CASES)
def test_two_processes_resume_to_the_same_bits(on_both, strategy, form):
    for result in on_both:
        uninterrupted = result[strategy, form]
        assert list(uninterrupted["resumed"]) == CASES[strategy, form]
        for iteration, resumed in uninterrupted["resumed"].items():
            assert same_bits(resumed["weights"], uninterrupted["weights"]), iteration
            assert resumed["stages"] == STAGES[iteration:]
            for name in ("counters", "stage", "beta", "rates"):
                assert resumed[name] == uninterrupted[name], (iteration, name)


def distance(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """How far two runs are apart, as a part of how far they came."""
    return float((found - expected).norm() / (expected - start).norm())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_go_where_one_goes(char_model, on_both, strategy):
    alone = positions_of(char_model, "single", "head")
    assert alone["stages"] == ["grpo", "handover", "handover", "ppo", "ppo", "grpo"]
    for result in on_both:
        found = result[strategy, "positions"]
        assert found["stages"] == alone["stages"]
        for number in range(1, 7):
            mine, expected = found["policy"][number], alone["policy"][number]
            assert distance(mine, expected, alone["policy"][0]) < 1e-4, number
            # And every step by itself was a step.
            before = alone["policy"][number - 1]
            assert float((expected - before).norm() / before.norm()) > 1e-3
        for number in range(2, 6):
            mine, expected = found["critic"][number], alone["critic"][number]
            assert mine.shape == expected.shape == (33,)
            assert distance(mine, expected, torch.zeros(33)) < 1e-4, number
            assert float(expected.norm()) > 1e-2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_with_a_critic_can_be_validated(on_both, strategy):
    first, second = (result[strategy, "validation"] for result in on_both)
    assert first == second
    assert 0 <= first["val/reward"] <= 1


def test_the_whole_policy_moves_after_a_critics_warmup(on_both):
    for result in on_both:
        assert result["warmup"]["ddp"] == []
        assert result["warmup"]["fsdp2"] == []
        # In half precision a step of 1e-3 may round away, but not in every embedding.
        assert "model.model.embed_tokens.weight" not in result["warmup"]["fsdp2, half"]
