"""The safetensors format, written and read as a stream: one tensor at a time is in hand.

A file is the length of a JSON header (8 bytes), the header, and the bytes of the tensors. The
library of that format reads these files and writes files that are read here; its own `save_file`
wants a dict of contiguous tensors in the CPU's memory, and writes to local disks only.

Two things of our own are in the header's `__metadata__`:

    aliases  JSON, {name: name}: a tensor with the same memory as another one is stored once
    shards   JSON, {name: {"shape": [...], "offsets": [...]}}: this is a part of a larger tensor
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from lightning_grpo.checkpoints.errors import BrokenCheckpointError
from lightning_grpo.checkpoints.files import (
    NewFile,
    Place,
    map_bytes,
    num_bytes,
    open_to_read,
    read_exactly,
)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # as in the library


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    num_bytes: int


@dataclass(frozen=True)
class Shard:
    """Which part of a larger tensor a tensor is."""

    shape: tuple[int, ...]
    """Of the whole."""
    offsets: tuple[int, ...]
    """Index in the whole of the part's first element."""


def write_tensors(
    file: NewFile, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard] | None = None
) -> None:
    """Write tensors, one after the other.

    Args:
        file: new and empty.
        tensors: name -> tensor, on any device; one at a time is copied where it has to be.
        shards: name -> what part it is, for those that are no whole tensors.

    Raises:
        TypeError: a tensor is of a kind that the format does not know.
    """
    stored, aliases = split_aliases(tensors)
    for name, tensor in stored.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(
                f"a checkpoint cannot hold the tensor {name} of {tensor.dtype}, {tensor.layout}, "
                f"on {tensor.device}"
            )
    # Large elements first, as the library does: every tensor then begins at a multiple of its own.
    ordered = sorted(stored.items(), key=lambda item: (-item[1].element_size(), item[0]))
    parts = {name: shard for name, shard in (shards or {}).items() if name in stored}
    text = _header_text(ordered, aliases, parts)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        if tensor.numel():
            file.write(_bytes_of(tensor))


def _header_text(
    ordered: Sequence[tuple[str, Tensor]], aliases: dict[str, str], shards: Mapping[str, Shard]
) -> bytes:
    metadata: dict[str, str] = {}
    if aliases:
        metadata["aliases"] = json.dumps(aliases)
    if shards:
        metadata["shards"] = json.dumps(
            {n: {"shape": shard.shape, "offsets": shard.offsets} for n, shard in shards.items()}
        )
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def split_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find tensors that are the same memory, such as tied weights.

    Args:
        tensors: name -> tensor.

    Returns:
        Those to store, and name -> name of the stored one for all others.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.numel() and tensor.layout == torch.strided and not tensor.is_meta:
            memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(memory, name) != name:
                aliases[name] = first[memory]
                continue
        stored[name] = tensor
    return stored, aliases


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


