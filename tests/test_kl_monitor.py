"""KLMonitor through whole runs: adaptive beta, early stop, rollback, and the reference behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Perturb, Record, same_bits, weights_of
from runs import make_data, make_module, make_trainer
from torch import Tensor

from lightning_grpo.callbacks import ColdStart
from lightning_grpo.module import GRPOModule
from lightning_grpo.policy import Lora
from lightning_grpo.types import Minibatch, MinibatchOutput, Rollout

STOPS = {"stop_strings": list("012345")}
NUM_ROWS = 32  # 8 prompts, 4 completions of each


def fit(model: str, record: Record, *, module: dict[str, Any], **trainer: Any) -> GRPOModule:
    grpo = make_module(model, **module)
    callbacks = [*trainer.pop("callbacks", []), record]
    make_trainer(callbacks=callbacks, rollout=STOPS, **trainer).fit(grpo, datamodule=make_data())
    return grpo


# Adaptive beta


def ref_kl_by_hand(rollout: Rollout, model: GRPOModule) -> float:
    """k3 summed over each completion, mean over completions, with the weights as they are."""
    with torch.no_grad():
        logprobs = model.policy(
            rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask
        ).logprobs
    assert rollout.ref_logprobs is not None
    d = (rollout.ref_logprobs - logprobs).double()
    k3 = torch.where(rollout.completion_mask, d.exp() - d - 1, 0.0)
    return float(k3.sum(1).mean())


class MeasureRefKL(L.Callback):
    """Measures the KL of each rollout by hand, after an iteration that moves nothing."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        self.values.append(ref_kl_by_hand(rollout, module))


@pytest.mark.parametrize(("share_of_kl", "error"), [(0.1, 0.2), (10.0, -0.2), (1 / 1.05, 0.05)])
def test_beta_follows_the_kl_summed_over_a_completion(char_model, share_of_kl, error):
    measured = MeasureRefKL()
    still = {"beta": 0.15, "learning_rate": 0.0}
    fit(char_model, Record(), module=still, callbacks=[Perturb(), measured], limit_train_batches=1)
    target = share_of_kl * measured.values[0]
    assert target > 0
    record = Record()
    module = fit(
        char_model,
        record,
        module=still,
        callbacks=[Perturb()],
        num_epochs=2,
        num_minibatches=2,
        kl={"target_nats_per_completion": target, "horizon_completions": 1000.0},
        limit_train_batches=4,
    )
    # The recorder runs before the monitor, so it has seen beta as it was.
    assert record.betas == [0.15]
    assert module.beta == pytest.approx(0.15 * (1 + error * NUM_ROWS / 1000), rel=1e-6)


def test_beta_stays_when_no_target_is_set(char_model):
    module = fit(char_model, Record(), module={"beta": 0.3}, callbacks=[Perturb()])
    assert module.beta == 0.3


def test_a_target_without_a_reference_is_refused(char_model):
    with pytest.raises(ValueError, match="adapts model.beta, but beta is 0"):
        fit(char_model, Record(), module={"beta": 0.0}, kl={"target_nats_per_completion": 1.0})


@pytest.mark.parametrize(
    "option",
    [
        "target_nats_per_completion",
        "horizon_completions",
        "stop_above_nats_per_token",
        "rollback_above_nats_per_token",
    ],
)
def test_options_that_are_not_positive_are_refused(option):
    with pytest.raises(ValueError, match=f"kl.{option} must be positive, got 0"):
        make_trainer(kl={option: 0})


# Early stop


def test_a_stop_drops_the_rest_of_the_replay_and_goes_on_with_new_prompts(char_model):
    record = Record()
    module = fit(
        char_model,
        record,
        module={"beta": 0.0, "learning_rate": 1e-2},
        num_epochs=4,
        kl={"stop_above_nats_per_token": 1e-4},
        limit_train_batches=8,
    )
    # The first step of a rollout has KL 0; the second sees the KL that the first one made.
    assert [m.index for m in record.minibatches] == [0, 1] * 4
    assert [m.iteration for m in record.minibatches] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [o.metrics["policy/approx_kl"] > 1e-4 for o in record.outputs] == [False, True] * 4
    assert module.counters.iterations == 4
    assert module.counters.optimizer_steps == 8
    assert module.counters.completions == 4 * NUM_ROWS


