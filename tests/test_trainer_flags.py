"""The Trainer's flags mean what Lightning users expect: one batch is one minibatch.

The small runs have 16 prompts, 8 in an iteration, and 4 completions of each; a replay of 2 epochs
x 2 minibatches makes 4 batches of an iteration and 8 of an epoch.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Record, same_bits, weights_of
from lightning.pytorch.strategies import FSDPStrategy
from runs import make_data, make_trainer
from saved import read_saved
from torch import Tensor

from lightning_grpo.cli import main
from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Minibatch, MinibatchOutput

VAL = [{"prompt": f"{i}=", "answer": str(i)} for i in range(3)]


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


class Course(L.Callback):
    """The learning rate and the weights after each batch."""

    def __init__(self) -> None:
        self.learning_rates: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        self.weights.append(weights_of(module))

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.weights.append(weights_of(module))


class Run:
    """One fit, and what it left."""

    def __init__(
        self, model: str, optimizer: Callable[..., Any] = adamw, beta: float = 0.0, **options: Any
    ) -> None:
        self.record, self.course = Record(), Course()
        self.module = GRPOModule(model, optimizer=optimizer, beta=beta, lr_schedule="linear")
        defaults = {"num_epochs": 2, "num_minibatches": 2, "callbacks": [self.record, self.course]}
        self.trainer = make_trainer(**(defaults | options))
        self.trainer.fit(self.module, datamodule=make_data(val_data=VAL))

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Iterations, optimizer steps, the Trainer's steps, rollouts that were made."""
        counters = self.module.counters
        assert counters.completions % 32 == 0
        rollouts = counters.completions // 32
        return counters.iterations, counters.optimizer_steps, self.trainer.global_step, rollouts


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, (2, 8, 8, 2)),
        ({"num_epochs": 1}, (2, 4, 4, 2)),
        ({"num_epochs": 1, "num_minibatches": 1}, (2, 2, 2, 2)),
        ({"max_epochs": 2}, (4, 16, 16, 4)),
        ({"accumulate_grad_batches": 2}, (2, 4, 4, 2)),
        ({"accumulate_grad_batches": 4}, (2, 2, 2, 2)),
        ({"max_steps": 3, "max_epochs": -1}, (0, 3, 3, 1)),
        ({"max_steps": 4, "max_epochs": -1}, (1, 4, 4, 1)),
        ({"max_steps": 11, "max_epochs": -1}, (2, 11, 11, 3)),
        ({"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 2}, (1, 3, 3, 2)),
        ({"limit_train_batches": 3}, (0, 3, 3, 1)),
        ({"limit_train_batches": 3, "max_epochs": 3}, (2, 9, 9, 3)),
        ({"limit_train_batches": 0.5}, (1, 4, 4, 1)),
        ({"overfit_batches": 1}, (0, 1, 1, 1)),
        ({"overfit_batches": 4, "max_epochs": 3}, (3, 12, 12, 3)),
        ({"fast_dev_run": True}, (0, 1, 1, 1)),
        ({"fast_dev_run": 5}, (1, 5, 5, 2)),
        ({"fast_dev_run": True, "accumulate_grad_batches": 2}, (0, 1, 1, 1)),
    ],
    ids=str,
)
def test_a_flag_gives_these_iterations_steps_and_rollouts(char_model, options, counts):
    run = Run(char_model, **options)
    assert run.counts == counts


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [({}, 8), ({"accumulate_grad_batches": 2}, 4), ({"max_steps": 5, "max_epochs": -1}, 5)],
    ids=str,
)
def test_a_linear_schedule_ends_at_zero_with_the_last_step(char_model, options, num_steps):
    run = Run(char_model, **options)
    window = options.get("accumulate_grad_batches", 1)
    after_steps = run.course.learning_rates[window - 1 :: window]
    expected = [1e-2 * (1 - (i + 1) / num_steps) for i in range(num_steps)]
    assert after_steps == pytest.approx(expected, abs=1e-12)


def test_an_accumulated_batch_moves_nothing_until_its_window_ends(char_model):
    run = Run(char_model, accumulate_grad_batches=2, limit_train_batches=4)
    moved = [not same_bits(a, b) for a, b in zip(run.course.weights, run.course.weights[1:])]
    # The schedule starts at its full rate, and ends at 0 only after the last step.
    assert moved == [False, True, False, True]


def test_every_epoch_of_overfit_batches_has_the_same_prompts(char_model):
    overfit = Run(char_model, overfit_batches=4, max_epochs=3)
    prompts = [set(rollout.prompts) for rollout in overfit.record.rollouts]
    assert prompts[0] == prompts[1] == prompts[2]
    limited = Run(char_model, limit_train_batches=4, max_epochs=2)
    prompts = [set(rollout.prompts) for rollout in limited.record.rollouts]
    assert prompts[0].isdisjoint(prompts[1])


