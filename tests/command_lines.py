"""Running command lines inside the test's process, on a small model and small files."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from lightning_grpo.cli import main
from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Rollout


def short(completions: list[str], **columns: Any) -> list[float]:
    """A reward of a user: shorter is better."""
    return [-float(len(text)) for text in completions]


class Announcer(L.Callback):
    """A callback of a user, with options."""

    def __init__(self, word: str = "iteration", times: int = 1) -> None:
        self.word = word
        self.times = times

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Say what has happened."""
        print("ANNOUNCED", self.word, self.times, len(rollout))


class Interrupter(L.Callback):
    """Presses Ctrl-C in the middle of a step, when some optimizer steps are done."""

    def __init__(self, step: int = 3) -> None:
        self.step = step

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop the run as a person does."""
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class Terminator(L.Callback):
    """Sends SIGTERM to its own process, as a job scheduler does."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Send it once."""
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class Killer(L.Callback):
    """Kills its own process, which can do nothing about it, after a save."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Kill it."""
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


class Failer(L.Callback):
    """A callback with an error in it."""

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Fail."""
        raise ValueError("an error of the user's own")


class NoCallback:
    """Something that is no callback."""


def write_jsonl(path: str, rows: list[dict[str, Any]]) -> str:
    """Write rows and return the path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: str, **changes: dict[str, Any]) -> str:
    """Write data and a configuration of 4 prompts x 2 completions per iteration to this folder."""
    rows = [{"prompt": f"{i}{(7 * i) % 10}=", "answer": str(i)} for i in range(16)]
    config: dict[str, Any] = {
        "run": {"name": "small", "num_threads": 1},
        "model": {
            "name_or_path": folder,
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 1e-3, "weight_decay": 0.0},
            },
        },
        "data": {
            "train_data": write_jsonl("train.jsonl", rows),
            "val_data": write_jsonl("val.jsonl", rows[:4]),
            "prompts_per_iteration": 4,
        },
        "rollout": {"group_size": 2, "max_completion_tokens": 4, "num_val_samples": 2},
        "reward": {"functions": ["runs.spread_reward"], "success_threshold": 0.5},
        "replay": {"num_minibatches": 2},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4, "max_epochs": -1},
    }
    for section, options in changes.items():
        config[section] = config.get(section, {}) | options
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return "config.yaml"


def train_rows(file: Path, column: str = "reward/mean") -> list[tuple[int, float]]:
    """Step and value of each row of metrics.csv that holds the column."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]


def run(*args: str) -> None:
    """Run a command line as `python -m lightning_grpo` does."""
    main(list(args))
