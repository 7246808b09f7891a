"""Checkpoints as folders that a failed save cannot cost, and that nothing unpickles."""

from __future__ import annotations

from lightning_grpo.checkpoints.errors import BrokenCheckpointError
from lightning_grpo.checkpoints.folder import (
    clean_litter,
    list_checkpoints,
    new_url,
    prune,
    remove_checkpoint,
    resolve_checkpoint,
)
from lightning_grpo.checkpoints.manifest import Manifest, Metric
from lightning_grpo.checkpoints.store import (
    Checkpoint,
    Sections,
    open_checkpoint,
    verify,
    write_checkpoint,
)

__all__ = [
    "BrokenCheckpointError",
    "Checkpoint",
    "Manifest",
    "Metric",
    "Sections",
    "clean_litter",
    "list_checkpoints",
    "new_url",
    "open_checkpoint",
    "prune",
    "remove_checkpoint",
    "resolve_checkpoint",
    "verify",
    "write_checkpoint",
]
