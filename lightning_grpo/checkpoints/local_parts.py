"""What one rank holds of sharded tensors, and filling it from a checkpoint of any sharding."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_grpo.checkpoints.shards import TensorSet
from lightning_grpo.checkpoints.tensor_file import Shard as Part


def local_box(tensor: DTensor) -> Part:
    """Which part of a sharded tensor this rank holds.

    Args:
        tensor: on a mesh of one dimension, sharded along one of its own dimensions or not at all.

    Returns:
        Shape of the whole, and offsets of this rank's part.

    Raises:
        ValueError: it is laid out in another way.
    """
    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    placement = tensor.placements[0]
    offsets = [0] * len(shape)
    expected = list(shape)
    if type(placement) is Shard:
        size = shape[placement.dim]
        length = -(-size // mesh.size())  # as torch.chunk does it, the last ranks may hold less
        offsets[placement.dim] = min(mesh.get_local_rank() * length, size)
        expected[placement.dim] = min(length, size - offsets[placement.dim])
    is_known = type(placement) is Shard or placement.is_replicate()
    if mesh.ndim != 1 or not is_known or list(tensor.to_local().shape) != expected:
        raise ValueError(
            f"a tensor laid out as {tensor.placements} on a mesh of {mesh.ndim} dimensions cannot "
            "be saved: only FSDP2 over data-parallel ranks is known"
        )
    return Part(shape, tuple(offsets))


def localize(tree: Any, parts: dict[int, Part]) -> Any:
    """A tree in which each sharded tensor is replaced by what this rank holds of it.

    Args:
        tree: of dicts, lists, tuples and leaves.
        parts: takes up, under the identity of the tensor in the new tree, which part it is. What
            every rank holds as a whole is not in it.

    Returns:
        The tree; nothing is copied.
    """
    kind = type(tree)
    if kind in (dict, OrderedDict):
        return kind((key, localize(value, parts)) for key, value in tree.items())
    if kind in (list, tuple):
        return kind(localize(value, parts) for value in tree)
    if not isinstance(tree, DTensor):
        return tree
    tensor: Any = tree.detach()
    part = local_box(tensor)
    local: Tensor = tensor.to_local()
    if local.shape != tensor.shape:
        parts[id(local)] = part
    return local


@torch.no_grad()
def fill(target: Tensor, name: str, saved: TensorSet) -> None:
    """Copy into a tensor what a checkpoint has for this rank.

    Args:
        target: sharded or not; changed in place.
        name: under which it was saved.
        saved: the tensors of the checkpoint.

    Raises:
        ValueError: it was saved in another shape.
    """
    shape = saved.info[name].shape
    if shape != tuple(target.shape):
        raise ValueError(
            f"the checkpoint has {name} of shape {shape}, and this run of {tuple(target.shape)}"
        )
    if isinstance(target, DTensor):
        mine: Any = target.detach()
        offsets, local = local_box(mine).offsets, mine.to_local()
        local.copy_(saved.read_box(name, offsets, local.shape))
    else:
        target.copy_(saved.read(name))


def moment(parameter: Tensor, name: str, saved: TensorSet) -> Tensor:
    """What a checkpoint has of an optimizer's state of one parameter, laid out as that is.

    Args:
        parameter: sharded or not.
        name: of the state, such as "<parameter>/exp_avg".
        saved: the tensors of the checkpoint.

    Returns:
        A tensor of its own, on the parameter's device if it has its shape.

    Raises:
        ValueError: the state is neither as large as the parameter nor a single number.
    """
    dtype, shape, _ = saved.info[name]
    if shape == tuple(parameter.shape):
        result = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        fill(result, name, saved)
        return result
    if len(shape) > 1 or shape not in ((), (1,)):
        raise ValueError(
            f"the optimizer's state {name} has shape {shape} and its parameter "
            f"{tuple(parameter.shape)}: an optimizer with such states cannot be sharded"
        )
    return saved.read(name).clone()
