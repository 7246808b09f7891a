"""GRPO, handover, PPO and GRPO again in one run, on one process, through Trainer.fit."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Record, same_bits
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from runs import make_data, make_module, make_trainer, spread_reward
from switch_runs import PPOBetween, RecordStages, end_of, switching_fit
from torch import Tensor, nn

from lightning_grpo.adapters import Lora
from lightning_grpo.callbacks import AlgorithmSwitch
from lightning_grpo.critic import CriticSettings, critic_parameters
from lightning_grpo.distributed import TrainingStopped
from lightning_grpo.evidence import Evidence
from lightning_grpo.loaders import Slot
from lightning_grpo.module import GRPOModule
from lightning_grpo.optimization import clip_gradients
from lightning_grpo.types import Minibatch, MinibatchOutput

FORMS = ["head", "lora", "separate"]
STAGES = ["grpo", "handover", "handover", "ppo", "ppo", "grpo", "grpo"]
ALWAYS_PPO = {"algorithm": "ppo"}
# Parameters that take gradients in the tiny model, and those of its critics: two for the head, and
# A and B of 7 linear layers in each of 2 layers, or all of a trunk.
NUM_POLICY = {"head": 26, "lora": 28, "separate": 26}
NUM_CRITIC = {"head": 2, "lora": 30, "separate": 28}


def ppo_from(first: int) -> dict[str, Any]:
    """Options of a switch whose rule asks for PPO from one iteration on."""
    return {
        "rule": PPOBetween(first, 10**6),
        "patience": 1,
        "min_stay_iterations": 0,
        "handover_ratio": None,
    }


class Logged(Checkpoint):
    """Keeps what is logged when an iteration has ended; behind all others, as checkpoints are."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: GRPOModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.queue:
            metrics = trainer.callback_metrics
            self.iterations.append({name: float(value) for name, value in metrics.items()})


class Watch(L.Callback):
    """Keeps policy, critic, moments and rates after each minibatch."""

    def __init__(self) -> None:
        self.iterations: list[int] = []
        self.stages: list[str] = []
        self.policy: list[dict[str, Tensor]] = []
        self.critic: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.rates: list[tuple[float, float]] = []
        self.num_taking_gradients: list[int] = []

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        optimizer = trainer.optimizers[0]
        policy = module.policy.trainable()
        self.iterations.append(minibatch.iteration)
        self.stages.append(module.stage)
        self.policy.append({name: p.detach().clone() for name, p in policy.items()})
        critic = critic_parameters(module.critic, module.policy) if module.critic else []
        self.critic.append({str(i): p.detach().clone() for i, p in enumerate(critic)})
        self.moments.append(
            {
                f"{name}/{key}": value.clone()
                for name, p in policy.items()
                for key, value in optimizer.state.get(p, {}).items()
            }
        )
        self.num_taking_gradients.append(sum(p.requires_grad for p in policy.values()))
        first, second = optimizer.param_groups
        self.rates.append((first["lr"], second["lr"]))


