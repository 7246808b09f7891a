"""Folders of transformers and peft, written shard after shard."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file

from lightning_grpo.importing.lazy import Weights
from lightning_grpo.importing.lora import LoraSettings
from lightning_grpo.importing.names import Pair
from lightning_grpo.paths import resolve_package_path

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
)
_DESCRIPTIONS = ("config.json", "generation_config.json", *_TOKENIZER_FILES)


@dataclass(frozen=True)
class ModelFiles:
    """Where the files beside the weights come from."""

    config: Path
    """Folder with config.json and perhaps generation_config.json."""
    tokenizer: Path
    """Folder of the tokenizer."""


def local_folder(name: str, revision: str | None = None, *, has_weights: bool = False) -> Path:
    """A folder of a model, which is fetched from the Hub unless it is on this machine.

    Args:
        name: a folder, a `package://` name, or a name on the Hub.
        revision: branch, tag or commit of a Hub name.
        has_weights: whether the weights are needed too.

    Returns:
        The folder.

    Raises:
        ValueError: there is none of this name.
    """
    path = Path(resolve_package_path(name))
    if path.is_dir():
        return path
    patterns = [*_DESCRIPTIONS, *(["*.safetensors", "*.safetensors.index.json"] * has_weights)]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name} is no folder, and not found on the Hub ({reason})") from error


def write_model_folder(
    weights: Weights,
    files: ModelFiles,
    out: Path,
    *,
    class_name: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Write a folder that transformers loads; one shard at a time is in memory.

    Args:
        weights: of the model, tied ones once.
        files: where the others come from; pointers to code are left out.
        out: folder that is not there yet, or is empty.
        class_name: of the model.
        dtype: of floating-point weights; as they are when None.
        max_shard_bytes: largest file, unless one tensor is larger.
        on_bytes: told of the size of each tensor that has been read.

    Returns:
        Names of the files of weights.
    """
    types, plan = _plan(weights, dtype, max_shard_bytes)
    with _staged(out) as stage:
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = weights[name].read().to(types[name]).contiguous()
                on_bytes(weights[name].num_bytes)
            save_file(shard, stage / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            _write_json(stage / "model.safetensors.index.json", index)
        _write_descriptions(files, stage, class_name, set(types.values()))
    return list(plan.filename_to_tensors)


def planned_files(
    weights: Weights,
    files: ModelFiles | None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, int | None]:
    """The files that a folder of a model, or of an adapter, would have.

    Args:
        weights: of the model; none for an adapter.
        files: where the others come from.
        dtype: as of `write_model_folder`.
        max_shard_bytes: as of `write_model_folder`.

    Returns:
        Name -> bytes of tensors in it; None for a file without any, or of an adapter.
    """
    found: dict[str, int | None] = {}
    others: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors")
    if weights:
        types, plan = _plan(weights, dtype, max_shard_bytes)
        for file, names in plan.filename_to_tensors.items():
            found[file] = sum(math.prod(weights[n].shape) * types[n].itemsize for n in names)
        others = ("config.json", *(["model.safetensors.index.json"] * plan.is_sharded))
        if files is not None and (files.config / "generation_config.json").is_file():
            others = (*others, "generation_config.json")
    if files is not None:
        others += tuple(n for n in _TOKENIZER_FILES if (files.tokenizer / n).is_file())
    return found | dict.fromkeys(others)


def _plan(
    weights: Weights, dtype: torch.dtype | None, max_shard_bytes: int
) -> tuple[dict[str, torch.dtype], StateDictSplit]:
    types = {
        name: dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        for name, tensor in weights.items()
    }
    plan = split_torch_state_dict_into_shards(
        {n: torch.empty(t.shape, dtype=types[n], device="meta") for n, t in weights.items()},
        max_shard_size=max_shard_bytes,
    )
    return types, plan


def write_adapter_folder(
    pairs: dict[str, Pair], settings: LoraSettings, base: str, files: ModelFiles | None, out: Path
) -> None:
    """Write an adapter as a folder of peft.

    Args:
        pairs: name of a weight -> its adapter.
        settings: of the adapter.
        base: name or folder of the model that it changes.
        files: where a tokenizer comes from, if there is one.
        out: folder that is not there yet, or is empty.
    """
    from peft import LoraConfig

    tensors = {}
    ranks = {}
    for name, pair in pairs.items():
        module = name.removesuffix(".weight")
        ranks[module] = pair.a.shape[0]
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a.read().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b.read().contiguous()
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it, a float is fine
        lora_dropout=0.0,
        use_rslora=settings.divides_by_root,
        rank_pattern={module: r for module, r in ranks.items() if r != rank},
        alpha_pattern=settings.alpha_pattern,
        target_modules=sorted(ranks),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    with _staged(out) as stage:
        config.save_pretrained(str(stage))
        save_file(tensors, stage / "adapter_model.safetensors", metadata={"format": "pt"})
        if files is not None:
            _copy_tokenizer(files.tokenizer, stage)


def check_free(out: str | Path) -> None:
    """Refuse to write where something is."""
    if "://" in str(out):
        raise ValueError(f"--out {out}: write to a local folder, and copy that")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already, and is not overwritten")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end of the block, or goes with an error."""
    check_free(out)
    stage = out.absolute().parent / f".tmp-{out.name}-{os.getpid()}"
    stage.mkdir(parents=True)
    try:
        yield stage
        if out.is_dir():
            out.rmdir()
        stage.rename(out)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _write_descriptions(
    files: ModelFiles, stage: Path, class_name: str, dtypes: set[torch.dtype]
) -> None:
    config = _read_json(files.config / "config.json")
    config.pop("torch_dtype", None)
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floating) == 1:
        config["dtype"] = str(floating.pop()).removeprefix("torch.")
    config["architectures"] = [class_name]
    _write_json(stage / "config.json", config)
    generation = files.config / "generation_config.json"
    if generation.is_file():
        _write_json(stage / generation.name, _read_json(generation))
    _copy_tokenizer(files.tokenizer, stage)


def _copy_tokenizer(folder: Path, stage: Path) -> None:
    for name in _TOKENIZER_FILES:
        if name == "tokenizer_config.json" and (folder / name).is_file():
            _write_json(stage / name, _read_json(folder / name))
        elif (folder / name).is_file():
            shutil.copyfile(folder / name, stage / name)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, without what names code to run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    for name in ("auto_map", "custom_pipelines", "custom_generate"):
        content.pop(name, None)
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
