"""What can be converted: each kind of folder or file as tensors by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_grpo.checkpoints import Checkpoint, open_checkpoint, resolve_checkpoint
from lightning_grpo.checkpoints.files import locate, num_bytes
from lightning_grpo.checkpoints.manifest import MANIFEST
from lightning_grpo.checkpoints.tensor_file import DTYPES
from lightning_grpo.importing.dcp import METADATA, read_dcp
from lightning_grpo.importing.lazy import LazyTensor, Weights, of_tensor
from lightning_grpo.importing.torch_files import load_torch_file
from lightning_grpo.importing.verl import is_verl, read_verl

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Source:
    """What has been found at a path."""

    kind: str
    """In words."""
    tensors: Weights
    """Under the names that they have there."""
    place: str
    """Path or URL of what was opened."""
    folder: Path | None = None
    """Where a config.json is, if there is one."""
    adapter_config: dict[str, Any] | None = None
    """Of peft."""
    checkpoint: Checkpoint | None = None
    """When it is one of this project."""
    is_plain: bool = False
    """Whether it is a folder of transformers, whose names are as transformers writes them."""


def open_source(path: str) -> Source:
    """Find out what there is at a path, and read the names, types and shapes of its tensors.

    Args:
        path: of a checkpoint of this project (or its URL, or `<folder>/last`), a folder of
            transformers, peft, torch.distributed.checkpoint or verl, or a file of torch.save.

    Returns:
        The tensors, which are read when they are asked for.

    Raises:
        ValueError: there is nothing that is known here, or it is damaged or refused.
    """
    place = locate(path)
    is_logical = place.name in ("last", "best", "auto") and num_bytes(place / MANIFEST) is None
    if num_bytes(place / MANIFEST) is not None or (is_logical and not Path(path).exists()):
        return _open_own(path)
    folder = Path(path)
    if folder.is_file():
        return _open_file(folder)
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no such file or folder")
    if (folder / METADATA).is_file():
        return Source("torch.distributed.checkpoint", read_dcp(folder), path)
    if (folder / "actor").is_dir() and is_verl(folder / "actor"):
        folder = folder / "actor"
    if is_verl(folder):
        return _open_verl(folder)
    if (folder / "adapter_config.json").is_file():
        return _open_adapter(folder)
    if (folder / "config.json").is_file():
        return Source("transformers folder", read_model_folder(folder), path, folder, is_plain=True)
    raise ValueError(f"{path} holds no checkpoint of a known kind{_hint(folder)}")


def _hint(folder: Path) -> str:
    if any(folder.glob("*_model_states.pt")) or (folder / "latest").is_file():
        return (
            ": it is DeepSpeed's own format, whose files name code; run the zero_to_fp32.py beside "
            "it, or convert the folder that the trainer saved at its end"
        )
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return f"; it holds the folders {inner[:5]}" if inner else ""


def _open_own(path: str) -> Source:
    try:
        checkpoint = open_checkpoint(resolve_checkpoint(path), check_sha256=True)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    found = checkpoint.tensors("weights")
    tensors = {
        name: LazyTensor(info.dtype, info.shape, _reader(found.read, name))
        for name, info in found.info.items()
    }
    kind = f"checkpoint of this project, {'sharded' if found.is_sharded else 'of one file'}"
    return Source(kind, tensors, checkpoint.url, checkpoint=checkpoint)


def _reader(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _open_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        return Source("file of safetensors", _read_safetensors(path), str(path))
    content = load_torch_file(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds no tensors under names")
    is_lightning = "pytorch-lightning_version" in content
    return Source("Lightning file" if is_lightning else "file of torch", _named(weights), str(path))


def _named(weights: dict[Any, Any]) -> Weights:
    return {str(name): of_tensor(v) for name, v in weights.items() if isinstance(v, Tensor)}


def _open_verl(folder: Path) -> Source:
    candidates = (folder / "huggingface", folder)
    described = next((f for f in candidates if (f / "config.json").is_file()), None)
    adapter = folder / "lora_adapter" / "adapter_config.json"
    return Source(
        "FSDP shards of verl",
        read_verl(folder),
        str(folder),
        described,
        adapter_config=_read_json(adapter) if adapter.is_file() else None,
    )


def _open_adapter(folder: Path) -> Source:
    config = _read_json(folder / "adapter_config.json")
    tensors = read_files(folder, ["adapter_model.safetensors", "adapter_model.bin"])
    return Source("adapter of peft", tensors, str(folder), adapter_config=config)


def read_model_folder(folder: Path) -> Weights:
    """The tensors of a transformers folder, in safetensors or in files of torch.save.

    Args:
        folder: with config.json.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: there are none, or a file of the index is missing.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map", {})
            weights: Weights = {}
            for name in sorted(set(weight_map.values())):
                weights |= read_files(folder, [name])
            if missing := sorted(set(weight_map) - set(weights)):
                raise ValueError(f"{folder}: {missing[:5]} of the index are in none of its files")
            return weights
    return read_files(folder, ["model.safetensors", "pytorch_model.bin"])


def read_files(folder: Path, names: Iterable[str]) -> Weights:
    """The tensors of the first file that is there.

    Args:
        folder: of the files.
        names: of files.

    Returns:
        Name -> tensor.

    Raises:
        ValueError: none of them is there, or it leads out of the folder.
    """
    for name in names:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{folder} names the file {name!r}, which is not in it")
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = load_torch_file(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no tensors under names")
        return _named(content)
    raise ValueError(f"{folder} holds none of the files {', '.join(names)}")


def _read_safetensors(path: Path) -> Weights:
    weights: Weights = {}
    try:
        opened = safe_open(str(path), framework="pt")
        for name in opened.keys():  # noqa: SIM118
            view = opened.get_slice(name)
            weights[name] = LazyTensor(
                DTYPES[view.get_dtype()], tuple(view.get_shape()), _reader(opened.get_tensor, name)
            )
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{path} is damaged, or of types that are not known: {error}") from error
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content
