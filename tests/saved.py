"""Reading a checkpoint of a run in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_grpo.checkpoints.io import FolderCheckpointIO


def read_saved(path: str | Path) -> dict[str, Any]:
    """All of a checkpoint, as Lightning would load it."""
    return FolderCheckpointIO().load_checkpoint(path)
