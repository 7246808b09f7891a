"""A folder of checkpoints: which there are, which one is meant, which have to go.

The folders themselves are the truth. There is no link and no file that points to one, so that the
same code serves disks and object stores.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_grpo.checkpoints.errors import BrokenCheckpointError
from lightning_grpo.checkpoints.files import remove_file, remove_tree, rename, sync_folder
from lightning_grpo.checkpoints.manifest import MANIFEST, read_manifest
from lightning_grpo.checkpoints.places import Place, folders_in, is_file, locate, names_in
from lightning_grpo.checkpoints.store import Checkpoint, open_checkpoint, verify

Kind = Literal["last", "best", "iteration"]
Wanted = Literal["last", "best", "auto"]
_NAME = re.compile(r"(last|best|iteration)-(\d{6,})(?:-(\d+))?")
_LITTER = re.compile(r"\.(tmp|trash)-.+@(?P<host>.+)-(?P<pid>\d+)")
# Of a process on another machine, which cannot be asked whether it lives.
_MAX_LITTER_AGE_S = 24 * 3600


def new_url(folder: str | os.PathLike[str], kind: Kind, step: int) -> str:
    """A name for a checkpoint that no other one has.

    Args:
        folder: of the checkpoints.
        kind: last, best or iteration.
        step: optimizer steps behind it.

    Returns:
        `<folder>/<kind>-<step>`, with `-<n>` when there is one of that name.
    """
    place = locate(folder)
    found = [_NAME.fullmatch(name) for name in names_in(place)]
    same = [int(m[3] or 0) for m in found if m and m[1] == kind and int(m[2]) == step]
    suffix = f"-{max(same) + 1}" if same else ""
    return str(place / f"{kind}-{step:06d}{suffix}")


def kind_of(name: str) -> str:
    """What the name of a checkpoint says: last, best, iteration, or other."""
    match = _NAME.fullmatch(name)
    return match[1] if match else "other"


def next_serial(folder: str | os.PathLike[str]) -> int:
    """A serial above those of all checkpoints in a folder."""
    place = locate(folder)
    serials = [0]
    for name in folders_in(place):
        with contextlib.suppress(FileNotFoundError, BrokenCheckpointError):
            serials.append(read_manifest(place / name).serial)
    return max(serials) + 1


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """All complete checkpoints of a folder, the one that was written last first."""
    return survey(folder)[0]


def survey(
    folder: str | os.PathLike[str],
) -> tuple[list[Checkpoint], list[tuple[str, str]]]:
    """What is in a folder of checkpoints.

    Args:
        folder: need not exist.

    Returns:
        The complete ones, the one that was written last first, which after a resume from an
        earlier one need not have the most steps; and name and defect of the others.
    """
    place = locate(folder)
    complete: list[Checkpoint] = []
    broken: list[tuple[str, str]] = []
    for name in folders_in(place):
        if name.startswith("."):
            continue
        try:
            complete.append(open_checkpoint(str(place / name)))
        except FileNotFoundError as error:
            if _NAME.fullmatch(name):
                broken.append((name, str(error)))
        except BrokenCheckpointError as error:
            broken.append((name, str(error)))
    complete.sort(key=lambda c: (c.manifest.serial, c.manifest.step), reverse=True)
    return complete, broken


def resolve_checkpoint(url: str | os.PathLike[str]) -> str:
    """The checkpoint that a path or URL means.

    Args:
        url: of a checkpoint; or `<folder>/last`, `<folder>/best`: the newest complete one of that
            kind; or `<folder>/auto`: the newest that a run has written, of any kind, whose bytes
            are all as they were written.

    Returns:
        Path or URL of a complete checkpoint.

    Raises:
        FileNotFoundError: there is none.
        BrokenCheckpointError: the one that `url` names is damaged.
    """
    place = locate(url)
    wanted = place.name
    names = names_in(place)
    if wanted in ("last", "best", "auto") and MANIFEST not in names:
        return _choose(place.parent, wanted)  # type: ignore[arg-type]
    if not names and not is_file(place):
        raise FileNotFoundError(f"{place}: there is no such checkpoint")
    return open_checkpoint(str(place)).url


def _choose(folder: Place, wanted: Wanted) -> str:
    complete, broken = survey(str(folder))
    for name, defect in broken:
        if wanted == "auto" or kind_of(name) == wanted:
            rank_zero_warn(f"the checkpoint {folder / name} is left out: {defect}")
    for checkpoint in complete:
        if wanted == "auto" and checkpoint.manifest.kind != "other":
            if problems := verify(checkpoint):
                rank_zero_warn(f"the checkpoint {checkpoint.url} is left out: {problems[0]}")
                continue
            return checkpoint.url
        if checkpoint.manifest.kind == wanted:
            return checkpoint.url
    kind = "" if wanted == "auto" else f" of kind {wanted}"
    raise FileNotFoundError(f"{folder} holds no complete checkpoint{kind}")


def prune(folder: str | os.PathLike[str], kind: Kind, num_kept: int) -> list[str]:
    """Remove all checkpoints of a kind but the newest ones.

    One that cannot be removed is warned of, and stays for the next time.

    Args:
        folder: of the checkpoints.
        kind: those of other kinds stay.
        num_kept: how many complete ones stay, >= 1. Broken ones go when there are as many.

    Returns:
        Names of the removed ones.
    """
    if num_kept < 1:
        raise ValueError(f"at least one checkpoint has to stay, got {num_kept}")
    place = locate(folder)
    complete, broken = survey(folder)
    ours = [locate(c.url).name for c in complete if c.manifest.kind == kind]
    if len(ours) < num_kept:
        return []
    removed = []
    for name in ours[num_kept:] + [name for name, _ in broken if kind_of(name) == kind]:
        if _removed(_remove, place / name):
            removed.append(name)
    return removed


def remove_checkpoint(url: str | os.PathLike[str]) -> None:
    """Remove a checkpoint, so that at no time a part of it looks like a whole one.

    Args:
        url: of its folder; nothing is done when it is gone.
    """
    _remove(locate(url))


def _remove(place: Place) -> None:
    if not place.is_local:
        remove_file(place / MANIFEST)
        remove_tree(place)
    elif os.path.isdir(place.path):
        trash = place.parent / f".trash-{place.name}@{socket.gethostname()}-{os.getpid()}"
        remove_tree(trash)
        rename(place, trash)
        sync_folder(place.parent)
        remove_tree(trash)


def clean_litter(folder: str | os.PathLike[str]) -> list[str]:
    """Remove what processes that are gone have left unfinished. To be called before any save.

    Args:
        folder: of the checkpoints; need not exist. On a store nothing says who is writing, so
            only one process at a time may write there.

    Returns:
        Names of what was removed.
    """
    place = locate(folder)
    removed = []
    for name in folders_in(place):
        if place.is_local:
            is_litter = _is_left_behind(place / name)
        else:
            is_litter = bool(_NAME.fullmatch(name)) and MANIFEST not in names_in(place / name)
        if is_litter and _removed(remove_tree, place / name):
            removed.append(name)
    return removed


def _removed(remove: Callable[[Place], None], folder: Place) -> bool:
    try:
        remove(folder)
    except OSError as error:  # the run can go on with it
        rank_zero_warn(f"{folder} is of no use any more and could not be removed: {error}")
        return False
    return True


def _is_left_behind(folder: Place) -> bool:
    match = _LITTER.fullmatch(folder.name)
    if match is None:
        return False
    if match["host"] != socket.gethostname():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - os.lstat(folder.path).st_mtime > _MAX_LITTER_AGE_S
        return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is another user's
        pass
    return False
