"""Checkpoints of two ranks: each writes its shards, and any number of ranks reads them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_runs import on_two_ranks, whole
from test_checkpoint_store import equal
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_grpo.checkpoints import Metric, list_checkpoints, open_checkpoint
from lightning_grpo.checkpoints import files as checkpoint_files
from lightning_grpo.checkpoints.io import FolderCheckpointIO
from lightning_grpo.checkpoints.optimizer_names import parameter_names, with_names, with_numbers
from lightning_grpo.checkpoints.sharded import ShardedStrategy


class Toy(L.LightningModule):
    """Rows that do not divide by two, a single row, tied weights, and an optimizer group of none."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.width = width
        self.embed: nn.Embedding | None = None

    def configure_model(self) -> None:
        if self.embed is not None:
            return
        torch.manual_seed(1)
        self.embed = nn.Embedding(7, self.width)
        self.head = nn.Linear(self.width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.layer = nn.Linear(self.width, self.width)
        self.value = nn.Linear(7, 1)
        self.register_buffer("scale", torch.tensor([1.5]))
        if self.device_mesh is not None:
            for part in (self.layer, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, ids: Any) -> Any:
        return self.value(self.head(torch.tanh(self.layer(self.embed(ids))))) * self.scale

    def training_step(self, ids: Any, batch_idx: int) -> Any:
        return (self(ids) - ids.unsqueeze(1)).square().mean()

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.parameters()), "name": "policy"},
            {"params": [], "name": "critic"},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = parameter_names(self.trainer.optimizers[0], self.named_parameters())
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [with_names(state, names) for state in states]
        checkpoint["rank"] = self.global_rank

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "optimizer_states" in checkpoint:  # there is no optimizer yet
            names = [name for name, _ in self.named_parameters()]
            states = checkpoint["optimizer_states"]
            checkpoint["optimizer_states"] = [with_numbers(state, names) for state in states]


class InFolders(L.Callback):
    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        trainer.strategy.checkpoint_io = FolderCheckpointIO()


def train(num_steps: int, ckpt_path: Path | None = None, width: int = 5, **options: Any) -> Any:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=num_steps, callbacks=[InFolders()], **quiet, **options
    )
    module = Toy(width)
    trainer.fit(module, DataLoader(torch.arange(7).repeat(4), batch_size=7), ckpt_path=ckpt_path)
    return trainer, module


def state_of(trainer: L.Trainer, module: Toy) -> dict[str, Any]:
    """Weights and moments as every rank sees them, whole."""
    optimizer = trainer.optimizers[0]
    names = parameter_names(optimizer, module.named_parameters())
    state = with_names(optimizer.state_dict(), names)
    return {
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "moments": {
            name: {key: whole(value) for key, value in values.items()}
            for name, values in state["state"].items()
        },
        "groups": state["param_groups"],
    }


def sharded() -> dict[str, Any]:
    return {"strategy": ShardedStrategy(), "devices": 2, "use_distributed_sampler": False}


def error_of(action: Any, *args: Any) -> str:
    try:
        action(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class FullDisk:
    """The module `os` on a disk that is full when the n-th file is begun."""

    def __init__(self, num_files: int) -> None:
        self.num_files = num_files

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, *args: Any) -> int:
        if flags & os.O_CREAT:
            self.num_files -= 1
            if self.num_files < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.open(path, flags, *args)


def fail_on(rank: int, trainer: L.Trainer, path: Path, num_files: int) -> str:
    """Save while the disk of one rank is full; what that says."""
    if trainer.global_rank == rank:
        checkpoint_files.os = FullDisk(num_files)
    try:
        return error_of(trainer.save_checkpoint, path)
    finally:
        checkpoint_files.os = os


