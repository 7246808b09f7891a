"""Where the checkpoints of a run are, and which of them an option means."""

from __future__ import annotations

import os

from upath import UPath

from lightning_grpo.checkpoints.folder import kind_of
from lightning_grpo.checkpoints.places import folders_in, locate

_FOLDER = "checkpoints"


def checkpoint_dir(run_dir: UPath) -> str:
    """The folder of a run's checkpoints."""
    return str(run_dir / _FOLDER)


def has_checkpoints(folder: str, wanted: str) -> bool:
    """Whether a folder has checkpoints of a kind, whole or not.

    Args:
        folder: of a run's checkpoints; need not exist.
        wanted: last, best or iteration; auto for any of them.
    """
    kinds = {kind_of(name) for name in folders_in(locate(folder))} - {"other"}
    return bool(kinds) if wanted == "auto" else wanted in kinds


def run_dir_of(checkpoint: str) -> UPath | None:
    """The run's folder that a checkpoint lies in; None when it lies somewhere else.

    Args:
        checkpoint: its path or URL.
    """
    path = UPath(checkpoint)
    folder = path.parent if path.parent.name else path.absolute().parent
    return folder.parent if folder.name == _FOLDER else None


def shown(path: str) -> str:
    """A path as people write it: relative to the present folder when it lies in it."""
    if "://" in path:
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
