"""Weights that others have written, read lazily and without running anything of theirs."""

from __future__ import annotations

from lightning_grpo.importing.folder import (
    ModelFiles,
    check_free,
    local_folder,
    planned_files,
    write_adapter_folder,
    write_model_folder,
)
from lightning_grpo.importing.lazy import LazyTensor, Weights
from lightning_grpo.importing.lora import LoraSettings, lora_of_config, merge_lora
from lightning_grpo.importing.names import Matched, WantedModel, match_names, wanted_model
from lightning_grpo.importing.sources import Source, open_source, read_model_folder

__all__ = [
    "LazyTensor",
    "LoraSettings",
    "Matched",
    "ModelFiles",
    "Source",
    "WantedModel",
    "Weights",
    "check_free",
    "local_folder",
    "lora_of_config",
    "match_names",
    "merge_lora",
    "open_source",
    "planned_files",
    "read_model_folder",
    "wanted_model",
    "write_adapter_folder",
    "write_model_folder",
]
