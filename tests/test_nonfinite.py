"""Steps that must not happen: nothing moves, the rows are written down, the run goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import Record, on_two_ranks, same_bits, strategy_options, weights_of
from runs import make_data, make_trainer
from torch import Tensor

from lightning_grpo.loaders import Slot
from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Minibatch, MinibatchOutput

STOPS = {"stop_strings": list("012345")}


def falling_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)


class PoisonRow(L.Callback):
    """Breaks one row of one minibatch, on the rank that holds the row's group."""

    def __init__(self, slots: list[int], name: str, value: float, group: int = 7) -> None:
        self.slots = slots
        self.name = name
        self.value = value
        self.group = group

    def on_train_batch_start(
        self, trainer: L.Trainer, module: GRPOModule, batch: Slot, batch_idx: int
    ) -> None:
        minibatch = batch.minibatch
        assert minibatch is not None
        rows = (minibatch.rollout.group_ids == self.group).nonzero().flatten()
        if batch_idx in self.slots and len(rows):
            poisoned = getattr(minibatch.rollout, self.name).clone()
            poisoned[rows[1], 0] = self.value
            rollout = minibatch.rollout.replace(**{self.name: poisoned})
            batch.minibatch = dataclasses.replace(minibatch, rollout=rollout)


class PoisonGradient(L.Callback):
    """Makes one gradient infinite, though every loss is finite."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: GRPOModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step == 1:
            gradient = next(p.grad for p in module.policy.parameters() if p.grad is not None)
            gradient.view(-1)[3] = math.inf


class Watch(L.Callback):
    """Keeps weights, moments and learning rate after each minibatch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.learning_rates: list[float] = []
        self.skipped: list[bool] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not callable(value)}

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        state = trainer.optimizers[0].state_dict()["state"]
        self.moments.append(
            {
                f"{index}/{name}": (v.to_local() if hasattr(v, "to_local") else v).clone()
                for index, values in state.items()
                for name, v in values.items()
            }
        )
        self.weights.append(weights_of(module))
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.skipped.append(output.is_skipped)


def run(
    model: str,
    folder: str,
    poison: L.Callback,
    strategy: str = "single",
    module_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Watch, Record, dict[str, int]]:
    watch, record = Watch(), Record()
    module = GRPOModule(
        model,
        optimizer=falling_adamw,
        lr_schedule="linear",
        beta=0.1,
        old_logprobs="recompute",
        **(module_options or {}),
    )
    trainer = make_trainer(
        **{
            "num_epochs": 2,
            "rollout": STOPS,
            "max_steps": 4,
            "max_epochs": -1,
            "gradient_clip_val": 1.0,
            "default_root_dir": folder,
            "callbacks": [record],
        }
        | options
        | strategy_options(strategy)
    )
    trainer.callbacks += [poison, watch]  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=make_data())
    counters = dataclasses.asdict(module.counters) | {"global_step": trainer.global_step}
    return watch, record, counters


