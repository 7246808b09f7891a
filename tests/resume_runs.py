"""Runs that are stopped anywhere and go on in another process, and what they end with.

Every run is a child that is forked from a process in which everything is imported, so that it can
be killed and costs a second. What it ends with lies in files: the end state, the metrics, and the
samples of every iteration.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import faulthandler
import json
import os
import random
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from distributed_runs import strategy_options, whole
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from runs import make_data, make_module, make_trainer
from switch_runs import STOPS, PPOBetween

from lightning_grpo.adapters import Lora
from lightning_grpo.callbacks import HealthWarnings, IterationCheckpoint, ValidateAtEnds
from lightning_grpo.checkpoint_paths import has_checkpoints
from lightning_grpo.critic import CriticSettings
from lightning_grpo.module import GRPOModule
from lightning_grpo.run_files import ResumableCSVLogger, resume_point
from lightning_grpo.types import Rollout

VAL = [{"prompt": f"{i}=", "answer": str(i)} for i in range(4)]
# 16 prompts, 4 at a time: 3 epochs of 4 iterations. Two epochs of two minibatches in windows of
# two: 2 optimizer steps in each iteration.
NUM_ITERATIONS = 12
# A run takes a few seconds; one that waits for another that will not come shows where, and ends.
TIMEOUT_S = 90


@dataclass(frozen=True)
class Case:
    """A kind of run."""

    strategy: str = "single"
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


def switch(first: int, last: int) -> dict[str, Any]:
    rule = PPOBetween(first, last)
    return {"rule": rule, "patience": 1, "min_stay_iterations": 0, "handover_ratio": None}


CRITIC = {"critic": CriticSettings("head", learning_rate=1e-2)}
ADAPTIVE = {"target_nats_per_completion": 0.05, "horizon_completions": 100.0}
CASES = {
    "grpo": Case(trainer={"kl": ADAPTIVE, "check_val_every_n_epoch": 1}),
    "ppo": Case(
        module=CRITIC | {"kl_in": "reward"},
        # The replay stops early, so that iterations and epochs do not end together.
        trainer={"switch": {"algorithm": "ppo"}, "kl": {"stop_above_nats_per_token": 0.02}},
    ),
    "lora": Case(module={"lora": Lora(4)}, trainer={"sampling": {"max_refills": 1}}),
    "switched": Case(module=CRITIC, trainer={"switch": switch(2, 8)}),
    "ddp": Case("ddp", module=CRITIC, trainer={"switch": switch(2, 8)}),
    "fsdp2": Case("fsdp2", module=CRITIC, trainer={"switch": switch(2, 8)}),
}


@dataclass(frozen=True)
class Stop:
    """When and how a run is stopped."""

    moment: str
    """rollout, reward, update, hooks, saved, validation or epoch: see `moments`."""
    number: int
    """Which of these moments, from 1."""
    how: str
    """sigterm, sigkill or exception."""
    ranks: tuple[int, ...] = (0, 1)


class Stopped(Exception):
    """The exception that ends a run."""


class Stopper:
    """Counts moments, and stops the run at one."""

    def __init__(self) -> None:
        self.stop: Stop | None = None
        self.seen: dict[str, int] = {}

    def reach(self, moment: str) -> None:
        self.seen[moment] = self.seen.get(moment, 0) + 1
        stop = self.stop
        if stop is None or (stop.moment, stop.number) != (moment, self.seen[moment]):
            return
        if int(os.environ.get("LOCAL_RANK", 0)) not in stop.ranks:
            return
        if stop.how == "exception":
            raise Stopped(f"at {moment} {stop.number}")
        os.kill(os.getpid(), signal.SIGKILL if stop.how == "sigkill" else signal.SIGTERM)


STOPPER = Stopper()


def noisy_reward(completions: list[str], **columns: Any) -> list[float]:
    """A reward that draws from every generator there is; some groups have no spread."""
    STOPPER.reach("reward")
    noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
    return [(1 + 0.1 * noise) * (sum(map(ord, text)) % 2) for text in completions]


class Moments(L.Callback):
    """The moments at which a run may be stopped, in callbacks that come before all others."""

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        advance = module.phase.advance

        def advance_or_stop(*args: Any) -> None:
            if module.phase.name == "generating" and not module.phase.num_done:
                STOPPER.reach("rollout")
            advance(*args)

        module.phase.advance = advance_or_stop  # type: ignore[method-assign]

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        STOPPER.reach("update")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        STOPPER.reach("hooks")

    def on_validation_batch_end(self, *args: Any) -> None:
        STOPPER.reach("validation")

    def on_train_epoch_end(self, *args: Any) -> None:
        STOPPER.reach("epoch")


class AfterSaves(Checkpoint):
    """The moment after a save, before Lightning writes the row of the step."""

    def on_train_batch_end(self, trainer: L.Trainer, module: GRPOModule, *args: Any) -> None:
        if not module.queue:
            STOPPER.reach("saved")


class WriteSamples(L.Callback):
    """Writes the completions and rewards of each iteration to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        assert rollout.rewards is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{module.counters.iterations:02d}-{trainer.global_rank}.json"
        content = [rollout.completion_ids.tolist(), rollout.rewards.tolist(), rollout.columns]
        (self.folder / name).write_text(json.dumps(content))