@pytest.fixture(scope="module")
def whole_runs(char_model, tmp_path_factory) -> dict[str, Any]:
    """A whole run of each form, with a checkpoint of every iteration."""
    found = {}
    for form in FORMS:
        folder = str(tmp_path_factory.mktemp(form))
        logged = Logged()
        trainer, module, record, stages = switching_fit(
            char_model, form=form, save_to=folder, callbacks=[logged]
        )
        record.logged = logged.iterations
        found[form] = (folder, end_of(trainer, module), record, stages, trainer, module)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_critic_comes_with_the_handover_and_goes_with_ppo(whole_runs, form):
    _, end, record, stages, trainer, module = whole_runs[form]
    assert stages.stages == STAGES
    with_critic = NUM_POLICY[form] + NUM_CRITIC[form]
    without = NUM_POLICY[form]
    assert stages.num_optimizer_states == [without, *[with_critic] * 4, without, without]
    assert end["stage"] == "grpo"
    assert module.critic is None
    assert not any("critic" in name for name in end["weights"])
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [without, 0]
    assert [r.values is not None for r in record.rollouts] == [stage != "grpo" for stage in STAGES]
    is_ppo = [logged["algorithm/is_ppo"] for logged in record.logged]
    assert is_ppo == [float(stage == "ppo") for stage in STAGES]
    has_critic = [logged["algorithm/has_critic"] for logged in record.logged]
    assert has_critic == [float(stage != "grpo") for stage in STAGES]
    # Every step of the policy was taken, and its rate has fallen to 0 as it should.
    steps = {float(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {14.0}
    assert end["rates"] == [0.0, 1e-2]


@pytest.mark.parametrize(
    ("form", "iteration"),
    [("head", i) for i in range(1, 7)]
    + [(form, i) for form in ("lora", "separate") for i in (1, 3, 4, 5)],
)
def test_a_run_resumes_to_the_same_bits_before_in_and_after_each_switch(
    char_model, whole_runs, form, iteration
):
    folder, end, *_ = whole_runs[form]
    path = f"{folder}/{iteration}"
    trainer, module, _, stages = switching_fit(char_model, form=form, resume_from=path)
    assert stages.stages == STAGES[iteration:]
    again = end_of(trainer, module)
    assert same_bits(again.pop("weights"), end["weights"])
    assert again == {name: value for name, value in end.items() if name != "weights"}


@pytest.mark.parametrize("form", FORMS)
def test_metrics_of_a_critic_go_with_it(whole_runs, form):
    record = whole_runs[form][2]
    for logged, stage in zip(record.logged, STAGES, strict=True):
        mine = {n for n in logged if n.startswith(("value/", "evidence/critic", "evidence/mse"))}
        assert mine == (
            set()
            if stage == "grpo"
            else {
                "value/loss",
                "value/clip_frac",
                "value/explained_var",
                "value/grad_norm",
                "value/lr",
                "evidence/critic_mse",
                "evidence/critic_explained_var",
                "evidence/mse_ratio",
            }
        )


def test_the_evidence_is_of_values_that_have_not_seen_the_rewards(whole_runs):
    record = whole_runs["head"][2]
    for number, (rollout, logged) in enumerate(zip(record.rollouts, record.logged, strict=True)):
        rewards = rollout.rewards
        groups = [rewards[rollout.group_ids == group] for group in rollout.group_ids.unique()]
        siblings = [(4 / 3 * (group - group.mean())) ** 2 for group in groups]
        expected = float(torch.cat(siblings).mean())
        assert logged["evidence/siblings_mse"] == pytest.approx(expected)
        if rollout.values is not None:
            error = float((rewards - rollout.values[:, 0].double()).square().mean())
            assert logged["evidence/critic_mse"] == pytest.approx(error)
            assert logged["evidence/mse_ratio"] == pytest.approx(error / expected)
        if number == 1:  # a critic that knows nothing says 0
            assert logged["evidence/critic_mse"] == pytest.approx(float(rewards.square().mean()))
            assert logged["value/explained_var"] == pytest.approx(0.0, abs=1e-9)


# The policy, beside a critic


@pytest.mark.parametrize("form", FORMS)
def test_a_handover_does_not_touch_the_policy(char_model, form):
    """With and without a critic that learns beside it, GRPO ends in the same bits."""
    ends = []
    for switch in ({"algorithm": "grpo"}, ppo_from(0)):
        watch = Watch()
        trainer, module, record, stages = switching_fit(
            char_model,
            form=form,
            num_iterations=3,
            switch=switch,
            callbacks=[watch],
            kl={"target_nats_per_completion": 0.01, "horizon_completions": 320.0},
        )
        ends.append((stages.stages, watch, record.betas, trainer.global_step))
    (alone, plain, *numbers), (together, beside, *same_numbers) = ends
    assert alone == ["grpo"] * 3
    assert together == ["grpo", "handover", "handover"]
    assert numbers == same_numbers
    for mine, theirs in zip(plain.policy, beside.policy, strict=True):
        assert same_bits(mine, theirs)
    for mine, theirs in zip(plain.moments, beside.moments, strict=True):
        assert same_bits(mine, theirs)
    assert [rate for rate, _ in plain.rates] == [rate for rate, _ in beside.rates]
    assert not same_bits(beside.critic[3], beside.critic[2])


@pytest.mark.parametrize("form", FORMS)
def test_while_the_critic_warms_up_the_policy_rests(char_model, form, tmp_path: Path):
    watch = Watch()
    options: dict[str, Any] = {
        "form": form,
        "num_iterations": 5,
        "switch": ALWAYS_PPO,
        "critic": {"num_warmup_iterations": 2},
    }
    save_to = str(tmp_path)
    trainer, module, record, stages = switching_fit(
        char_model, callbacks=[watch], save_to=save_to, **options
    )
    assert stages.stages == ["warmup", "warmup", "ppo", "ppo", "ppo"]
    for number in range(4):
        assert same_bits(watch.policy[number], watch.policy[0])
        assert watch.moments[number] == {}
        assert watch.rates[number] == (1e-2, 1e-2)
    assert watch.num_taking_gradients == [0] * 4 + [NUM_POLICY[form]] * 6
    moves = [not same_bits(watch.critic[i], watch.critic[i - 1]) for i in range(1, 10)]
    assert moves == [True] * 9
    # The policy's first step is the first of its schedule: from 1e-2 to 0 in 6 steps.
    rates = [1e-2 * (5 - i) / 6 for i in range(6)]
    assert [rate for rate, _ in watch.rates[4:]] == pytest.approx(rates, abs=1e-12)
    assert {rate for _, rate in watch.rates} == {1e-2}
    assert not same_bits(watch.policy[4], watch.policy[3])
    assert {float(v) for n, v in watch.moments[-1].items() if n.endswith("/step")} == {6.0}
    assert "policy/loss" not in record.outputs[0].metrics
    assert "value/loss" in record.outputs[0].metrics

    for iteration in (1, 2) if form == "head" else (1,):
        again = switching_fit(char_model, resume_from=f"{save_to}/{iteration}", **options)
        assert again[3].stages == stages.stages[iteration:]
        assert same_bits(end_of(*again[:2])["weights"], end_of(trainer, module)["weights"])


def test_beta_adapts_in_every_stage_and_goes_on_from_where_it_was(char_model):
    kl = {"target_nats_per_completion": 0.01, "horizon_completions": 320.0}
    _, module, record, stages = switching_fit(char_model, kl=kl)
    assert stages.stages == STAGES
    expected = 0.1
    for number, beta in enumerate([*record.betas[1:], module.beta]):
        outputs = record.outputs[2 * number : 2 * number + 2]
        seen = sum(o.metrics["ref/kl_per_completion"] for o in outputs) / 2
        # 32 completions an iteration; Ziegler et al. (arXiv:1909.08593), eq. 3.
        expected *= 1 + min(max(seen / 0.01 - 1, -0.2), 0.2) * 32 / 320
        assert beta == pytest.approx(expected)
    assert len(set(record.betas)) == 7


# Memory


class LiveBytes(L.Callback):
    """Counts the bytes of the tensors that are alive at the start of each iteration."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        if module.queue:
            return
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
        # Weights, gradients and moments have two dimensions, or the width of the model; what else
        # the loop holds on to (the last minibatch) has rows of 16.
        sizes = {
            x.data_ptr(): x.numel() * 4
            for x in tensors
            if x.dtype == torch.float32 and x.ndim and x.shape[0] not in (1, 16) and x.numel() > 1
        }
        self.found.append(sum(sizes.values()))


@pytest.mark.parametrize("form", FORMS)
def test_the_memory_of_a_critic_is_given_back(char_model, form):
    # Without the callbacks that keep tensors.
    live = LiveBytes()
    module = make_module(
        char_model,
        critic=CriticSettings(form, lora=Lora(5), learning_rate=1e-2),
        beta=0.1,
        lora=Lora(4) if form == "lora" else None,
    )
    trainer = make_trainer(
        num_minibatches=2,
        switch=ppo_from(0) | {"rule": PPOBetween(0, 4)},
        callbacks=[live],
        max_epochs=-1,
        max_steps=16,
    )
    gc.collect()
    gc.freeze()  # what other tests have left is not looked through
    try:
        trainer.fit(module, datamodule=make_data())
    finally:
        gc.unfreeze()
    assert module.stage == "grpo"
    before, *during, after, last = live.found[1:]
    # q, k, v, o and gate, up, down; width 32, rank 5: rank * (inputs + outputs).
    rows = 5 * (32 + 32) * 4 + 5 * (32 + 64) * 3
    num_parameters = {
        "head": 32,
        "lora": 2 * rows + 32,
        "separate": sum(p.numel() for p in module.policy.trunk.parameters()) + 32,
    }[form]
    if form == "lora":  # of which the policy's own adapters are no part of a critic
        base = [p for name, p in module.policy.named_parameters() if ".lora_" not in name]
        assert not any(p.requires_grad for p in base)
    # Weights and two moments; the bias has one element and is not counted.
    num_bytes = 3 * 4 * num_parameters
    if form == "separate":
        num_bytes += sum(b.numel() * 4 for b in module.policy.trunk.buffers())
    assert [size - before for size in during] == [num_bytes] * 4
    assert (after, last) == (before, before)


# Learning rates and clipping


def with_gradients(*gradients: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = torch.tensor(gradient)
    return parameters


@pytest.mark.parametrize(
    ("options", "policy", "critic"),
    [
        ((None, False, None), [3.0, 4.0], [30.0, 40.0]),
        ((0.5, False, None), [0.3, 0.4], [30.0, 40.0]),
        ((None, False, 1.0), [3.0, 4.0], [0.6, 0.8]),
        ((0.5, False, 1.0), [0.3, 0.4], [0.6, 0.8]),
        ((10.0, False, 100.0), [3.0, 4.0], [30.0, 40.0]),
        ((3.5, True, None), [3.0, 3.5], [30.0, 40.0]),
        ((3.5, True, 5.0), [3.0, 3.5], [3.0, 4.0]),
    ],
)
def test_policy_and_critic_are_clipped_each_by_itself(options, policy, critic):
    (mine,), (theirs,) = with_gradients([3.0, 4.0]), with_gradients([30.0, 40.0])
    optimizer = torch.optim.SGD([{"params": [mine]}, {"params": [theirs]}], lr=0.1)
    policy_clip, is_clipped_by_value, critic_max_norm = options
    clip_gradients(
        optimizer,
        policy_clip=policy_clip,
        is_clipped_by_value=is_clipped_by_value,
        critic_max_norm=critic_max_norm,
    )
    assert mine.grad is not None and theirs.grad is not None
    assert mine.grad.tolist() == pytest.approx(policy, rel=1e-5)
    assert theirs.grad.tolist() == pytest.approx(critic, rel=1e-5)


class ClippedNorms(L.Callback):
    """Norms of the gradients that the optimizer steps with."""

    def __init__(self) -> None:
        self.norms: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self.note)

    def note(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        self.norms.append(
            [
                math.sqrt(sum(float(p.grad.square().sum()) for p in group["params"]))
                for group in optimizer.param_groups
            ]
        )


def test_a_run_clips_and_steps_policy_and_critic_at_their_own_rates(char_model, tmp_path):
    norms, watch, logged = ClippedNorms(), Watch(), Logged()
    switching_fit(
        char_model,
        num_iterations=3,
        switch=ALWAYS_PPO,
        critic={"learning_rate": 3e-3, "max_grad_norm": 0.01},
        callbacks=[norms, watch, logged],
        save_to=str(tmp_path),
    )
    assert [found[0] for found in norms.norms] == pytest.approx([0.5] * 6, rel=1e-3)
    assert [found[1] for found in norms.norms] == pytest.approx([0.01] * 6, rel=1e-3)
    # What is logged is the norm before clipping.
    assert all(numbers["policy/grad_norm"] > 0.51 for numbers in logged.iterations)
    assert all(numbers["value/grad_norm"] > 0.02 for numbers in logged.iterations)
    falling = [1e-2 * (5 - i) / 6 for i in range(6)]
    assert [rate for rate, _ in watch.rates] == pytest.approx(falling, abs=1e-12)
    assert [rate for _, rate in watch.rates] == [3e-3] * 6
    # Adam's first step is the rate, whatever the size of the gradient.
    assert float(watch.critic[0]["0"].abs().max()) == pytest.approx(3e-3, rel=1e-3)


# The KL in the reward


def test_a_kl_in_the_reward_counts_under_both_algorithms(char_model):
    _, _, record, stages = switching_fit(
        char_model, module_options={"kl_in": "reward", "beta": 0.5}
    )
    assert stages.stages == STAGES
    for number, (rollout, stage) in enumerate(zip(record.rollouts, STAGES, strict=True)):
        mask = rollout.action_mask
        kl = torch.where(mask, rollout.old_logprobs - rollout.ref_logprobs, 0.0).double()
        if number:
            assert float(kl.abs().max()) > 1e-3
        total = rollout.rewards - 0.5 * kl.sum(1)
        if stage != "ppo":
            for group in rollout.group_ids.unique():
                mine = total[rollout.group_ids == group]
                expected = (mine - mine.mean()) / mine.std()
                found = rollout.advantages[rollout.group_ids == group, 0].double()
                assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        if stage != "grpo":
            # What is still to come at each token: critic_lambda 1, gamma 1.
            so_far = kl.cumsum(1) - kl
            expected = torch.where(mask, total.unsqueeze(1) + 0.5 * so_far, 0.0)
            assert torch.allclose(rollout.returns.double(), expected, atol=1e-5)


# A critic that is broken


class BreakCritic(L.Callback):
    """Makes the weights of the critic's head NaN, or its targets infinite, in one iteration."""

    def __init__(self, iteration: int, how: str) -> None:
        self.iteration = iteration
        self.how = how
        self.is_done = False

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        if module.counters.iterations != self.iteration or self.is_done:
            return
        if self.how == "weights":
            with torch.no_grad():
                module.critic.head.weight[3] = math.nan
        else:
            minibatch = batch.minibatch
            returns = minibatch.rollout.returns.clone()
            returns[1, 0] = math.inf
            rollout = minibatch.rollout.replace(returns=returns)
            batch.minibatch = dataclasses.replace(minibatch, rollout=rollout)
        self.is_done = True


def broken_fit(model: str, how: str, iteration: int, **options: Any) -> Any:
    """A run whose critic breaks before or after the callback that fills the queue."""
    breaker, watch, record, stages = BreakCritic(iteration, how), Watch(), Record(), RecordStages()
    form = options.pop("form", "head")
    module = make_module(
        model,
        critic=CriticSettings(form, learning_rate=1e-2, **options.pop("critic", {})),
        learning_rate=1e-2,
        beta=0.1,
        lora=Lora(4) if form == "lora" else None,
    )
    trainer = make_trainer(
        num_minibatches=2,
        max_epochs=-1,
        max_steps=14,
        callbacks=[record, stages],
        **options,
    )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    place = len(callbacks)
    if how == "weights":  # once the switch has made the critic, before it is asked
        place = 1 + next(i for i, c in enumerate(callbacks) if isinstance(c, AlgorithmSwitch))
    callbacks.insert(place, breaker)
    callbacks.append(watch)
    trainer.fit(module, datamodule=make_data())
    assert breaker.is_done
    return trainer, module, watch, stages


@pytest.mark.parametrize(
    ("form", "iteration", "how"),
    [("head", i, how) for i in (1, 2, 3, 4) for how in ("weights", "targets")]
    + [("lora", 2, "weights"), ("lora", 3, "targets")]
    + [("separate", 2, "targets"), ("separate", 3, "weights")],
)
def test_a_broken_critic_is_freed_and_grpo_goes_on(char_model, form, iteration, how):
    with pytest.warns(UserWarning, match="the critic is of no use: .*the run goes on under GRPO"):
        trainer, module, watch, stages = broken_fit(
            char_model, how, iteration, form=form, switch=ppo_from(0)
        )
    num_good = iteration if how == "weights" else iteration + 1
    expected = ["grpo", "handover", "handover", "ppo", "ppo"][:num_good]
    assert stages.stages[:num_good] == expected
    assert set(stages.stages[num_good:]) == {"grpo"}  # though the rule asks for PPO to the end
    assert module.critic is None
    assert module.num_critic_failures == 1
    # Only through a head in PPO does what is wrong with the critic cost the policy a step.
    is_skipped = how == "targets" and form == "head" and iteration >= 3
    assert module.counters.skipped_steps == int(is_skipped)
    # GRPO goes on with a rollout whose values are no good. One that the critic broke in the middle
    # of is left, as its advantages may be the critic's.
    num_minibatches = [2] * 7 if how == "weights" else [2] * iteration + [1] + [2] * 10
    for number in range(max(watch.iterations)):
        assert watch.iterations.count(number) == num_minibatches[number], number
    assert len(trainer.optimizers[0].state) == NUM_POLICY[form]
    for weights in watch.policy:
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    for moments in watch.moments:
        assert all(bool(torch.isfinite(m).all()) for m in moments.values())
    assert not same_bits(watch.policy[-1], watch.policy[-3])
    assert all(p.requires_grad for p in module.policy.trainable().values())


@pytest.mark.parametrize("how", ["weights", "targets"])
def test_a_critic_that_breaks_in_its_warmup_sets_the_policy_free(char_model, how):
    with pytest.warns(UserWarning, match="the run goes on under GRPO"):
        _, module, watch, stages = broken_fit(
            char_model, how, 1, switch=ALWAYS_PPO, critic={"num_warmup_iterations": 3}
        )
    num_good = 1 if how == "weights" else 2
    assert stages.stages[:num_good] == ["warmup"] * num_good
    assert set(stages.stages[num_good:]) == {"grpo"}
    assert module.critic is None
    assert not same_bits(watch.policy[-1], watch.policy[0])
    assert all(bool(torch.isfinite(w).all()) for w in watch.policy[-1].values())


def test_what_a_broken_critic_left_in_the_metrics_goes_too(char_model):
    with pytest.warns(UserWarning, match="the run goes on under GRPO"):
        trainer, *_ = broken_fit(char_model, "weights", 3, switch=ppo_from(0))
    assert not [name for name in trainer.callback_metrics if name.startswith("value/")]


@pytest.mark.parametrize("how", ["weights", "targets"])
def test_without_siblings_a_broken_critic_stops_the_run(char_model, how):
    with pytest.raises(TrainingStopped, match=r"no use: .* GRPO cannot take over: .*group_size"):
        broken_fit(char_model, how, 1, switch=ALWAYS_PPO, group_size=1)


def test_ppo_needs_no_siblings(char_model):
    _, _, record, stages = switching_fit(
        char_model, num_iterations=2, switch=ALWAYS_PPO, group_size=1
    )
    assert stages.stages == ["ppo", "ppo"]
    assert "evidence/siblings_mse" not in record.logged[-1]


class BreakLast(L.Callback):
    """Makes the critic's gradient infinite in the last step of one iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: GRPOModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if module.counters.iterations == self.iteration and not module.queue:
            module.critic.head.bias.grad.fill_(math.inf)


def test_a_failure_that_is_in_a_checkpoint_is_known_to_the_resumed_run(char_model, tmp_path):
    """It is saved at the end of the iteration, before the critic is freed for it."""
    with pytest.warns(UserWarning, match="the run goes on under GRPO"):
        *whole, _, stages = switching_fit(
            char_model, switch=ppo_from(0), callbacks=[BreakLast(3)], save_to=str(tmp_path)
        )
    assert stages.stages == ["grpo", "handover", "handover", "ppo", "grpo", "grpo", "grpo"]
    for iteration in (4, 5):
        path = f"{tmp_path}/{iteration}"
        *again, _, stages = switching_fit(char_model, switch=ppo_from(0), resume_from=path)
        assert stages.stages == ["grpo"] * (7 - iteration)
        assert same_bits(end_of(*again)["weights"], end_of(*whole)["weights"])


class RollBack(L.Callback):
    """Asks for a rollback in the first step of one iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        self.moments: list[tuple[int, int]] = []

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        if minibatch.iteration == self.iteration and minibatch.index == 0:
            output.metrics["policy/approx_kl"] = 1.0

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Any) -> None:
        optimizer = trainer.optimizers[0]
        policy, critic = (
            sum(p in optimizer.state for p in group["params"]) for group in optimizer.param_groups
        )
        self.moments.append((policy, critic))


def test_a_rollback_of_the_policy_leaves_the_critic_what_it_knows(char_model):
    back = RollBack(3)
    with pytest.warns(UserWarning, match="the policy went too far"):
        _, module, _, stages = switching_fit(
            char_model,
            module_options={"old_policy": "weights"},
            callbacks=[back],
            kl={"rollback_above_nats_per_token": 0.9},
        )
    assert stages.stages == STAGES
    assert module.counters.rollbacks == 1
    assert back.moments == [(26, 0), (26, 2), (26, 2), (0, 2), (26, 2), (26, 0), (26, 0)]


# Precision


def dtypes_of(module: GRPOModule) -> set[tuple[bool, torch.dtype]]:
    """Whether it is the head's, and the type, of each parameter of the critic."""
    assert module.critic is not None
    head = {id(p) for p in module.critic.head.parameters()}
    mine = critic_parameters(module.critic, module.policy)
    return {(id(p) in head, p.dtype) for p in mine}


@pytest.mark.parametrize("form", FORMS)
def test_in_half_precision_a_critic_is_the_same_whenever_it_is_made(char_model, form, tmp_path):
    options: dict[str, Any] = {"form": form, "precision": "bf16-true", "num_iterations": 4}
    early = switching_fit(char_model, **options | {"num_iterations": 1}, switch=ALWAYS_PPO)[1]
    *late, _, stages = switching_fit(char_model, save_to=str(tmp_path), **options)
    assert stages.stages[-1] == "ppo"
    expected = {(True, torch.float32), (False, torch.bfloat16)}
    if form == "head":
        expected.discard((False, torch.bfloat16))
    assert dtypes_of(early) == dtypes_of(late[1]) == expected
    again = switching_fit(char_model, resume_from=f"{tmp_path}/2", **options)
    assert same_bits(end_of(*again[:2])["weights"], end_of(*late)["weights"])


# Rules and schedules


def test_a_schedule_switches_in_either_direction(char_model):
    *_, stages = switching_fit(char_model, num_iterations=4, switch={"num_iterations": 1})
    assert stages.stages[:2] == ["grpo", "handover"]
    *_, stages = switching_fit(
        char_model, num_iterations=4, switch={"algorithm": "ppo", "num_iterations": 2}
    )
    assert stages.stages == ["ppo", "ppo", "grpo", "grpo"]


def test_a_critic_that_does_not_get_good_is_given_up(char_model, caplog):
    caplog.set_level("INFO")
    switch = {"num_iterations": 1, "handover_ratio": 1e-6, "max_handover_iterations": 3}
    trainer, module, _, stages = switching_fit(char_model, switch=switch)
    assert stages.stages == ["grpo", "handover", "handover", "handover", "grpo", "grpo", "grpo"]
    assert module.critic is None and len(trainer.optimizers[0].state) == 26
    assert "the critic did not get good enough in 3 iterations" in caplog.text


class Answers:
    """A rule that gives what it was made with, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, evidence: Evidence) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (KeyError("no such thing"), KeyError, "no such thing"),
        ("reinforce", ValueError, "switch.rule returned 'reinforce'; it has to return grpo or ppo"),
        (None, ValueError, "switch.rule returned None; it has to return grpo or ppo"),
    ],
)
def test_an_error_of_a_rule_stops_the_run(char_model, answer, error, message):
    with pytest.raises(error, match=message):
        switching_fit(char_model, switch={"rule": Answers(answer)})


def test_a_rule_gets_what_is_logged(char_model, tmp_path):
    seen: list[Evidence] = []

    def rule(evidence: Evidence) -> str:
        seen.append(evidence)
        return PPOBetween(0, 4)(evidence)

    logged = Logged()
    switching_fit(
        char_model,
        switch=ppo_from(0) | {"rule": rule},
        callbacks=[logged],
        save_to=str(tmp_path),
    )
    assert [evidence.iteration for evidence in seen] == list(range(7))
    assert [evidence.stage for evidence in seen] == STAGES
    for evidence, everything in zip(seen, logged.iterations, strict=True):
        numbers = {n: v for n, v in everything.items() if n.startswith("evidence/")}
        assert evidence.numbers() == pytest.approx(numbers)
        assert evidence.variance.num_groups == 8


def written(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in folder.rglob("switches.jsonl")
        for line in path.read_text().splitlines()
    ]


def test_every_switch_is_printed_and_written_with_its_evidence(char_model, tmp_path, caplog):
    caplog.set_level("INFO")
    switching_fit(char_model, logger=CSVLogger(tmp_path))
    entries = written(tmp_path)
    assert [(entry["iteration"], entry["from"], entry["to"]) for entry in entries] == [
        (1, "grpo", "handover"),
        (3, "handover", "ppo"),
        (5, "ppo", "grpo"),
    ]
    assert entries[0]["reason"] == "switch.rule has asked for it 1 times in a row"
    assert entries[1]["reason"] == "the critic is good enough"
    assert "evidence/mse_ratio" not in entries[0]["evidence"]
    assert 0 < entries[1]["evidence"]["evidence/mse_ratio"] < 100
    for line in (
        "iteration 1: GRPO without a critic -> GRPO, while a critic learns beside it: switch.rule",
        "iteration 3: GRPO, while a critic learns beside it -> PPO: the critic is good enough. ",
        "iteration 5: PPO -> GRPO without a critic: switch.rule has asked for it 1 times in a row",
        "times that of the siblings' mean (",
    ):
        assert line in caplog.text


@pytest.mark.parametrize("how", ["weights", "targets"])
@pytest.mark.parametrize("iteration", [2, 3])
def test_a_failure_of_the_critic_is_written_as_a_switch(char_model, tmp_path, iteration, how):
    with pytest.warns(UserWarning, match="the run goes on under GRPO"):
        trainer, module, *_ = broken_fit(
            char_model, how, iteration, switch=ppo_from(0), logger=CSVLogger(tmp_path)
        )
    entry = written(tmp_path)[-1]
    assert (entry["from"], entry["to"]) == ("handover" if iteration == 2 else "ppo", "grpo")
    assert entry["iteration"] == iteration + (how == "targets")
    assert entry["reason"].startswith("the critic is of no use: ")
    (switch,) = [c for c in trainer.callbacks if isinstance(c, AlgorithmSwitch)]
    # A handover that ends is no change of the algorithm that moves the policy.
    assert switch.state.num_switches == (0 if iteration == 2 else 2)


def test_a_run_without_a_switch_writes_no_file(char_model, tmp_path):
    switching_fit(
        char_model,
        num_iterations=2,
        switch={"algorithm": "grpo"},
        logger=CSVLogger(tmp_path),
    )
    assert not written(tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": Answers("ppo"), "num_iterations": 3},
            "switch.rule and switch.num_iterations do not go together",
        ),
        ({"num_iterations": 0}, "switch.num_iterations must be at least 1, got 0"),
        ({"patience": 0}, "switch.patience must be at least 1, got 0"),
        ({"min_stay_iterations": -1}, "switch.min_stay_iterations must be at least 0, got -1"),
        ({"max_handover_iterations": 0}, "switch.max_handover_iterations must be at least 1"),
        ({"handover_ratio": 0.0}, "switch.handover_ratio must be positive, got 0.0"),
        ({"handover_ratio": math.nan}, "switch.handover_ratio must be positive, got nan"),
        ({"algorithm": "reinforce"}, "switch.algorithm must be grpo or ppo, got 'reinforce'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmSwitch(**options)


@pytest.mark.parametrize(
    ("switch", "module_options", "trainer_options", "message"),
    [
        (ALWAYS_PPO, {}, {}, "there is no critic: set model.critic.form to head, lora or separate"),
        ({"num_iterations": 2}, {}, {}, "there is no critic: set model.critic.form"),
        (ppo_from(0), {}, {}, "there is no critic: set model.critic.form"),
        (
            ALWAYS_PPO,
            {"critic": CriticSettings("lora")},
            {},
            "model.critic.form lora .* model.lora is not set",
        ),
        (ppo_from(0), {"critic": CriticSettings()}, {"group_size": 1}, "group_size"),
        ({"num_iterations": 2}, {"critic": CriticSettings()}, {"group_size": 1}, "group_size"),
        (
            ALWAYS_PPO,
            {"critic": CriticSettings(num_warmup_iterations=4)},
            {},
            "num_warmup_iterations 4 makes 8 optimizer steps, but the run has only 8: the policy",
        ),
    ],
)
def test_a_run_that_cannot_work_is_refused_at_its_start(
    char_model, switch, module_options, trainer_options, message
):
    def untouched(completions: list[str], **columns: Any) -> list[float]:
        raise AssertionError("a completion was made before the run was refused")

    module = make_module(char_model, **module_options)
    trainer = make_trainer(
        reward=untouched,
        num_minibatches=2,
        switch=switch,
        max_epochs=-1,
        max_steps=8,
        **trainer_options,
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, datamodule=make_data())


def test_a_checkpoint_with_another_critic_is_refused(char_model, whole_runs):
    folder = whole_runs["head"][0]
    with pytest.raises(ValueError, match="critic of form head, but model.critic.form is separate"):
        switching_fit(char_model, form="separate", resume_from=f"{folder}/4")
    # Where there is none, the form is free.
    *_, stages = switching_fit(char_model, form="separate", resume_from=f"{folder}/1")
    assert stages.stages == STAGES[1:]


def test_a_critic_that_is_never_used_changes_nothing(char_model):
    found = []
    for critic in (None, CriticSettings("separate")):
        module = make_module(char_model, critic=critic, learning_rate=1e-2)
        trainer = make_trainer(reward=spread_reward, max_steps=2, max_epochs=-1)
        trainer.fit(module, datamodule=make_data())
        found.append(end_of(trainer, module)["weights"])
    assert same_bits(*found)