class TensorFile:
    """A safetensors file whose header has been read and checked.

    Args:
        place: of the file.

    Raises:
        BrokenCheckpointError: it is missing, cut, or not of this format.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        size = num_bytes(place)
        if size is None:
            raise BrokenCheckpointError(f"{place} is missing")
        with open_to_read(place) as stream:
            self.header, header = _read_header(stream, size, place)
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}
        self.shards: dict[str, Shard] = {}
        try:
            metadata = header.pop("__metadata__", {})
            self.entries = _entries(header, len(self.header), size)
            self.aliases = dict(json.loads(metadata.get("aliases", "{}")))
            for name, part in json.loads(metadata.get("shards", "{}")).items():
                self.shards[name] = Shard(_counts(part["shape"]), _counts(part["offsets"]))
            if not self.entries.keys() >= {*self.aliases.values(), *self.shards}:
                raise ValueError("an alias or a shard of a tensor that is not there")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise BrokenCheckpointError(f"{place}: its header is damaged ({error})") from error

    def read_all(self, sha256: str | None, *, owned: bool) -> Iterator[tuple[str, Tensor]]:
        """Read the file from its beginning to its end.

        Args:
            sha256: what its bytes have to have; None checks nothing.
            owned: copy into memory of its own; else, of a local file, the tensors are views of
                the file that can be written without changing it.

        Yields:
            Name and tensor, in the order of the file; last the aliases, which are the same tensor
            as what they stand for.

        Raises:
            BrokenCheckpointError: after the last tensor, when the bytes are not those.
        """
        digest = hashlib.sha256(self.header)
        targets = set(self.aliases.values())
        kept: dict[str, Tensor] = {}
        with open_to_read(self.place) as stream:
            for name, entry in _in_order(self.entries):
                content = self._content(stream, entry, owned=owned)
                if sha256 is not None:
                    digest.update(content)
                tensor = _as_tensor(content, entry.dtype, entry.shape)
                del content
                if name in targets:
                    kept[name] = tensor
                yield name, tensor
                del tensor
        if sha256 is not None and digest.hexdigest() != sha256:
            raise BrokenCheckpointError(f"{self.place} is damaged: its SHA-256 is another one")
        for name, other in self.aliases.items():
            yield name, kept[other]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor, or some of its rows, without looking at the rest of the file.

        Args:
            name: of a tensor or an alias.
            rows: first row and the one after the last, along dimension 0; None for all.

        Returns:
            The tensor; of a local file a view of it.
        """
        entry = self.entries[self.aliases.get(name, name)]
        if rows is not None:
            row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
            begin, end = rows
            shape = (end - begin, *entry.shape[1:])
            size = (end - begin) * row_bytes
            entry = Entry(entry.dtype, shape, entry.begin + begin * row_bytes, size)
        with open_to_read(self.place) as stream:
            return _as_tensor(self._content(stream, entry, owned=False), entry.dtype, entry.shape)

    def _content(self, stream: IO[bytes], entry: Entry, *, owned: bool) -> Any:
        is_aligned = entry.begin % entry.dtype.itemsize == 0
        if entry.num_bytes and self.place.is_local and not owned and is_aligned:
            return map_bytes(self.place, entry.begin, entry.num_bytes)
        stream.seek(entry.begin)
        return read_exactly(stream, entry.num_bytes, self.place)


def _as_tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(content):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _read_header(stream: IO[bytes], size: int, place: Place) -> tuple[bytes, dict[str, Any]]:
    if size < 8:
        raise BrokenCheckpointError(f"{place} ends after {size} bytes")
    length = int.from_bytes(read_exactly(stream, 8, place), "little")
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise BrokenCheckpointError(f"{place} has a header of {length} bytes in a file of {size}")
    text = bytes(read_exactly(stream, length, place))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpointError(f"{place}: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise BrokenCheckpointError(f"{place}: its header is not a JSON object")
    return length.to_bytes(8, "little") + text, header


def _entries(header: dict[str, Any], begin: int, size: int) -> dict[str, Entry]:
    entries = {}
    for name, fields in header.items():
        first, last = _counts(fields["data_offsets"])
        shape = _counts(fields["shape"])
        dtype = DTYPES[fields["dtype"]]
        if math.prod(shape) * dtype.itemsize != last - first:
            raise ValueError(f"{name}: shape and bytes disagree")
        entries[name] = Entry(dtype, shape, begin + first, last - first)
    end = begin
    for name, entry in _in_order(entries):
        if entry.begin != end:
            raise ValueError(f"{name}: begins at byte {entry.begin} and not at {end}")
        end += entry.num_bytes
    if end != size:
        raise ValueError(f"the file has {size} bytes and not {end}")
    return entries


def _counts(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{numbers!r} are no counts")
    return tuple(numbers)


def _in_order(entries: dict[str, Entry]) -> list[tuple[str, Entry]]:
    return sorted(entries.items(), key=lambda item: (item[1].begin, item[1].num_bytes))