def test_a_stop_waits_for_the_end_of_the_accumulation_window(char_model):
    record = Record()
    module = fit(
        char_model,
        record,
        module={"beta": 0.0, "learning_rate": 1e-2},
        num_epochs=4,
        num_minibatches=2,
        accumulate_grad_batches=2,
        kl={"stop_above_nats_per_token": 1e-4},
        limit_train_batches=8,
    )
    # Minibatches 2 and 3 make the second step; the stop falls in 2.
    assert record.outputs[2].metrics["policy/approx_kl"] > 1e-4
    assert [m.index for m in record.minibatches] == [0, 1, 2, 3] * 2
    assert module.counters.iterations == 2
    assert module.counters.optimizer_steps == 4


def test_without_a_stop_the_whole_replay_is_used(char_model):
    record = Record()
    module = fit(
        char_model,
        record,
        module={"beta": 0.0, "learning_rate": 1e-2},
        num_epochs=4,
        limit_train_batches=8,
    )
    assert [m.index for m in record.minibatches] == [0, 1, 2, 3] * 2
    assert module.counters.iterations == 2


def test_a_kl_over_its_bound_is_said(char_model):
    with pytest.warns(UserWarning, match="nats per token from the one that sampled"):
        fit(
            char_model,
            Record(),
            module={"beta": 0.0, "learning_rate": 1e-2},
            num_epochs=2,
            kl={"warn_above_nats_per_token": 1e-4},
        )


# Rollback


class WatchRollback(L.Callback):
    """Keeps the weights at each rollout and after each minibatch, and what the optimizer holds."""

    def __init__(self) -> None:
        self.at_rollout: list[dict[str, Tensor]] = []
        self.after_minibatch: list[dict[str, Tensor]] = []
        self.num_moments: list[int] = []

    def on_rollout_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        self.at_rollout.append(weights_of(module))

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        self.after_minibatch.append(weights_of(module))
        self.num_moments.append(len(trainer.optimizers[0].state))


ROLLBACK = {"beta": 0.0, "learning_rate": 1e-2, "old_policy": "weights"}


def fit_with_rollback(model: str, watch: WatchRollback, **options: Any) -> GRPOModule:
    module = make_module(model, **ROLLBACK)
    trainer = make_trainer(rollout=STOPS, num_epochs=3, **options)
    trainer.callbacks.append(watch)  # after the monitor
    trainer.fit(module, datamodule=make_data())
    return module


def test_a_rollback_restores_every_bit_and_clears_the_moments(char_model):
    watch = WatchRollback()
    with pytest.warns(UserWarning, match="its weights are those of before this rollout again"):
        module = fit_with_rollback(
            char_model, watch, kl={"rollback_above_nats_per_token": 1e-4}, limit_train_batches=4
        )
    assert module.counters.rollbacks == 2
    assert module.counters.iterations == 2
    assert len(watch.after_minibatch) == 4
    assert not same_bits(watch.after_minibatch[0], watch.at_rollout[0])
    assert same_bits(watch.after_minibatch[1], watch.at_rollout[0])
    assert same_bits(watch.at_rollout[1], watch.at_rollout[0])
    assert [bool(n) for n in watch.num_moments] == [True, False, True, False]


def test_too_many_rollbacks_in_a_row_stop_the_run(char_model):
    watch = WatchRollback()
    with pytest.raises(RuntimeError, match=r"rollback 2 in a row \(kl.max_rollbacks\)"):
        fit_with_rollback(
            char_model, watch, kl={"rollback_above_nats_per_token": 1e-4, "max_rollbacks": 2}
        )


