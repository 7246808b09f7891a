"""Folders of torch.distributed.checkpoint, which Lightning and others write over several ranks.

`.metadata` is a pickle, and says where in which file each part of each tensor is. It is read by an
unpickler that knows a fixed list of names, and puts a record without behaviour in the place of each
class and of each function.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_grpo.importing.lazy import Box, LazyTensor, Weights, assemble
from lightning_grpo.importing.torch_files import Record, load_torch_bytes, record_class

METADATA = ".metadata"
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_CHECKPOINT = "torch.distributed.checkpoint"
_OLD_TENSOR = "torch.distributed._shard.sharded_tensor.metadata"
_RECORDS = {
    **{
        (f"{_CHECKPOINT}.metadata", name): record_class(name)
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta"),
            *("ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING"),
        )
    },
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): record_class("_StorageInfo"),
    (_OLD_TENSOR, "TensorProperties"): record_class("TensorProperties"),
    (_OLD_TENSOR, "MEM_FORMAT_ENCODING"): record_class("MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"): record_class("layout"),
    # How Python 3.11 saves a member of an enumeration.
    ("builtins", "getattr"): record_class("getattr"),
    **{
        (module, name): record_class("path")
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath")
    },
}
_CONTAINERS = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}


class _Unpickler(pickle.Unpickler):
    """Knows the names that `.metadata` needs, and calls none of what they stand for."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; all names but those listed are refused."""
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path) -> Record:
    """Read where the parts of a checkpoint's tensors are.

    Args:
        folder: of the checkpoint.

    Returns:
        A record with the fields of torch's Metadata.

    Raises:
        ValueError: it is damaged, or names anything but what such a file needs.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            found = _Unpickler(stream).load()
    except Exception as error:
        raise ValueError(f"{path} is not read: {error}") from error
    if not isinstance(found, Record) or not {"state_dict_metadata", "storage_data"} <= set(
        found.fields
    ):
        raise ValueError(f"{path} is damaged: it does not say where the tensors are")
    return found


def read_dcp(folder: Path) -> Weights:
    """The tensors of a checkpoint of any number of ranks, moments of an optimizer included.

    Args:
        folder: with `.metadata` and `.distcp` files.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: it is damaged, or not all of it is there.
    """
    fields = read_metadata(folder).fields
    try:
        places: dict[str, list[tuple[tuple[int, ...], dict[str, Any]]]] = defaultdict(list)
        for index, info in fields["storage_data"].items():
            offset = tuple(index.fields.get("offset") or ())
            places[index.fields["fqn"]].append((offset, _checked(folder, info.fields)))
        weights: Weights = {}
        for name, entry in fields["state_dict_metadata"].items():
            if entry.kind == "TensorStorageMetadata":
                weights[name] = _lazy(folder, name, entry.fields, places[name])
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{folder / METADATA} is damaged ({error!r})") from error
    return weights


def _lazy(folder: Path, name: str, fields: dict[str, Any], places: list[Any]) -> LazyTensor:
    properties = fields["properties"]
    dtype = properties.items[0] if properties.items else properties.fields["dtype"]
    shape = tuple(int(length) for length in fields["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} has the type {dtype}")

    def parts() -> Iterator[Box]:
        for offset, info in places:
            with (folder / info["relative_path"]).open("rb") as stream:
                stream.seek(info["offset"])
                content = stream.read(info["length"])
            where = f"{folder / info['relative_path']} from byte {info['offset']}"
            part = load_torch_bytes(content, where)
            if type(part) is not torch.Tensor:
                raise ValueError(f"{where} is no tensor")
            yield offset or (0,) * len(shape), part

    return LazyTensor(dtype, shape, lambda: assemble(f"{folder}: {name}", dtype, shape, parts()))


def _checked(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    name = info["relative_path"]
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{folder / METADATA} names the file {name!r}, which is not in its folder")
    if info.get("transform_descriptors"):
        raise ValueError(f"{folder}: its tensors are stored compressed or otherwise transformed")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} is missing: files of all ranks belong in one folder")
    if not all(type(info[key]) is int and info[key] >= 0 for key in ("offset", "length")):
        raise ValueError(f"{folder / METADATA} is damaged: where {name} is read is no number")
    return info
