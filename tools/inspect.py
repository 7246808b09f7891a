"""inspect: what a checkpoint holds, without loading its weights."""

from __future__ import annotations

import json as json_format
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_grpo.checkpoints import Checkpoint, open_checkpoint, resolve_checkpoint, verify
from lightning_grpo.checkpoints.errors import BrokenCheckpointError
from lightning_grpo.checkpoints.shards import TensorInfo
from lightning_grpo.checkpoints.store import Section
from lightning_grpo.saved_run import KEY

_SECTIONS: tuple[Section, ...] = ("weights", "optimizer", "state")


def inspect(ckpt_path: str, check_sha256: bool = False, json: str | None = None) -> dict[str, Any]:
    """Print what a checkpoint holds: where the run was, sizes and types, and whether it is whole.

    Args:
        ckpt_path: a checkpoint's folder or URL, or .../checkpoints/last, best or auto.
        check_sha256: read every byte and compare it with what was written; otherwise only that all
            files are there in their sizes.
        json: file to write the same to.

    Returns:
        What is printed, as plain values.

    Raises:
        BrokenCheckpointError: it is damaged.
    """
    checkpoint = open_checkpoint(resolve_checkpoint(ckpt_path))
    found = summary(checkpoint)
    problems = verify(checkpoint) if check_sha256 else []
    found["integrity"] = problems or [
        "every byte is as it was written" if check_sha256 else "all files have their sizes"
    ]
    print_summary(found)
    if json is not None:
        Path(json).write_text(json_format.dumps(found, indent=2) + "\n", encoding="utf-8")
    if problems:
        raise BrokenCheckpointError("; ".join(problems))
    return found


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of itself, and the sizes of its parts.

    Args:
        checkpoint: whose weights are not read.

    Returns:
        Plain values.
    """
    manifest = checkpoint.manifest
    run = record_in(checkpoint)
    return {
        "path": checkpoint.url,
        "kind": manifest.kind,
        "step": manifest.step,
        "iteration": manifest.iteration,
        "stage": manifest.stage,
        "algorithm": manifest.algorithm,
        "world_size": manifest.world_size,
        "metric": {manifest.metric.name: manifest.metric.value} if manifest.metric else None,
        "versions": manifest.versions,
        "run": plain_values(run),
        "parts": {name: part_sizes(checkpoint.tensor_info(name)) for name in _SECTIONS},
        "files": {name: record.num_bytes for name, record in manifest.files.items()},
    }


def record_in(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of its run, without where its loops are and what they hold.

    Args:
        checkpoint: whose weights are not read.
    """
    record = checkpoint.read_state().get(KEY, {})
    return {name: value for name, value in record.items() if name != "mark"}


def part_sizes(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Number of tensors and of numbers of a part, by type.

    Args:
        tensors: what is known of each.

    Returns:
        num_tensors, num_values by type, num_bytes.
    """
    values: Counter[str] = Counter()
    for info in tensors.values():
        values[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    return {
        "num_tensors": len(tensors),
        "num_values": dict(values),
        "num_bytes": sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values()),
    }


def plain_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a record that JSON can hold, nested ones too.

    Args:
        tree: of a checkpoint's state.

    Returns:
        The same without tensors and other objects.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if inner := plain_values(value):
                found[str(key)] = inner
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[str(key)] = value
    return found


def print_summary(found: Mapping[str, Any]) -> None:
    """Print a summary as tables.

    Args:
        found: of `summary`, with its integrity.
    """
    console = Console(highlight=False)
    console.print(found["path"], markup=False, soft_wrap=True)
    about = Table(show_header=False)
    for name in ("kind", "step", "iteration", "stage", "algorithm", "world_size"):
        if found[name] is not None:
            about.add_row(name.replace("_", " "), str(found[name]))
    for name, value in (found["metric"] or {}).items():
        about.add_row(name, f"{value:.4f}")
    for name, value in flattened(found["run"]).items():
        about.add_row(name, str(value))
    about.add_row("written by", ", ".join(f"{k} {v}" for k, v in (found["versions"] or {}).items()))
    console.print(about)
    parts = Table("part", "tensors", "numbers", "MB")
    for name, sizes in found["parts"].items():
        numbers = ", ".join(f"{n:,} {dtype}" for dtype, n in sizes["num_values"].items())
        megabytes = f"{sizes['num_bytes'] / 1e6:,.1f}"
        parts.add_row(name, str(sizes["num_tensors"]), numbers, megabytes)
    console.print(parts)
    for line in found["integrity"]:
        console.print(line, markup=False, soft_wrap=True)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one dict, with names such as counters.tokens.

    Args:
        tree: nested.
        prefix: put before every name.

    Returns:
        The leaves.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