class BreakWeight(L.Callback):
    """Makes one weight NaN after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        if trainer.global_step == self.step:
            next(p for p in module.policy.parameters()).data[0, 0] = math.nan


@pytest.mark.parametrize(("step", "iteration"), [(1, 0), (5, 1)])
def test_weights_that_are_not_finite_go_back_to_those_of_their_rollout(char_model, step, iteration):
    watch = WatchRollback()
    module = fit_with_rollback(
        char_model,
        watch,
        kl={"rollback_above_nats_per_token": 1e9},
        callbacks=[BreakWeight(step)],
        limit_train_batches=step,
    )
    assert module.counters.rollbacks == 1
    assert module.counters.iterations == iteration + 1
    assert same_bits(watch.after_minibatch[-1], watch.at_rollout[iteration])
    assert iteration == 0 or not same_bits(watch.at_rollout[1], watch.at_rollout[0])


def test_a_rollback_without_a_copy_of_the_weights_is_refused(char_model):
    with pytest.raises(ValueError, match="set model.old_policy to weights"):
        fit(char_model, Record(), module={}, kl={"rollback_above_nats_per_token": 1.0})


# The reference


def test_without_beta_there_is_no_reference_and_no_metric_of_it(char_model):
    record = Record()
    module = fit(char_model, record, module={"beta": 0.0}, limit_train_batches=2)
    assert module.reference is None
    assert all(rollout.ref_logprobs is None for rollout in record.rollouts)
    assert not any(name.startswith("ref/") for o in record.outputs for name in o.metrics)


def test_a_reference_that_weighs_nothing_changes_no_bit_of_the_run(char_model):
    without = Record()
    alone = fit(char_model, without, module={"beta": 0.0}, num_epochs=2)

    class Weightless(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
            module.beta = 0.0

    beside = Record()
    watched = fit(char_model, beside, module={"beta": 0.1}, num_epochs=2, callbacks=[Weightless()])
    assert watched.reference is not None
    assert beside.rollouts[1].ref_logprobs is not None
    assert same_bits(weights_of(alone), weights_of(watched))
    assert beside.outputs[-1].metrics["ref/kl"] > 0


def test_beta_changes_the_run(char_model):
    runs = [
        fit(char_model, Record(), module={"beta": beta}, num_epochs=2, callbacks=[Perturb()])
        for beta in (0.0, 0.5)
    ]
    assert not same_bits(weights_of(runs[0]), weights_of(runs[1]))


def test_the_reference_stays_the_policy_of_the_start(char_model):
    record = Record()
    start = weights_of_folder(char_model)
    module = fit(char_model, record, module={"beta": 0.1}, num_epochs=2)
    assert record.outputs[0].metrics["ref/kl"] == 0.0
    assert record.outputs[-1].metrics["ref/kl"] > 0
    assert not same_bits(weights_of(module), start)
    with module.reference.in_place():
        assert same_bits(weights_of(module), start)


def weights_of_folder(folder: str) -> dict[str, Tensor]:
    from lightning_grpo.policy import load_policy

    policy = load_policy(folder, num_tokens=10)
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def test_lora_has_its_base_as_reference_and_saves_the_adapter_alone(char_model, tmp_path: Path):
    record = Record()
    module = fit(
        char_model,
        record,
        module={"beta": 0.1, "lora": Lora(rank=4, alpha=8.0), "learning_rate": 1e-2},
    )
    assert module.reference.snapshot is None
    assert record.outputs[0].metrics["ref/kl"] == 0.0
    assert record.outputs[-1].metrics["ref/kl"] > 0
    state = module.state_dict()
    assert state and all("lora_" in name for name in state)
    base = weights_of_folder(char_model)
    inside = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): value
        for name, value in weights_of(module).items()
        if "lora_" not in name
    }
    assert same_bits(inside, base)


# The cold start


DEMONSTRATIONS = [{"prompt": f"{i}=", "completion": "abc"} for i in range(8)]


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": 2}], ids=["run", "fast_dev_run"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_the_reference_is_taken_after_the_cold_start(char_model, tmp_path: Path, lora, options):
    record = Record()
    start = weights_of_folder(char_model)
    module = fit(
        char_model,
        record,
        module={"beta": 0.1, "lora": lora},
        callbacks=[ColdStart(DEMONSTRATIONS, num_steps=20, batch_size=8, learning_rate=1e-2)],
        default_root_dir=str(tmp_path),
        **options,
    )
    assert module.is_cold_started
    assert record.outputs[0].metrics["ref/kl"] == 0.0
    assert record.outputs[1].metrics["ref/kl"] > 0
    with module.reference.in_place():
        if lora is None:
            assert not same_bits(weights_of(module), start)
    is_dry = bool(options)
    assert (tmp_path / "reference").exists() is not is_dry
    assert bool(module.reference_record) is not is_dry


@pytest.mark.parametrize("bound", ["stop_above_nats_per_token", "rollback_above_nats_per_token"])
def test_a_bound_that_could_never_be_seen_is_refused(char_model, bound):
    trainer = make_trainer(kl={bound: 0.1})
    with pytest.raises(ValueError, match=rf"kl\.{bound} is set, but every rollout makes one"):
        trainer.fit(make_module(char_model, old_policy="weights"), make_data())
