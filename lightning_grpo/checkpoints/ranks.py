"""Saving and loading by all ranks together: each its own shards, and none goes on alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grpo.checkpoints.draft import Draft
from lightning_grpo.checkpoints.errors import BrokenCheckpointError, failed_write
from lightning_grpo.checkpoints.folder import resolve_checkpoint
from lightning_grpo.checkpoints.io import manifest_of, sections_of
from lightning_grpo.checkpoints.local_parts import fill, localize, moment
from lightning_grpo.checkpoints.manifest import Metric
from lightning_grpo.checkpoints.optimizer_names import parameter_names, with_numbers
from lightning_grpo.checkpoints.places import FileRecord, locate
from lightning_grpo.checkpoints.store import (
    STATE,
    Checkpoint,
    Sections,
    TensorName,
    open_checkpoint,
)
from lightning_grpo.checkpoints.tensor_file import Shard

Result = TypeVar("Result")


def together(action: Callable[[], Result], what: str) -> list[Result]:
    """Do something on every rank, and raise on every rank when it fails on any.

    Args:
        action: holds no exchange between the ranks; returns something small.
        what: what is done, for the message on the other ranks.

    Returns:
        What it returned on each rank.

    Raises:
        RuntimeError: it failed on another rank.
    """
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others have to hear of it
        failure = error
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, (result, told))
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(outcomes):
        if text is not None:
            raise RuntimeError(f"rank {rank} failed while {what}: {text}")
    return [outcome for outcome, _ in outcomes]


def save_sharded(url: str, checkpoint: dict[str, Any], metric: Metric | None) -> None:
    """Write a checkpoint of which each rank writes its shards. Every rank has to call it.

    Args:
        url: where nothing is yet; all ranks have to reach it.
        checkpoint: of Lightning; what is not sharded in it counts as rank 0 has it.
        metric: for which it is kept, if any.

    Raises:
        OSError: this rank could not write; the checkpoints before it are as they were.
        RuntimeError: another rank could not.
    """
    what = f"saving {url}"
    is_first = torch.distributed.get_rank() == 0
    drafts: list[Draft] = []

    def begin() -> str:
        if is_first:
            drafts.append(Draft.begin(url))
        return str(drafts[0].folder) if is_first else ""

    def commit(records: list[dict[str, FileRecord]]) -> None:
        if is_first:
            files = {name: record for found in records for name, record in found.items()}
            manifest = manifest_of(checkpoint, drafts[0].target, metric)
            drafts[0].commit(replace(manifest, files=files))

    try:
        folder = together(begin, what)[0]
        draft = drafts[0] if is_first else Draft(locate(url), locate(folder))
        records = together(lambda: write_parts(draft, sections_of(checkpoint)), what)
        together(lambda: commit(records), what)
    except BaseException as error:
        if drafts:
            drafts[0].abandon()
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            raise failed_write(error, url) from error
        raise


def write_parts(draft: Draft, sections: Sections) -> dict[str, FileRecord]:
    """Write what this rank holds of a checkpoint; rank 0 also writes what is not sharded.

    Args:
        draft: of all ranks.
        sections: with sharded tensors.

    Returns:
        Name -> record of the files that this rank wrote.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts: dict[int, Shard] = {}
    trees = (sections.state, sections.weights, sections.optimizers)
    text, tensors = Sections(*(localize(tree, parts) for tree in trees)).encode()
    for section, found in tensors.items():
        shards = {name: parts[id(t)] for name, t in found.items() if id(t) in parts}
        mine = {
            name: tensor
            for name, tensor in found.items()
            if (tensor.numel() > 0 if name in shards else rank == 0)
        }
        suffix = f"-{rank:05d}-of-{num_ranks:05d}" if shards else ""
        if mine or rank == 0:
            draft.add_tensors(f"{section}{suffix}.safetensors", mine, shards)
    if rank == 0:
        draft.add_bytes(STATE, text)
    return draft.records


def load_sharded(
    url: str, module: nn.Module, optimizers: Sequence[Optimizer] | None
) -> dict[str, Any]:
    """Load what this rank holds of a checkpoint of any number of ranks. Every rank has to call it.

    Args:
        url: as `resolve_checkpoint` takes it.
        module: changed in place.
        optimizers: changed in place; None to load weights only, where the checkpoint may have
            others besides.

    Returns:
        All that is neither weights nor moments.

    Raises:
        ValueError: it holds other weights or parameters than this run.
        BrokenCheckpointError: a file is damaged.
        RuntimeError: another rank failed.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    what = f"loading {url}"
    found = together(lambda: resolve_checkpoint(url) if rank == 0 else "", what)[0]
    state: dict[str, Any] = {}

    def load() -> None:
        checkpoint = open_checkpoint(found)
        names = checkpoint.file_names("weights")
        if optimizers is not None:
            names += checkpoint.file_names("optimizer")
        for name in names[rank::num_ranks]:  # the hashes of the others are the other ranks' work
            if problem := checkpoint.problem_of(name):
                raise BrokenCheckpointError(problem)
        load_weights(checkpoint, module, is_exact=optimizers is not None)
        if optimizers is not None:
            load_optimizers(checkpoint, module, optimizers)
        state.update(checkpoint.read_state())

    together(load, what)
    return state


def load_weights(checkpoint: Checkpoint, module: nn.Module, *, is_exact: bool) -> None:
    """Fill a module's weights.

    Args:
        checkpoint: sharded or not.
        module: sharded or not; changed in place.
        is_exact: refuse a checkpoint that has weights besides.

    Raises:
        ValueError: it has none for some, or has others besides.
    """
    saved = checkpoint.tensors("weights")
    own = {n: value for n, value in module.state_dict().items() if isinstance(value, Tensor)}
    lacking = sorted(own.keys() - saved.info.keys())
    unknown = sorted(saved.info.keys() - own.keys()) if is_exact else []
    if lacking or unknown:
        raise ValueError(
            f"{checkpoint.url} does not fit this run's model: it lacks {lacking[:3]} and has "
            f"{unknown[:3]} besides ({len(lacking)} and {len(unknown)} in all)"
        )
    for name, value in own.items():
        fill(value, name, saved)


def load_optimizers(
    checkpoint: Checkpoint, module: nn.Module, optimizers: Sequence[Optimizer]
) -> None:
    """Fill the states of a module's optimizers.

    Args:
        checkpoint: sharded or not.
        module: with the parameters of the optimizers.
        optimizers: changed in place.

    Raises:
        ValueError: they were saved for other parameters, or not at all.
    """
    outlines = checkpoint.read_optimizer_outlines()
    if outlines is None or len(outlines) != len(optimizers):
        raise ValueError(
            f"{checkpoint.url} holds {len(outlines or [])} optimizers, and this run has "
            f"{len(optimizers)}"
        )
    saved = checkpoint.tensors("optimizer")

    def filled(values: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        return {
            key: moment(parameter, value, saved) if isinstance(value, TensorName) else value
            for key, value in values.items()
        }

    for optimizer, outline in zip(optimizers, outlines):
        outline = with_numbers(outline, parameter_names(optimizer, module.named_parameters()))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {n: filled(values, parameters[n]) for n, values in outline["state"].items()}
        optimizer.load_state_dict({**outline, "state": state})
