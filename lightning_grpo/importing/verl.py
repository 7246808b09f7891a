"""Checkpoints of verl's FSDP workers: one file of torch.save for each rank.

model_world_size_<W>_rank_<r>.pt    the rank's part of each tensor, as DTensor or ShardedTensor
huggingface/                        configuration and tokenizer
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.importing.lazy import Box, LazyTensor, Weights, assemble
from lightning_grpo.importing.torch_files import (
    RANK_CLASSES,
    RankTensor,
    Record,
    load_torch_file,
)

_FILE_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


def is_verl(folder: Path) -> bool:
    """Whether a folder holds files of verl's ranks."""
    return any(_FILE_NAME.fullmatch(path.name) for path in folder.iterdir())


def read_verl(folder: Path) -> Weights:
    """The tensors of all ranks of a checkpoint, whole again.

    Args:
        folder: `actor` or `critic` of a checkpoint of verl.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: a rank is missing, a file is refused, or the parts do not fit.
    """
    ranks = [load_torch_file(path, RANK_CLASSES) for path in _rank_files(folder)]
    if not all(isinstance(rank, dict) and rank.keys() == ranks[0].keys() for rank in ranks):
        raise ValueError(f"{folder}: the files of its ranks do not hold the same tensors")
    return {name: _lazy(f"{folder}: {name}", [rank[name] for rank in ranks]) for name in ranks[0]}


def _rank_files(folder: Path) -> list[Path]:
    found: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := _FILE_NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    if len(found) != 1:
        raise ValueError(f"{folder} holds saves of {sorted(found)} ranks: leave one of them there")
    [(num_ranks, files)] = found.items()
    if missing := [rank for rank in range(num_ranks) if rank not in files]:
        raise ValueError(
            f"{folder} lacks the files of the ranks {missing}: collect those of all machines"
        )
    return [files[rank] for rank in range(num_ranks)]


def _lazy(name: str, parts: list[Any]) -> LazyTensor:
    kinds = {type(part) for part in parts}
    first = parts[0]
    try:
        if kinds == {RankTensor}:
            saved = [part.saved for part in parts]
            shape = tuple(first.shape)
            boxes = list(_sharded_boxes(saved) if saved[0].items else _dtensor_boxes(shape, saved))
            return LazyTensor(first.dtype, shape, lambda: assemble(name, first.dtype, shape, boxes))
        if kinds <= {Tensor, torch.nn.Parameter}:
            return LazyTensor(first.dtype, tuple(first.shape), lambda: _same(name, parts))
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{name} is in a form that is not known ({error!r})") from error
    raise ValueError(f"{name} is a {', '.join(sorted(kind.__name__ for kind in kinds))}")


def _same(name: str, parts: list[Tensor]) -> Tensor:
    """A tensor that every rank has a copy of."""
    if not all(torch.equal(parts[0], part) for part in parts[1:]):
        raise ValueError(f"{name} is whole on every rank, and not the same on all")
    return parts[0].detach()


def _sharded_boxes(parts: list[Record]) -> Iterator[Box]:
    for part in parts:
        for shard in part.items[0]:
            yield tuple(shard.fields["metadata"].fields["shard_offsets"]), shard.fields["tensor"]


def _dtensor_boxes(shape: tuple[int, ...], parts: list[Record]) -> Iterator[Box]:
    coordinates = [_coordinate(part, rank) for rank, part in enumerate(parts)]
    mesh_shape = [max(along) + 1 for along in zip(*coordinates)]
    if math.prod(mesh_shape) != len(parts):
        raise ValueError(f"{len(parts)} ranks do not fill a mesh of {mesh_shape}")
    for part, coordinate in zip(parts, coordinates):
        placements = part.fields["_spec"].fields["placements"]
        offsets, sizes = _box(shape, placements, coordinate, mesh_shape)
        local = part.fields["_local_tensor"]
        if local.numel() == math.prod(sizes) == 0:
            continue
        if tuple(local.shape) != sizes:
            raise ValueError(f"a rank's part has shape {tuple(local.shape)} and not {sizes}")
        yield offsets, local


def _coordinate(part: Record, rank: int) -> tuple[int, ...]:
    """Where in the mesh a rank is; versions of torch differ in all else that they save of it."""
    found = part.fields["_spec"].fields["mesh"].fields.get("_coordinate_on_dim")
    if found is not None:
        return tuple(found)
    if len(part.fields["_spec"].fields["placements"]) == 1:
        return (rank,)
    raise ValueError("its mesh does not say where the ranks are")


def _box(
    shape: tuple[int, ...],
    placements: tuple[Record, ...],
    coordinate: tuple[int, ...],
    mesh_shape: list[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of what a rank holds of a tensor; chunks are those of torch.chunk."""
    offsets, sizes = [0] * len(shape), list(shape)
    for placement, index, num_chunks in zip(placements, coordinate, mesh_shape, strict=True):
        if placement.kind == "Replicate":
            continue
        if placement.kind != "Shard":
            raise ValueError(f"tensors placed as {placement.kind} are not read")
        dim = placement.fields["dim"] if placement.fields else placement.args[0]
        length = sizes[dim]
        chunk = -(-length // num_chunks)
        begin = min(chunk * index, length)
        offsets[dim] += begin
        sizes[dim] = min(chunk, length - begin)
    return tuple(offsets), tuple(sizes)