@pytest.mark.parametrize(
    ("options", "num_validations"),
    [
        ({}, 1),
        ({"max_epochs": 2}, 2),
        ({"val_check_interval": 2}, 4),
        ({"val_check_interval": 3}, 2),
        ({"val_check_interval": 0.5}, 2),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": 2}, 3),
        ({"limit_val_batches": 0}, 0),
        ({"check_val_every_n_epoch": 2, "max_epochs": 4}, 2),
    ],
    ids=str,
)
def test_validation_comes_as_often_as_the_flag_says_and_moves_nothing(
    char_model, options, num_validations
):
    run = Run(char_model, **options)
    assert run.record.num_validations == num_validations
    if options.get("max_epochs", 1) == 1:
        assert run.module.counters.completions == 64
        never = Run(char_model, limit_val_batches=0)
        assert same_bits(weights_of(run.module), weights_of(never.module))


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_gradient_is_clipped_to_the_norm_after_it_was_logged(char_model, precision):
    options = {"optimizer": sgd, "precision": precision, "limit_train_batches": 1}
    free = Run(char_model, **options)
    norm = float(free.record.gradients[0].double().norm())
    clipped = Run(char_model, gradient_clip_val=norm / 3, **options)
    logged = float(clipped.trainer.callback_metrics["policy/grad_norm"])
    assert logged == pytest.approx(norm, rel=1e-6)
    # SGD at rate 1 moves the weights by the gradient that it got.
    for run, expected in ((free, norm), (clipped, norm / 3)):
        before, after = run.course.weights[:2]
        moved = torch.cat([(after[n] - before[n]).double().flatten() for n in before])
        assert float(moved.norm()) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_clipped_by_value(char_model):
    run = Run(
        char_model,
        optimizer=sgd,
        precision="64-true",
        limit_train_batches=1,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm="value",
    )
    before, after = run.course.weights[:2]
    largest = max(float((after[n] - before[n]).abs().max()) for n in before)
    assert largest == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_bf16_trains_with_these_parameters_and_counts_the_same(char_model, precision, dtype):
    run = Run(char_model, precision=precision, beta=0.1, gradient_clip_val=1.0)
    assert run.counts == (2, 8, 8, 2)
    assert {p.dtype for p in run.module.policy.parameters()} == {dtype}
    assert not same_bits(run.course.weights[-1], run.course.weights[0])
    assert all(bool(w.isfinite().all()) for w in run.course.weights[-1].values())
    rollout = run.record.rollouts[-1]
    assert rollout.advantages.dtype == rollout.ref_logprobs.dtype == torch.float32
    assert run.record.outputs[0].metrics["policy/approx_kl"] == 0.0
    assert all(math.isfinite(v) for o in run.record.outputs for v in o.metrics.values())


# Through the command line, on the configuration of a bare `fit` made small.

SMALL = [
    "--cold_start.num_steps=0",
    "--data.prompts_per_iteration=4",
    "--data.train_data.init_args.num_prompts=256",
    "--data.max_val_prompts=4",
    "--rollout.group_size=4",
    "--rollout.max_completion_tokens=4",
    "--rollout.num_val_samples=1",
    "--replay.num_epochs=1",
    "--replay.num_minibatches=2",
    "--trainer.enable_progress_bar=false",
]


def fit_from_the_command_line(*flags: str) -> dict[str, Any]:
    main(["fit", *SMALL, *flags])
    (path,) = Path("runs").rglob("last-*")
    checkpoint = read_saved(path)
    with path.parents[1].joinpath("metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        "global_step": checkpoint["global_step"],
        "validations": sum(bool(row.get("val/reward")) for row in rows),
        **checkpoint["lightning_grpo"]["counters"],
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["max_steps=4"], {"iterations": 2, "optimizer_steps": 4, "global_step": 4}),
        (
            ["max_steps=4", "accumulate_grad_batches=2", "gradient_clip_val=0.1"],
            {"iterations": 4, "optimizer_steps": 4, "global_step": 4},
        ),
        (
            ["max_steps=4", "val_check_interval=2", "precision=bf16-mixed"],
            {"iterations": 2, "optimizer_steps": 4, "validations": 3},
        ),
        (
            [
                "max_steps=-1",
                "max_epochs=1",
                "limit_train_batches=6",
                "val_check_interval=3",
                "precision=bf16-true",
            ],
            {"iterations": 3, "optimizer_steps": 6, "completions": 48},
        ),
    ],
    ids=str,
)
def test_the_command_line_gives_the_same_counts(monkeypatch, flags, expected):
    monkeypatch.setattr(sys, "argv", ["lightning_grpo"])
    found = fit_from_the_command_line(*[f"--trainer.{flag}" for flag in flags])
    assert {name: found[name] for name in expected} == expected


def test_fast_dev_run_on_the_command_line_writes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_grpo"])
    main(["fit", *SMALL, "--trainer.fast_dev_run=true"])
    assert [path for path in Path().rglob("*") if path.is_file()] == []


class ShardedOnCpu(FSDPStrategy):
    """FSDP1 where the Trainer does not yet refuse it by its class."""


@pytest.mark.parametrize(
    ("options", "word"),
    [({"precision": "16-true"}, "16-true"), ({"strategy": ShardedOnCpu()}, "FSDP1")],
)
def test_what_cannot_work_is_refused_at_start(char_model, options, word):
    try:
        with pytest.raises(ValueError, match=word):
            make_trainer(**options).fit(
                GRPOModule(char_model, optimizer=adamw), datamodule=make_data()
            )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
