"""A checkpoint under a second name, which the run that wrote it does not remove or write over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_PREFIX = ".push-"


def keep_copy(checkpoint: Path) -> Path:
    """Give a checkpoint a second name beside it, in the same run's folder.

    Args:
        checkpoint: its folder, whose files are never written again.

    Returns:
        The copy, of links, which take no room.
    """
    copy = checkpoint.parent / f"{_PREFIX}{os.getpid()}@{checkpoint.name}"
    remove_copy(copy)
    try:
        shutil.copytree(checkpoint, copy, copy_function=_link)
    except BaseException:
        remove_copy(copy)
        raise
    return copy


def original_path(path: str) -> str:
    """The name that a checkpoint had before it was kept; that of any other one as it is."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.partition('@')[2]}" if name.startswith(_PREFIX) else path


def remove_copy(copy: Path) -> None:
    """Remove what `keep_copy` made."""
    shutil.rmtree(copy, ignore_errors=True)


def remove_left_copies(folder: Path) -> None:
    """Remove copies that an earlier process of the run has left.

    Args:
        folder: of the run's checkpoints.
    """
    for copy in folder.glob(f"{_PREFIX}*"):
        remove_copy(copy)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)
