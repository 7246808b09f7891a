"""Tensors whose parts lie in several files: whole again, or any box out of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.checkpoints.errors import BrokenCheckpointError
from lightning_grpo.checkpoints.tensor_file import Entry, Shard, TensorFile


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    files: tuple[str, ...]
    """Names of the files that hold it or parts of it."""


class Part(NamedTuple):
    """A box of a tensor, and where it is."""

    file: TensorFile
    entry: Entry
    offsets: tuple[int, ...]


class TensorSet:
    """The tensors of some files, of which each may hold parts of them.

    Args:
        files: all that belong together.

    Raises:
        BrokenCheckpointError: the parts of a tensor do not make up a whole.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.files = list(files)
        self.info: dict[str, TensorInfo] = {}
        self._parts: dict[str, list[Part]] = {}
        for file in files:
            for name, stored in [*zip(file.entries, file.entries), *file.aliases.items()]:
                self._add(name, file, file.entries[stored], file.shards.get(stored))
        for name, parts in self._parts.items():
            self._check(name, parts)

    @property
    def is_sharded(self) -> bool:
        """Whether any tensor is in parts."""
        return len(self.files) > 1 or any(file.shards for file in self.files)

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        shape = self.info[name].shape
        return self.read_box(name, (0,) * len(shape), shape)

    def read_box(self, name: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box out of a tensor; of the parts outside of it nothing is read.

        Args:
            name: of the tensor.
            offsets: index of the first element of the box.
            shape: of the box.

        Returns:
            The box; a view of a file if it lies in one local file.
        """
        parts = self._parts[name]
        overlaps = [_overlap(part, offsets, shape) for part in parts]
        touched = [(part, overlap) for part, overlap in zip(parts, overlaps) if overlap is not None]
        if len(touched) == 1:
            return _read_overlap(name, *touched[0])
        box = torch.empty(tuple(shape), dtype=self.info[name].dtype)
        for part, overlap in touched:
            begin = [o - start for o, start in zip(overlap.offsets, offsets)]
            target = box[tuple(slice(b, b + n) for b, n in zip(begin, overlap.shape))]
            target.copy_(_read_overlap(name, part, overlap))
        return box

    def _add(self, name: str, file: TensorFile, entry: Entry, shard: Shard | None) -> None:
        shape = entry.shape if shard is None else shard.shape
        offsets = (0,) * len(shape) if shard is None else shard.offsets
        known = self.info.get(name, TensorInfo(entry.dtype, shape, ()))
        ends = [o + n for o, n in zip(offsets, entry.shape)]
        if (
            known[:2] != (entry.dtype, shape)
            or not len(offsets) == len(entry.shape) == len(shape)
            or any(end > length for end, length in zip(ends, shape))
        ):
            raise BrokenCheckpointError(f"{file.place}: its part of {name} does not fit the others")
        self.info[name] = known._replace(files=(*known.files, file.place.name))
        self._parts.setdefault(name, []).append(Part(file, entry, offsets))

    def _check(self, name: str, parts: Sequence[Part]) -> None:
        covered = sum(math.prod(part.entry.shape) for part in parts)
        is_whole = covered == math.prod(self.info[name].shape)
        if not is_whole or len({part.offsets for part in parts}) < len(parts):
            files = ", ".join(str(part.file.place) for part in parts)
            raise BrokenCheckpointError(f"the parts of {name} in {files} make up no whole")


def _overlap(part: Part, offsets: Sequence[int], shape: Sequence[int]) -> Shard | None:
    """The box that a part and a wanted box have in common: its shape, and its offsets."""
    begins = [max(a, b) for a, b in zip(part.offsets, offsets)]
    ends = [
        min(a + n, b + m)
        for a, n, b, m in zip(part.offsets, part.entry.shape, offsets, shape)
    ]  # fmt: skip
    lengths = [end - begin for begin, end in zip(begins, ends)]
    if min(lengths, default=1) <= 0:
        return None
    return Shard(tuple(lengths), tuple(begins))


def _read_overlap(name: str, part: Part, overlap: Shard) -> Tensor:
    if not overlap.shape:
        return part.file.read(name)
    begins = [o - start for o, start in zip(overlap.offsets, part.offsets)]
    rows = part.file.read(name, (begins[0], begins[0] + overlap.shape[0]))
    inner = [slice(b, b + n) for b, n in zip(begins[1:], overlap.shape[1:])]
    index = (slice(None), *inner)
    box: Tensor = rows[index]
    return box