def on_ranks(folder: Path, plain: Path) -> dict[str, Any]:
    """All that two ranks are needed for, in one pair of processes."""
    trainer, module = train(3, **sharded())
    path = folder / "last-000003"
    trainer.save_checkpoint(path, storage_options=Metric("score", 0.25))
    found = {"saved": state_of(trainer, module)}
    trainer, module = train(6, **sharded())
    found["whole"] = state_of(trainer, module)
    trainer, module = train(6, path, **sharded())
    found["resumed"] = state_of(trainer, module)
    trainer, module = train(3, plain, **sharded())
    found["from_plain"] = state_of(trainer, module)
    found["again"] = error_of(trainer.save_checkpoint, path)
    found["full"] = {
        (rank, number): fail_on(rank, trainer, folder / "last-000009", number)
        for rank in range(2)
        for number in range([5, 2][rank])
    }
    found["left"] = sorted(os.listdir(folder))
    trainer.strategy.barrier()
    found["other_model"] = error_of(lambda: train(6, path, 6, **sharded()))
    damaged = folder / "best-000003"
    trainer.save_checkpoint(damaged)
    if trainer.global_rank == 0:
        file = damaged / "optimizer-00001-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    trainer.strategy.barrier()
    found["damaged"] = error_of(lambda: train(6, damaged, **sharded()))
    trainer.strategy.remove_checkpoint(damaged)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    trainer, module = train(3)
    trainer.save_checkpoint(folder / "plain/last-000003")
    first, second = on_two_ranks(on_ranks, folder, folder / "c", folder / "plain/last-000003")
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    return {
        "ranks": (first, second),
        "plain": state_of(trainer, module),
        "path": folder / "c/last-000003",
        "folder": folder / "c",
    }


def test_each_rank_writes_its_shards_and_nothing_is_pickled(runs):
    names = sorted(path.name for path in runs["path"].iterdir())
    assert names == [
        "manifest.json",
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
        "state.json",
        "state.safetensors",
        "weights-00000-of-00002.safetensors",
        "weights-00001-of-00002.safetensors",
    ]
    manifest = open_checkpoint(runs["path"], check_sha256=True).manifest
    assert (manifest.world_size, manifest.step, manifest.metric) == (2, 3, Metric("score", 0.25))
    sizes = [manifest.files[name].num_bytes for name in names if name.startswith("weights")]
    assert max(sizes) < 0.75 * sum(sizes)
    info = open_checkpoint(runs["path"]).tensor_info()
    assert info["embed.weight"].shape == (7, 5) and info["value.weight"].shape == (1, 7)
    assert info["scale"].files == ("weights-00000-of-00002.safetensors",)


def test_a_sharded_run_resumes_to_the_same_bits(runs):
    for found in runs["ranks"]:
        assert equal(found["resumed"], found["whole"])
        assert not equal(found["resumed"]["weights"], found["saved"]["weights"])


def test_one_process_reads_what_two_have_written(runs):
    back = FolderCheckpointIO().load_checkpoint(runs["path"])
    for found in runs["ranks"]:
        assert equal(back["state_dict"], found["saved"]["weights"])
        assert equal(back["optimizer_states"][0]["state"], found["saved"]["moments"])
        assert equal(back["optimizer_states"][0]["param_groups"], found["saved"]["groups"])
    assert back["rank"] == 0 and [g["name"] for g in back["optimizer_states"][0]["param_groups"]]
    trainer, module = train(3, runs["path"])
    assert equal(state_of(trainer, module), runs["ranks"][0]["saved"])


def test_two_processes_read_what_one_has_written(runs):
    for found in runs["ranks"]:
        assert equal(found["from_plain"], runs["plain"])


def test_a_rank_that_cannot_write_stops_both_and_leaves_nothing(runs):
    first, second = runs["ranks"]
    assert first["again"].startswith("FileExistsError")
    assert second["again"].startswith("RuntimeError: rank 0 failed while saving")
    for (rank, _), told in first["full"].items():
        other = second["full"][rank, _]
        own, others = (told, other) if rank == 0 else (other, told)
        assert "could not be written: No space left on device" in own
        assert others.startswith(f"RuntimeError: rank {rank} failed while saving")
    assert first["left"] == ["last-000003"]
    assert [c.url for c in list_checkpoints(runs["folder"])] == [str(runs["path"])]


def test_a_checkpoint_of_another_model_or_a_damaged_one_stops_all_ranks(runs):
    first, second = runs["ranks"]
    for found in (first, second):
        assert (
            "the checkpoint has embed.weight of shape (7, 5), and this run of (7, 6)"
            in (found["other_model"])
        )
        assert "optimizer-00001-of-00002.safetensors is damaged" in found["damaged"]
