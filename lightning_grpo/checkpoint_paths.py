"""Names of checkpoints, where they are in a run, and which of them can be read."""

from __future__ import annotations

from pathlib import Path

import fsspec

from lightning_grpo.saved_run import KEY, read_checkpoint

_SUFFIX = ".ckpt"


def checkpoint_dir(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def named_checkpoint(folder: Path, name: str) -> Path:
    """Where the checkpoint of that name is: last, best, or iteration_<i>."""
    return folder / f"{name}{_SUFFIX}"


def checkpoints_in(run_dir: Path) -> list[Path]:
    """All checkpoints of a run, in the order of their names, whole or not."""
    return sorted(checkpoint_dir(run_dir).glob(f"*{_SUFFIX}"))


def is_url(path: str) -> bool:
    """Whether a path is an address such as s3://bucket/file."""
    return "://" in path


def is_there(path: str) -> bool:
    """Whether a path or URL exists."""
    if not is_url(path):
        return Path(path).exists()
    filesystem, inner = fsspec.core.url_to_fs(path)
    return bool(filesystem.exists(inner))


def run_dir_of(checkpoint: str) -> Path | None:
    """The run's folder that a checkpoint lies in; None when it lies somewhere else, or in a URL."""
    if is_url(checkpoint):
        return None
    path = Path(checkpoint)
    folder = path.parent if path.parent.name else path.absolute().parent
    return folder.parent if folder == checkpoint_dir(folder.parent) else None


def problem_with(checkpoint: str) -> str:
    """Why a checkpoint cannot be read; empty when it can. Its weights are not looked at."""
    try:
        read_checkpoint(checkpoint)[KEY]
    except KeyError:
        return "it is not one of lightning_grpo"
    except Exception as error:  # how a broken file fails is up to what is left of it
        first, *_ = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {first}"
    return ""


def saved_at(checkpoint: str) -> float:
    """When a checkpoint was written, in seconds since 1970; 0 when it does not say."""
    return float(read_checkpoint(checkpoint)[KEY].get("saved_at", 0.0))
