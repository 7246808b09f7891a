"""The gradients of policy and critic under PPO depend on the rollout alone.

Measured where the optimizer sees them, through Trainer.fit, with every term of the two losses on:
padding, what lies under the mask, micro-batches, accumulation and ranks change nothing.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Perturb, Record, ShortenGroups, on_two_ranks, strategy_options, whole
from runs import make_data, make_trainer
from test_gradient_invariance import (
    NUM_STEPS,
    PROMPTS,
    TOLERANCE,
    WidenRollout,
    record_levelled_or_not,
    sgd,
)

from lightning_grpo.algorithms import PPO
from lightning_grpo.critic import CriticSettings
from lightning_grpo.loaders import Slot
from lightning_grpo.module import GRPOModule

# Form of the critic, where the KL is, and what the tokens are averaged over.
CASES = [
    ("head", "loss", "token"),
    ("separate", "reward", "completion"),
    ("head", "reward", "constant"),
]


class PerturbBoth(Perturb):
    """Moves the critic too, so that its values are not those of a new one."""

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        super().on_train_start(trainer, module)
        super().on_train_start(trainer, SimpleNamespace(policy=module.critic))  # type: ignore[arg-type]


class RecordBoth(Record):
    """Keeps the gradients of policy and critic apart."""

    def __init__(self) -> None:
        super().__init__()
        self.critic_gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: GRPOModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for group, found in zip(
            optimizer.param_groups, (self.gradients, self.critic_gradients), strict=True
        ):
            found.append(torch.cat([whole(p.grad).flatten() for p in group["params"]]))


def record_fit(
    model: str,
    case: tuple[Any, Any, Any],
    precision: Any = "64-true",
    *,
    strategy: str = "single",
    tokens: int = 16384,
    window: int = 1,
    old_logprobs: Any = "recompute",
    before: L.Callback | None = None,
    after: L.Callback | None = None,
) -> RecordBoth:
    """Two optimizer steps on one rollout: 4 ragged groups, and 4 whose completions are 1 token."""
    form, kl_in, reduction = case
    record = RecordBoth()
    module = GRPOModule(
        model,
        optimizer=sgd,
        beta=0.3,
        kl_in=kl_in,
        ppo=PPO(
            clip_low=0.1,
            clip_high=0.1,
            value_clip=0.03,
            entropy_coef=0.05,
            gae_lambda=0.9,
            critic_lambda=0.9,
            truncation="bootstrap",
            reduction=reduction,
        ),
        critic=CriticSettings(form, learning_rate=0.02),
        microbatch_tokens=tokens,
        old_logprobs=old_logprobs,
    )
    trainer = make_trainer(
        num_epochs=NUM_STEPS,
        num_minibatches=window,
        accumulate_grad_batches=window,
        precision=precision,
        max_completion_tokens=12,
        rollout={"stop_strings": list("012345")},
        switch={"algorithm": "ppo"},
        callbacks=[PerturbBoth(0.2), ShortenGroups(4), *([before] if before else []), record],
        max_steps=NUM_STEPS,
        max_epochs=-1,
        **strategy_options(strategy),
    )
    if after is not None:
        trainer.callbacks.append(after)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=make_data(PROMPTS))
    return record


def both(record: RecordBoth) -> list[torch.Tensor]:
    assert len(record.gradients) == len(record.critic_gradients) == NUM_STEPS
    return [*record.gradients, *record.critic_gradients]


def assert_same_gradients(found: RecordBoth, expected: RecordBoth, tolerance: float) -> None:
    for gradient, right in zip(both(found), both(expected), strict=True):
        difference = float((gradient.double() - right.double()).abs().max() / right.abs().max())
        assert difference <= tolerance, difference


def assert_same_bits(found: RecordBoth, expected: RecordBoth) -> None:
    for gradient, right in zip(both(found), both(expected), strict=True):
        assert bool(torch.isfinite(right).all()) and bool(right.any())
        assert torch.equal(gradient, right)


class PoisonMinibatches(L.Callback):
    """Puts a value under the mask of everything that the two losses read."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        minibatch = batch.minibatch
        assert minibatch is not None
        rollout = minibatch.rollout
        names = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "advantages", "values")
        poisoned = {
            name: torch.where(rollout.completion_mask, getattr(rollout, name), self.value)
            for name in (*names, "returns")
        }
        batch.minibatch = dataclasses.replace(minibatch, rollout=rollout.replace(**poisoned))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_microbatches_and_accumulation_leave_both_gradients_the_same(char_model, case, precision):
    whole_batch = record_fit(char_model, case, precision)
    assert whole_batch.num_microbatches == [1, 1]
    # The second step has something to get wrong in every term.
    metrics = whole_batch.outputs[1].metrics
    assert 0.01 < metrics["policy/clip_frac"] < 0.99
    assert 0.01 < metrics["value/clip_frac"] < 0.99
    assert metrics["policy/entropy"] > 0.1
    assert metrics["ref/kl"] > 0.01
    (rollout,) = whole_batch.rollouts
    lengths = rollout.completion_mask.sum(1).tolist()
    assert lengths[16:] == [1] * 16
    assert len(set(lengths[:16])) > 3
    assert 0 < int(rollout.truncated.sum()) < 32
    advantages = rollout.advantages[rollout.action_mask]
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantages.std()) == pytest.approx(1.0, abs=1e-4)
    for tokens, num_microbatches in ((100, 2), (50, 3)):
        cut = record_fit(char_model, case, precision, tokens=tokens)
        assert cut.num_microbatches == [num_microbatches] * 2
        assert_same_gradients(cut, whole_batch, TOLERANCE[precision])
    for tokens in (16384, 30):
        accumulated = record_fit(char_model, case, precision, window=2, tokens=tokens)
        assert len(accumulated.num_microbatches) == NUM_STEPS * 2
        assert_same_gradients(accumulated, whole_batch, TOLERANCE[precision])


