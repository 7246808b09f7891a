"""Tensors that are known by type and shape, and read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read each time it is asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of its content."""
        return math.prod(self.shape) * self.dtype.itemsize


Weights = dict[str, LazyTensor]
Box = tuple[tuple[int, ...], Tensor]
"""Index in the whole of a part's first element, and the part."""


def of_tensor(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already, such as a view of a mapped file."""
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach())


def assemble(name: str, dtype: torch.dtype, shape: tuple[int, ...], boxes: Iterable[Box]) -> Tensor:
    """Put a tensor together from its parts.

    Args:
        name: of the tensor, for the error.
        dtype: of the whole.
        shape: of the whole.
        boxes: its parts, in any order; the same part may come from several ranks.

    Returns:
        The whole; the part itself when one is all of it.

    Raises:
        ValueError: the parts do not fit, or leave a gap.
    """
    whole: Tensor | None = None
    covered: set[tuple[int, ...]] = set()
    num_elements = 0
    for offsets, part in boxes:
        ends = [begin + length for begin, length in zip(offsets, part.shape)]
        if (
            part.dtype != dtype
            or not len(offsets) == part.dim() == len(shape)
            or min(offsets, default=0) < 0
            or any(end > length for end, length in zip(ends, shape))
        ):
            raise ValueError(
                f"{name}: a part of {part.dtype} and shape {tuple(part.shape)} at {offsets} does "
                f"not fit into {dtype} of shape {shape}"
            )
        if part.numel() == 0 or offsets in covered:
            continue
        if tuple(part.shape) == shape:
            return part
        if whole is None:
            whole = torch.empty(shape, dtype=dtype)
        whole[tuple(slice(b, e) for b, e in zip(offsets, ends))] = part
        covered.add(offsets)
        num_elements += part.numel()
    if whole is None:
        whole = torch.empty(shape, dtype=dtype)
    if num_elements != whole.numel():
        raise ValueError(
            f"{name}: its parts hold {num_elements} elements of {whole.numel()}; a file is missing "
            "or of another save"
        )
    return whole
