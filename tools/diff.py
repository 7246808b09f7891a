"""diff: how two checkpoints differ, in configuration, state and weights."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_grpo.checkpoint_paths import run_dir_of
from lightning_grpo.checkpoints import Checkpoint, open_checkpoint, resolve_checkpoint
from lightning_grpo.run_files import newest_config
from lightning_grpo.tools.inspect import flattened, plain_values, record_in


class Distance(NamedTuple):
    """How far a tensor has moved."""

    relative: float | None
    """Norm of the difference over the norm of the first; None where that is zero and moved."""
    largest: float
    """Largest difference of one number."""


def diff(first: str, second: str, num_tensors: int = 20, json: str | None = None) -> dict[str, Any]:
    """Print what differs between two checkpoints: options, state of the run, and each tensor.

    Tensors are read one pair at a time.

    Args:
        first: a checkpoint's folder or URL, or .../checkpoints/last, best or auto.
        second: the other one.
        num_tensors: how many of the tensors that differ most are printed; the file has all.
        json: file to write the whole comparison to.

    Returns:
        options, state: name -> both values where they differ; tensors: name -> distance, 0 where
        equal; only_in_first and only_in_second: names of tensors.
    """
    if num_tensors < 0:
        raise ValueError(f"--num_tensors must be >= 0, got {num_tensors}")
    both = [open_checkpoint(resolve_checkpoint(path)) for path in (first, second)]
    distances, alone = compare_weights(*both)
    found = {
        "options": differing(*(options_of(checkpoint) for checkpoint in both)),
        "state": differing(*(state_of(checkpoint) for checkpoint in both)),
        "tensors": {name: distance._asdict() for name, distance in distances.items()},
        "only_in_first": alone[0],
        "only_in_second": alone[1],
    }
    print_comparison(found, num_tensors)
    if json is not None:
        Path(json).write_text(json_format.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def compare_weights(
    first: Checkpoint, second: Checkpoint
) -> tuple[dict[str, Distance], tuple[list[str], list[str]]]:
    """Distances of the weights that both have, and the names that one of them has.

    A tensor of another shape counts as another tensor.

    Args:
        first: a checkpoint.
        second: another.

    Returns:
        Name -> distance; names only in the first, and only in the second.
    """
    infos = first.tensor_info(), second.tensor_info()
    shared = [
        n for n, info in infos[0].items() if n in infos[1] and info.shape == infos[1][n].shape
    ]
    sets = first.tensors("weights"), second.tensors("weights")
    distances = {
        name: distance_of(sets[0].read(name), sets[1].read(name))
        for name in track(shared, "comparing", transient=True, disable=not shared)
    }
    alone = tuple([n for n in info if n not in distances] for info in infos)
    return distances, alone  # type: ignore[return-value]


def distance_of(first: Tensor, second: Tensor) -> Distance:
    """How far one tensor is from another of its shape.

    Args:
        first: where it was.
        second: where it is.

    Returns:
        The distance.
    """
    if not first.numel():
        return Distance(0.0, 0.0)
    change = second.double() - first.double()
    norm, moved = float(first.double().norm()), float(change.norm())
    relative = moved / norm if norm else (None if moved else 0.0)
    return Distance(relative, float(change.abs().max()))


def options_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the run that a checkpoint lies in, flat; empty when it lies alone."""
    run_dir = run_dir_of(checkpoint.url)
    file = newest_config(run_dir) if run_dir is not None else None
    if file is None:
        return {}
    return flattened(yaml.safe_load(file.read_text(encoding="utf-8")) or {})


def state_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the run was, flat."""
    manifest = checkpoint.manifest
    about = {name: getattr(manifest, name) for name in ("step", "iteration", "stage", "world_size")}
    return about | flattened(plain_values(record_in(checkpoint)))


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Names whose values differ, with both values; None stands for none."""
    names = [*first, *(name for name in second if name not in first)]
    pairs = {name: [first.get(name), second.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def print_comparison(found: Mapping[str, Any], num_tensors: int) -> None:
    """Print a comparison as tables.

    Args:
        found: of `diff`.
        num_tensors: most tensors to print.
    """
    console = Console(highlight=False)
    for name in ("options", "state"):
        table = Table(name, "first", "second")
        for option, pair in found[name].items():
            table.add_row(option, *(str(value) for value in pair))
        console.print(table if found[name] else f"{name}: the same")
    moved = {n: d for n, d in found["tensors"].items() if d["largest"] != 0}
    relative = {n: math.inf if d["relative"] is None else d["relative"] for n, d in moved.items()}
    order = sorted(moved, key=lambda n: -relative[n])
    table = Table("tensor", "relative distance", "largest difference")
    for name in order[:num_tensors]:
        table.add_row(name, f"{relative[name]:.3e}", f"{moved[name]['largest']:.3e}")
    if table.row_count:
        console.print(table)
    console.print(f"{len(moved)} of {len(found['tensors'])} tensors differ")
    for name in ("only_in_first", "only_in_second"):
        if found[name]:
            console.print(f"{name.replace('_', ' ')}: {', '.join(found[name])}", soft_wrap=True)