@pytest.mark.parametrize("case", CASES[:2])
def test_padding_leaves_both_gradients_the_same_whatever_it_holds(char_model, case):
    options: dict[str, Any] = {"precision": "32-true", "old_logprobs": "sampler"}
    narrow = record_fit(char_model, case, **options)
    zeros = record_fit(char_model, case, before=WidenRollout(0, 0.0), **options)
    assert zeros.rollouts[0].prompt_ids.shape[1] == narrow.rollouts[0].prompt_ids.shape[1] + 3
    assert_same_gradients(zeros, narrow, TOLERANCE["32-true"])
    for token, logprob in ((7, math.nan), (8, math.inf), (9, -1e4)):
        junk = record_fit(char_model, case, before=WidenRollout(token, logprob), **options)
        assert_same_bits(junk, zeros)


@pytest.mark.parametrize("case", CASES[:2])
def test_padding_that_is_not_cut_off_leaves_both_gradients_the_same(char_model, case, monkeypatch):
    narrow = record_fit(char_model, case)
    monkeypatch.setattr("lightning_grpo.forward.trim_padding", lambda rollout: rollout)
    wide = record_fit(char_model, case, before=WidenRollout(7, math.nan))
    assert_same_gradients(wide, narrow, TOLERANCE["64-true"])


@pytest.mark.parametrize("case", CASES[:2])
def test_what_lies_under_the_mask_changes_no_bit_of_either_gradient(char_model, case):
    zeros = record_fit(char_model, case, "32-true", after=PoisonMinibatches(0.0))
    for value in (math.nan, math.inf, -math.inf, 1e4, -1e4):
        poisoned = record_fit(char_model, case, "32-true", after=PoisonMinibatches(value))
        assert_same_bits(poisoned, zeros)


FITS = [
    {"case": case, "strategy": strategy, "precision": precision, **cut}
    for strategy, precision in (("ddp", "64-true"), ("ddp", "32-true"), ("fsdp2", "32-true"))
    for case in CASES[:2]
    for cut in ({"tokens": 14, "is_levelled": False}, {"window": 2, "tokens": 30})
]


def record_on_this_rank(model: str) -> list[RecordBoth]:
    """All the fits of one process, without what cannot travel between processes."""
    return [record_levelled_or_not(record_fit, model, fit) for fit in FITS]


@pytest.fixture(scope="module")
def on_both(char_model, tmp_path_factory) -> list[list[RecordBoth]]:
    folder = tmp_path_factory.mktemp("on_both")
    results = on_two_ranks(record_on_this_rank, folder, char_model, timeout=200)
    for result in results:
        assert isinstance(result, list), result
    return results


@pytest.fixture(scope="module")
def on_one(char_model) -> dict[Any, RecordBoth]:
    return {
        (case, precision): record_fit(char_model, case, precision)
        for case in CASES[:2]
        for precision in TOLERANCE
    }


@pytest.mark.parametrize("number", range(len(FITS)))
def test_ranks_leave_both_gradients_the_same(on_both, on_one, number):
    fit = FITS[number]
    first, second = (records[number] for records in on_both)
    alone = on_one[fit["case"], fit["precision"]]
    rows = [rollout for record in (first, second) for rollout in record.rollouts]
    ids = [row for r in rows for row in r.completion_ids[r.completion_mask].tolist()]
    expected = alone.rollouts[0]
    assert sorted(ids) == sorted(expected.completion_ids[expected.completion_mask].tolist())
    # Both make the same number of forwards.
    assert first.num_microbatches == second.num_microbatches
    sizes = [[len(m) for m in r.minibatches[0].microbatches] for r in (first, second)]
    assert 0 not in sizes[0]
    if "is_levelled" in fit:  # one rank has long rows, and the other too few groups of short ones
        assert 0 in sizes[1]
    assert_same_gradients(first, alone, TOLERANCE[fit["precision"]])
    assert_same_gradients(second, alone, TOLERANCE[fit["precision"]])