def written_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "nonfinite").glob("*"))
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("advantages", math.nan),
        ("advantages", math.inf),
        ("old_logprobs", math.nan),
        ("ref_logprobs", math.inf),
    ],
)
def test_a_row_that_is_not_finite_moves_nothing_and_is_written_down(
    char_model, tmp_path: Path, name, value
):
    with pytest.warns(UserWarning, match="the step was skipped on all ranks; 1 rows are in"):
        watch, record, counters = run(char_model, str(tmp_path), PoisonRow([1], name, value))
    assert watch.skipped == [False, True, False, False]
    assert same_bits(watch.weights[1], watch.weights[0])
    assert same_bits(watch.moments[1], watch.moments[0])
    assert not same_bits(watch.weights[2], watch.weights[1])
    # Linear from 1e-2 to 0 over 4 steps; the skipped one is not counted.
    assert watch.learning_rates == pytest.approx([0.75e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert counters["optimizer_steps"] == 3
    assert counters["skipped_steps"] == 1
    assert counters["global_step"] == 4
    assert counters["iterations"] == 2
    files = written_rows(tmp_path)
    assert list(files) == ["step_1_rank_0.jsonl"]
    (row,) = files["step_1_rank_0.jsonl"]
    bad = int((record.rollouts[0].group_ids == 7).nonzero()[1])
    assert row["prompt"] == "79="
    assert row["completion"] == record.rollouts[0].completions[bad]
    ids = record.rollouts[0].completion_ids[bad][record.rollouts[0].completion_mask[bad]]
    assert row["completion_ids"] == ids.tolist()
    assert all(bool(torch.isfinite(w).all()) for w in watch.weights[-1].values())


@pytest.mark.parametrize("group", [4, 5, 6, 7])
def test_a_bad_row_anywhere_in_an_accumulation_window_skips_the_whole_step(
    char_model, tmp_path: Path, group
):
    with pytest.warns(UserWarning, match="the step was skipped on all ranks; 1 rows are in"):
        watch, record, counters = run(
            char_model,
            str(tmp_path),
            PoisonRow([0, 1], "advantages", math.nan, group),
            num_minibatches=2,
            accumulate_grad_batches=2,
            max_steps=2,
        )
    # The group is in one of the two minibatches; the step comes after both.
    assert watch.skipped == [False, True, False, False]
    assert same_bits(watch.weights[1], watch.weights[0])
    assert watch.moments[1] == {}
    assert counters["optimizer_steps"] == counters["skipped_steps"] == 1
    assert [len(rows) for rows in written_rows(tmp_path).values()] == [1]


def test_a_gradient_that_is_not_finite_though_the_loss_is_writes_all_rows(
    char_model, tmp_path: Path
):
    with pytest.warns(UserWarning, match="gradient norm inf: the step was skipped"):
        watch, record, counters = run(char_model, str(tmp_path), PoisonGradient())
    assert watch.skipped == [False, True, False, False]
    assert same_bits(watch.weights[1], watch.weights[0])
    assert same_bits(watch.moments[1], watch.moments[0])
    assert {name: len(rows) for name, rows in written_rows(tmp_path).items()} == {
        "step_1_rank_0.jsonl": 32
    }


def test_too_many_in_a_row_stop_the_run(char_model, tmp_path: Path):
    options = {"max_nonfinite_steps": 2}
    poison = PoisonRow([1, 2], "advantages", math.nan)
    with pytest.raises(RuntimeError, match=r"step 2 in a row \(model.max_nonfinite_steps\)"):
        run(char_model, str(tmp_path), poison, module_options=options)
    apart = PoisonRow([0, 2], "advantages", math.nan)
    _, _, counters = run(char_model, str(tmp_path), apart, module_options=options)
    assert counters["skipped_steps"] == 2


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(char_model, tmp_path: Path):
    (tmp_path / "nonfinite").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="cannot be written"):
        _, _, counters = run(char_model, str(tmp_path), PoisonRow([1], "advantages", math.nan))
    assert counters["optimizer_steps"] == 3


def skip_on_both(model: str, folder: str) -> dict[str, Any]:
    """A bad row on rank 1 only, under DDP and then under FSDP2, and two bad steps in a row."""
    results: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        poison = PoisonRow([1], "advantages", math.nan)
        watch, _, counters = run(model, f"{folder}/{strategy}", poison, strategy)
        results[strategy] = (watch, counters)
    try:
        poison = PoisonRow([0, 1], "advantages", math.nan)
        options = {"max_nonfinite_steps": 2}
        run(model, f"{folder}/streak", poison, "ddp", module_options=options)
    except RuntimeError as error:
        results["error"] = str(error)
    return results


def test_a_bad_row_on_one_rank_skips_the_step_on_both(char_model, tmp_path: Path):
    on_both = on_two_ranks(skip_on_both, tmp_path, char_model, str(tmp_path))
    for result in on_both:
        assert isinstance(result, dict), result
        assert "step 2 in a row (model.max_nonfinite_steps)" in result["error"]
        for strategy in ("ddp", "fsdp2"):
            watch, counters = result[strategy]
            assert watch.skipped == [False, True, False, False]
            assert same_bits(watch.weights[1], watch.weights[0])
            assert same_bits(watch.moments[1], watch.moments[0])
            assert not same_bits(watch.weights[2], watch.weights[1])
            assert watch.learning_rates == pytest.approx([0.75e-2, 0.75e-2, 0.5e-2, 0.25e-2])
            assert counters["optimizer_steps"] == 3
            assert counters["skipped_steps"] == 1
    for strategy in ("ddp", "fsdp2"):
        weights = [result[strategy][0].weights[-1] for result in on_both]
        assert same_bits(*weights)
        # Group 7 is on rank 1, and only its row is written.
        files = written_rows(tmp_path / strategy)
        assert {name: len(rows) for name, rows in files.items()} == {"step_1_rank_1.jsonl": 1}
