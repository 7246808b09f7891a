"""Helpers for runs on two processes, and the callbacks with which tests look into a run."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Minibatch, MinibatchOutput, Rollout


def on_two_ranks(
    job: Callable[..., Any], folder: Path, *args: Any, timeout: float = 90, start: str = "spawn"
) -> list:
    """Call a top-level function in two processes that can find each other.

    Args:
        job: called with `args` on both ranks; what it returns goes through torch.save.
        folder: for what the ranks return.
        *args: of the job.
        timeout: seconds after which both are killed.
        start: how the processes begin; a fork has all modules already.

    Returns:
        What the job returned on rank 0 and on rank 1; an exception as its printed traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context(start)
    paths = [folder / f"rank_{rank}.pt" for rank in range(2)]
    ranks = [
        context.Process(target=_enter, args=(rank, port, job, args, str(paths[rank])), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + timeout
    try:
        for process in ranks:
            process.join(max(end - time.monotonic(), 0))
        assert all(p.exitcode is not None for p in ranks), f"still running after {timeout} s"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [torch.load(path, weights_only=False) for path in paths]


def _enter(rank: int, port: int, job: Callable[..., Any], args: Any, path: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    try:
        result = job(*args)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, path)
    if torch.distributed.is_initialized() and not isinstance(result, str):
        torch.distributed.destroy_process_group()


def strategy_options(name: str) -> dict[str, Any]:
    """Options of the Trainer for "single", or for "ddp" or "fsdp2" on two processes."""
    if name == "single":
        return {}
    if name == "ddp":
        return {"devices": 2, "strategy": "ddp"}
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"devices": 2, "strategy": strategy}


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered from all ranks if it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def weights_of(module: GRPOModule) -> dict[str, Tensor]:
    """Whole copies of all parameters."""
    return {name: whole(p) for name, p in module.policy.named_parameters()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and bits."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


class Perturb(L.Callback):
    """Adds the same noise to the weights in every run, so that the policy is not the reference."""

    def __init__(self, scale: float = 0.3) -> None:
        self.scale = scale

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        for name, parameter in module.policy.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise: Tensor = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter.add_(noise, alpha=self.scale)


class ShortenGroups(L.Callback):
    """Cuts the completions of the last groups to one token."""

    def __init__(self, first_group: int) -> None:
        self.first_group = first_group

    def on_rewards_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> Rollout:
        keep = (rollout.group_ids < self.first_group).unsqueeze(1).repeat(1, 64)
        keep[:, 0] = True
        mask = rollout.completion_mask & keep[:, : rollout.completion_mask.shape[1]]
        return rollout.replace(completion_mask=mask, action_mask=mask.clone())


class Record(L.Callback):
    """Keeps gradients, rollouts, minibatches and logged numbers of a run."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.num_microbatches: list[int] = []
        self.rollouts: list[Rollout] = []
        self.minibatches: list[Minibatch] = []
        self.outputs: list[MinibatchOutput] = []
        self.betas: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.num_validations = 0

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the module's `log` on a callback, and the module cannot travel.
        return {name: value for name, value in vars(self).items() if not callable(value)}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: GRPOModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [whole(p.grad) for p in module.policy.parameters() if p.grad is not None]
        if gradients:  # the policy rests while a critic warms up
            self.gradients.append(torch.cat([g.flatten() for g in gradients]))

    def on_minibatch_end(
        self, trainer: L.Trainer, module: GRPOModule, minibatch: Minibatch, output: MinibatchOutput
    ) -> None:
        self.num_microbatches.append(len(minibatch.microbatches))
        self.minibatches.append(minibatch)
        self.outputs.append(output)

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        self.rollouts.append(rollout)
        self.betas.append(module.beta)
        self.logged.append({name: float(v) for name, v in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        self.num_validations += 1
