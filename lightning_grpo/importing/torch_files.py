"""Files of torch.save, read without letting them call anything.

torch reads them with weights_only, which knows tensors and plain containers. Tensors of several
ranks are objects of classes besides; here each of these classes is replaced by a record that keeps
what it is given and does nothing, so that neither code of the file nor of the class runs, and files
of other versions of torch are read as well.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

_ZIP_START = b"PK\x03\x04"


class Record:
    """What a file says of an object: arguments and state, and no behaviour."""

    def __new__(cls, *args: Any) -> Record:
        """Keep the arguments."""
        record = super().__new__(cls)
        record.args = args
        record.fields = {}
        record.items = ()
        return record

    args: tuple[Any, ...]
    fields: dict[str, Any]
    """Attributes of an object that was saved by name."""
    items: tuple[Any, ...]
    """State of an object that was saved as a tuple."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state
        elif _is_slots_state(state):  # what an object with __slots__ is saved as
            self.fields = {**(state[0] or {}), **state[1]}
        elif isinstance(state, tuple):
            self.items = state
        else:
            raise TypeError(f"the state of an object is a {type(state).__name__}")

    @property
    def kind(self) -> str:
        """Name of the class that it stands for."""
        return type(self).__name__


def _is_slots_state(state: Any) -> bool:
    return (
        isinstance(state, tuple)
        and len(state) == 2
        and (state[0] is None or isinstance(state[0], dict))
        and isinstance(state[1], dict)
    )


def record_class(name: str) -> type[Record]:
    """A class of records that stands for the class of a name."""
    return type(name, (Record,), {})


class RankTensor(Tensor):
    """What a file says of a DTensor or a ShardedTensor: a rank's part, and where it belongs."""

    saved: Record

    def __setstate__(self, state: Any) -> None:
        self.saved = Record()
        self.saved.__setstate__(state)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse to compute with what is only a description."""
        raise TypeError(f"{func} of a tensor of one rank")


_Attribute = record_class("Attribute")


def _attribute(owner: Any, name: str) -> type[Record]:
    """What stands for `getattr`, by which classes inside classes and enumerations are saved."""
    return _Attribute


_MESH = ("torch.distributed.device_mesh", "torch.distributed._device_mesh")
_LAYOUT = "torch.distributed._mesh_layout"
_OLD, _NEW = "torch.distributed._tensor", "torch.distributed.tensor"
_SHARDED = "torch.distributed._shard"
_RANK_RECORDS = {
    **{f"{module}.DeviceMesh": "DeviceMesh" for module in (*_MESH, f"{_OLD}.device_mesh")},
    **{f"{_LAYOUT}.{name}": name for name in ("_MeshLayout", "_FlatLayout")},
    **{
        f"{module}.{name}": name
        for module in (f"{_OLD}.placement_types", f"{_NEW}.placement_types")
        for name in ("Shard", "Replicate", "Partial", "_Partial", "_StridedShard")
    },
    **{
        f"{module}.{name}": name
        for module in (f"{_OLD}.placement_types", f"{_NEW}._dtensor_spec")
        for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
    },
    f"{_SHARDED}.sharded_tensor.shard.Shard": "LocalShard",
    f"{_SHARDED}.sharded_tensor.metadata.ShardedTensorMetadata": "ShardedTensorMetadata",
    f"{_SHARDED}.sharded_tensor.metadata.TensorProperties": "TensorProperties",
    f"{_SHARDED}.sharded_tensor.metadata.MEM_FORMAT_ENCODING": "MEM_FORMAT_ENCODING",
    f"{_SHARDED}.metadata.ShardMetadata": "ShardMetadata",
    f"{_SHARDED}.sharding_spec.api.EnumerableShardingSpec": "EnumerableShardingSpec",
    f"{_SHARDED}.sharding_spec.chunk_sharding_spec.ChunkShardingSpec": "ChunkShardingSpec",
    "torch.distributed.remote_device._remote_device": "_remote_device",
}
_RANK_TENSORS = [
    *(f"{_NEW}.DTensor", f"{_NEW}._api.DTensor", f"{_OLD}.api.DTensor"),
    f"{_SHARDED}.sharded_tensor.api.ShardedTensor",
]
RANK_CLASSES: list[Any] = [
    *((record_class(name), path) for path, name in _RANK_RECORDS.items()),
    *((RankTensor, path) for path in _RANK_TENSORS),
    (_attribute, "builtins.getattr"),
    (_Attribute, f"{_SHARDED}.sharded_tensor.api.ShardedTensor.ProcessGroupState"),
]
"""What a file of one rank may name, with what stands for it."""


def load_torch_file(path: Path, allowed: list[Any] | None = None) -> Any:
    """Read a file of torch.save whose tensors stay on the disk until they are used.

    Args:
        path: of a file.
        allowed: pairs of a class and the name that a file may use for it.

    Returns:
        Its content; tensors are views of the file, on the CPU.

    Raises:
        ValueError: it is no such file, is damaged, or names something that is not allowed.
    """
    with path.open("rb") as stream:
        if stream.read(4) != _ZIP_START:
            raise ValueError(f"{path} is not a file of torch.save (or of torch before 1.6)")
    try:
        with _only(allowed or []):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} is not read: {_reason(error)}") from error


def load_torch_bytes(content: bytes, where: object) -> Any:
    """Read what torch.save wrote into a part of a file.

    Args:
        content: the bytes.
        where: they are from, for the error.

    Returns:
        The content.

    Raises:
        ValueError: as of `load_torch_file`.
    """
    if content[:4] != _ZIP_START:
        raise ValueError(f"{where} does not hold what its folder says")
    try:
        with _only([]):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{where} is not read: {_reason(error)}") from error


@contextlib.contextmanager
def _only(allowed: list[Any]) -> Iterator[None]:
    """Let files name these classes, and none of those that libraries have allowed."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _reason(error: Exception) -> str:
    text = str(error)
    _, _, found = text.partition("WeightsUnpickler error: ")
    sentence = (found or text).strip().split("\n")[0].partition(" Please use")[0].rstrip(". ")
    if not found:
        return sentence
    return f"it holds more than tensors and plain values ({sentence}), and nothing unpickles it"
