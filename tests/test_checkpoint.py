"""Checkpoints at the end of a run, however it ends, and resumes that begin with a whole step."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from runs import make_data, make_module, make_trainer
from saved import read_saved

from lightning_grpo.callbacks import IterationCheckpoint


class StopAt(L.Callback):
    """Ends the fit after some iterations, as EarlyStopping or max_time would."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def on_iteration_end(self, trainer: L.Trainer, module: Any, rollout: Any) -> None:
        trainer.should_stop = module.counters.iterations >= self.iterations


class InterruptAfter(L.Callback):
    """Ctrl-C at the end of one batch."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_train_batch_end(self, *args: Any) -> None:
        self.num_batches -= 1
        if self.num_batches == 0:
            raise KeyboardInterrupt


class Windows(L.Callback):
    """Whether each minibatch ended its window, and whether the optimizer stepped after it."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, bool]] = []
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.last_step = trainer.global_step

    def on_minibatch_end(
        self, trainer: L.Trainer, module: Any, minibatch: Any, output: Any
    ) -> None:
        stepped = trainer.global_step > self.last_step
        self.last_step = trainer.global_step
        self.seen.append((minibatch.index, minibatch.is_window_end, stepped))


def checkpointing(tmp_path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return make_trainer(
        callbacks=[*callbacks, IterationCheckpoint()],
        enable_checkpointing=True,
        default_root_dir=str(tmp_path),
        **options,
    )


def test_a_run_that_is_stopped_early_is_saved_as_it_is(tmp_path: Path, char_model: str):
    trainer = checkpointing(tmp_path, StopAt(3), max_epochs=-1, max_steps=50)
    module = make_module(char_model)
    trainer.fit(module, make_data())
    saved = read_saved(tmp_path / "checkpoints/last")
    assert (trainer.global_step, saved["global_step"]) == (3, 3)
    assert saved["lightning_grpo"]["counters"]["iterations"] == 3
    for name, value in module.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])


def test_a_resume_from_inside_an_accumulation_window_begins_with_a_whole_one(
    tmp_path: Path, char_model: str
):
    options = {"num_minibatches": 4, "accumulate_grad_batches": 2, "max_epochs": -1}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        trainer = checkpointing(tmp_path, InterruptAfter(7), max_steps=8, **options)
        trainer.fit(make_module(char_model), make_data())
    signal.signal(signal.SIGINT, handler)
    last = str(tmp_path / "checkpoints/last")
    windows = Windows()
    trainer = checkpointing(tmp_path, windows, max_steps=8, **options)
    trainer.fit(make_module(char_model), make_data(), ckpt_path=last, weights_only=True)
    assert trainer.global_step == 8
    # Three steps were made, on six minibatches; the gradient of the seventh is lost.
    assert [index for index, _, _ in windows.seen] == [2, 3] + [0, 1, 2, 3] * 2
    assert all(ends == stepped for _, ends, stepped in windows.seen)


def test_a_validation_inside_an_accumulation_window_is_refused(char_model: str):
    trainer = make_trainer(num_minibatches=4, accumulate_grad_batches=2, val_check_interval=3)
    data = make_data(val_data=[{"prompt": "1=", "answer": "1"}])
    with pytest.raises(ValueError, match=r"trainer\.val_check_interval .* every 3 minibatches"):
        trainer.fit(make_module(char_model), data)
