"""The frozen reference: where its weights come from, and that they stay the same."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from upath import UPath

from lightning_grpo.distributed import HasSum, failing_together
from lightning_grpo.policy import Policy
from lightning_grpo.snapshot import WeightSnapshot

_FILE_NAME = "reference.safetensors"


class Reference:
    """The policy as it was before reinforcement learning.

    A LoRA policy with its adapter off costs nothing. Otherwise the weights are a snapshot, which
    stands in for the policy's own while a reference pass runs.

    Args:
        policy: at its initial weights.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.snapshot = None if policy.is_lora else WeightSnapshot(policy)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The policy with the reference's weights. Enter it outside of autocast."""
        with self.policy.adapter(None) if self.snapshot is None else self.snapshot.in_place():
            yield

    def retake(self) -> None:
        """Make the policy as it is now the reference, after a cold start."""
        self.snapshot = WeightSnapshot(self.policy)


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of the names.

    Args:
        tensors: name -> tensor, on any device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def trainable_state(policy: Policy) -> dict[str, Tensor]:
    """The whole trainable weights on the CPU of rank 0; empty elsewhere under FSDP2.

    Every rank has to call it.

    Args:
        policy: sharded or not.

    Returns:
        Name -> full tensor.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(policy, options=options)
    return {name: tensor for name, tensor in state.items() if name in policy.trainable_names}


def save_reference(
    policy: Policy, folder: UPath, *, is_writer: bool, ranks: HasSum
) -> dict[str, str]:
    """Write the policy's weights as the reference of a run whose reference no folder holds.

    A full model is written as a transformers folder, an adapter as one safetensors file. Every
    rank has to call it.

    Args:
        policy: at the reference's weights.
        folder: where to write.
        is_writer: whether this rank writes.
        ranks: adds over the ranks, which fail together.

    Returns:
        Folder name and hash for the checkpoint; on other ranks the hash is empty.
    """
    state = trainable_state(policy)
    with failing_together(ranks, "writing the reference"):
        if is_writer:
            with _written_locally(folder) as local:
                if policy.is_lora:
                    save_file({k: v.contiguous() for k, v in state.items()}, local / _FILE_NAME)
                else:
                    inner = {name.removeprefix("model."): value for name, value in state.items()}
                    policy.causal_lm.save_pretrained(local, state_dict=inner)
    return {"folder": folder.name, "sha256": weights_hash(state) if is_writer else ""}


@contextlib.contextmanager
def _written_locally(folder: UPath) -> Iterator[Path]:
    """A local folder whose files are in `folder` afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as staging:
        yield Path(staging)
        for file in sorted(Path(staging).iterdir()):
            with file.open("rb") as source, (folder / file.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)


def read_reference(
    policy: Policy, folder: UPath, sha256: str, *, is_checker: bool
) -> dict[str, Tensor]:
    """Read a reference that `save_reference` wrote, and check that it is the same.

    Args:
        policy: what it is a reference of.
        folder: as written.
        sha256: the hash from the checkpoint.
        is_checker: whether this rank computes the hash.

    Returns:
        Name -> full tensor.

    Raises:
        ValueError: the folder is missing, or its weights are not the ones the run started with.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"the run's reference is missing: no safetensors in {folder}")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file) if isinstance(file, Path) else load(file.read_bytes()))
    if not policy.is_lora:
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    if is_checker and weights_hash(state) != sha256:
        raise ValueError(
            f"the reference in {folder} is not the one this run started with (its hash differs)"
        )
    return state


def place_reference(reference: Reference, state: dict[str, Tensor]) -> None:
    """Put full weights into a reference, each rank its part. Every rank has to call it.

    Args:
        reference: gets the weights.
        state: name -> full tensor.
    """
    snapshot = reference.snapshot or WeightSnapshot(reference.policy)
    snapshot.put(state)
    reference.snapshot = snapshot


def settle_reference(
    reference: Reference,
    record: dict[str, str],
    *,
    folder: UPath,
    initial_hash: str,
    origin: Literal["pretrained", "random", "cold_start"],
    is_main: bool,
    ranks: HasSum,
) -> dict[str, str]:
    """Decide what the reference of this run is, once per process, before the first step.

    Every rank has to call it.

    Args:
        reference: holds the initial weights.
        record: what the checkpoint says of the reference; empty in a new run.
        folder: where a reference is kept that the model's own folder does not hold.
        initial_hash: hash of the weights that the model's folder gave.
        origin: where the weights of a new run come from.
        is_main: whether this is the rank that writes and checks.
        ranks: adds over the ranks, which fail together.

    Returns:
        The record for later checkpoints: folder ("" for the model's own) and sha256.

    Raises:
        ValueError: a resumed run would get another reference than it started with.
    """
    if record and record["folder"]:
        with failing_together(ranks, "reading the reference"):
            state = read_reference(reference.policy, folder, record["sha256"], is_checker=is_main)
        place_reference(reference, state)
        return record
    if record:
        with failing_together(ranks, "checking the reference"):
            if is_main and record["sha256"] != initial_hash:
                raise ValueError(
                    "model.name_or_path does not hold the weights that this run's reference "
                    "had: resume with the model that the run started from"
                )
        return record
    if origin == "pretrained":
        return {"folder": "", "sha256": initial_hash}
    if origin == "cold_start":
        reference.retake()
    return save_reference(reference.policy, folder, is_writer=is_main, ranks=ranks)


def frozen_reference_hash(policy: Policy) -> str:
    """Hash of the weights that the reference will have: the base under LoRA, else all."""
    trainable = policy.trainable_names
    named = policy.named_parameters()
    return weights_hash({n: p for n, p in named if (n in trainable) != policy.is_lora})
