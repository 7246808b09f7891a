"""average: one checkpoint whose weights are the mean of those of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from lightning_grpo.checkpoints import (
    Checkpoint,
    Manifest,
    Sections,
    open_checkpoint,
    resolve_checkpoint,
    write_checkpoint,
)
from lightning_grpo.checkpoints.manifest import installed_versions


def average(
    ckpt_paths: list[str], out: str, weights: list[float] | None = None, dry_run: bool = False
) -> None:
    """Write the mean of the weights of several checkpoints as a checkpoint.

    mean = sum_i w_i theta_i / sum_i w_i

    Everything else in it is that of the first one, but for the optimizer, which belongs to no mean:
    it can be measured, exported and compared, and no fit resumes from it.

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization"
    (arXiv:1803.05407), sec. 3; adapters are averaged as they are, which is the mean of neither
    products nor models.

    Args:
        ckpt_paths: two or more checkpoints of one model, in whose order `weights` stand.
        out: folder to write the mean to; nothing may be there.
        weights: one for each, 1 each when null.
        dry_run: say what would be written, and write nothing.
    """
    sources = [open_checkpoint(resolve_checkpoint(path)) for path in ckpt_paths]
    shares = shares_of(len(sources), weights)
    refuse_different(sources)
    if Path(out).exists():
        raise ValueError(f"--out {out} is there already: name a folder that is not")
    names = list(sources[0].tensor_info())
    if dry_run:
        print(f"would write {len(names)} tensors, the mean of {len(sources)} checkpoints, to {out}")
        return
    sets = [source.tensors("weights") for source in sources]
    mean = {
        name: mean_of([tensors.read(name) for tensors in sets], shares)
        for name in track(names, "averaging", transient=True)
    }
    about = sources[0].manifest
    write_checkpoint(
        out,
        Sections(sources[0].read_state(), mean),
        Manifest(
            kind="other",
            step=about.step,
            serial=about.serial,
            files={},
            iteration=about.iteration,
            stage=about.stage,
            algorithm=about.algorithm,
            versions=installed_versions(),
        ),
    )
    print(f"wrote {out}: the mean of {len(sources)} checkpoints")


def shares_of(num_sources: int, weights: Sequence[float] | None) -> list[float]:
    """What each checkpoint counts for, in all 1.

    Args:
        num_sources: checkpoints.
        weights: one for each, or None.

    Returns:
        The shares.

    Raises:
        ValueError: too few checkpoints, or weights that make no mean.
    """
    if num_sources < 2:
        raise ValueError(f"--ckpt_paths needs two checkpoints or more, got {num_sources}")
    weights = [1.0] * num_sources if weights is None else list(weights)
    if len(weights) != num_sources:
        raise ValueError(f"--weights has {len(weights)} numbers for {num_sources} checkpoints")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"--weights must be >= 0 and not all 0, got {weights}")
    return [weight / sum(weights) for weight in weights]


def refuse_different(sources: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints that are not of one model.

    Args:
        sources: at least one.

    Raises:
        ValueError: one has other tensors than the first.
    """
    first = {name: info.shape for name, info in sources[0].tensor_info().items()}
    for source in sources[1:]:
        other = {name: info.shape for name, info in source.tensor_info().items()}
        if other != first:
            names = [n for n in {**first, **other} if first.get(n) != other.get(n)]
            raise ValueError(
                f"{source.url} is not of the same model as {sources[0].url}: they differ in "
                f"{names[0]} and {len(names) - 1} other tensors"
            )


def mean_of(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean of tensors of one shape, in the type of the first; integers as the first.

    Args:
        tensors: at least one.
        shares: one for each, in all 1.

    Returns:
        The mean, added up in float64.
    """
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total += tensor.double() * share
    return total.to(tensors[0].dtype)