def fit(model: str, case: Case, folder: Path, ckpt_path: str | None = None) -> None:
    """Make the run of a case, or go on with it, and write what it ends with."""
    L.seed_everything(1, verbose=False)
    resume = resume_point(ckpt_path) if ckpt_path else None
    logger = ResumableCSVLogger(
        str(folder), name="", version="", flush_logs_every_n_steps=1, resume=resume
    )
    options = {"num_epochs": 2, "num_minibatches": 2, "accumulate_grad_batches": 2, "max_epochs": 3}
    trainer = make_trainer(
        reward=noisy_reward,
        rollout=STOPS | {"num_val_samples": 2},
        max_completion_tokens=8,
        gradient_clip_val=0.5,
        callbacks=[
            Moments(),
            ValidateAtEnds(at_start=False),
            HealthWarnings(),
            WriteSamples(folder / "samples"),
            IterationCheckpoint(every_n_iterations=1, monitor="val/reward"),
            AfterSaves(),
        ],
        **{"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 1},
        **strategy_options(case.strategy),
        **(options | case.trainer),
    )
    module = make_module(
        model,
        **{"learning_rate": 1e-2, "lr_schedule": "linear", "num_warmup_steps": 3, "beta": 0.1},
        **({"dropout": True} | case.module),
    )
    data = make_data(prompts_per_iteration=4, shuffle=True, val_data=VAL)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    end = end_of(trainer, module)
    if trainer.is_global_zero:
        torch.save(end, folder / "end.pt")


def end_of(trainer: L.Trainer, module: GRPOModule) -> dict[str, Any]:
    """Everything that a run ends with, whole; every rank has to call it."""
    optimizer = trainer.optimizers[0]
    named = dict(module.named_parameters())
    switching = [c for c in trainer.callbacks if type(c).__name__ == "AlgorithmSwitch"]  # type: ignore[attr-defined]
    return {
        "weights": {name: whole(p) for name, p in named.items()},
        "moments": {
            f"{name}/{key}": whole(value)
            for name, p in named.items()
            for key, value in optimizer.state.get(p, {}).items()
        },
        "rates": [group["lr"] for group in optimizer.param_groups],
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "counters": dataclasses.asdict(module.counters),
        "beta": module.beta,
        "stage": module.stage,
        "switching": [c.state.state_dict() for c in switching],
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state(),
        "prompts": trainer.datamodule.state_dict(),  # type: ignore[attr-defined]
    }


# Processes


def run_child(folder: Path, job: Callable[[], None], num_ranks: int = 1) -> list[int]:
    """Fork a process for each rank, and return how each ended: an exit code, or minus a signal."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _be_child(folder, job, rank if num_ranks > 1 else None, port)
        children.append(child)
    ends = []
    for child in children:
        _, status = os.waitpid(child, 0)
        ends.append(os.waitstatus_to_exitcode(status))
    return ends


def _be_child(folder: Path, job: Callable[[], None], rank: int | None, port: int) -> None:
    code = 1
    try:
        sys.stdout = sys.stderr = output = (folder / f"output-{rank or 0}.txt").open("a")
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.dump_traceback_later(TIMEOUT_S, exit=True, file=sys.stderr)
        if rank is not None:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "GLOO_SOCKET_IFNAME": "lo",
            }
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        job()
        code = 0
    except SIGTERMException:
        code = 143
    except BaseException as error:
        # A reward function's own error is the cause of the one that names the function.
        is_meant = isinstance(error, Stopped) or isinstance(error.__cause__, Stopped)
        code = 3 if is_meant else 1
        if not is_meant:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


EXIT_CODES = {"sigterm": 143, "sigkill": -9, "exception": 3}


def stop_and_resume(model: str, name: str, folder: Path, stop: Stop) -> None:
    """Stop the run of a case, and go on with it in another process; raises if that fails."""
    case = CASES[name]
    num_ranks = 1 if case.strategy == "single" else 2

    def begin() -> None:
        STOPPER.stop = stop
        fit(model, case, folder)

    ends = run_child(folder, begin, num_ranks)
    expected = EXIT_CODES[stop.how]
    if ends == [0] * num_ranks and stop.how == "sigterm" and (folder / "end.pt").exists():
        return  # it came when nothing but the end was left to do
    # The other rank of an error of one says that another failed.
    assert expected in ends and 0 not in ends, f"{name}: {stop} ended with {ends}"
    last = f"{folder}/checkpoints/last"
    ckpt_path = last if has_checkpoints(f"{folder}/checkpoints", "last") else None
    ends = run_child(folder, lambda: fit(model, case, folder, ckpt_path), num_ranks)
    assert ends == [0] * num_ranks, f"{name}: resumed from {stop} ended with {ends}"


# What runs end with


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what times say."""
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [
        {k: v for k, v in row.items() if v and not k.startswith(("time/", "throughput/"))}
        for row in rows
    ]


def differences(found: Path, expected: Path) -> list[str]:
    """What two runs ended with and does not agree, bit for bit."""
    mine, theirs = (torch.load(f / "end.pt", weights_only=False) for f in (found, expected))
    wrong = [name for name in theirs if not same(mine[name], theirs[name])]
    rows, expected_rows = rows_of(found), rows_of(expected)
    if rows != expected_rows:
        pairs = enumerate(zip(rows, expected_rows, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(rows), len(expected_rows)))
        wrong.append(f"row {first} of {len(rows)} and {len(expected_rows)}")
    for file in sorted((expected / "samples").iterdir()):
        other = found / "samples" / file.name
        if not other.exists() or other.read_text() != file.read_text():
            wrong.append(f"samples {file.name}")
            break
    for name in ("switches.jsonl",):
        texts = [(f / name).read_text() if (f / name).exists() else "" for f in (found, expected)]
        if texts[0] != texts[1]:
            wrong.append(name)
    return wrong


def same(mine: Any, theirs: Any) -> bool:
    """Whether two values are the same, tensors bit for bit."""
    if isinstance(theirs, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(same(mine[k], theirs[k]) for k in theirs)
    return bool(mine == theirs)


def whole_run(model: str, name: str, folder: Path) -> Path:
    """The run of a case that nothing stops, and how often it came by each moment."""
    case = CASES[name]

    def job() -> None:
        fit(model, case, folder)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            (folder / "moments.json").write_text(json.dumps(STOPPER.seen))

    num_ranks = 1 if case.strategy == "single" else 2
    ends = run_child(folder, job, num_ranks)
    assert ends == [0] * num_ranks, (folder / "output-0.txt").read_text()[-3000:]
    return folder


def check(model: str, name: str, expected: Path, folder: Path, stop: Stop) -> list[str]:
    """Stop and resume a run, and compare it with the one that nothing stopped."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    stop_and_resume(model, name, folder, stop)
    return differences(folder, expected)
