"""Lightning's CheckpointIO on folders of safetensors and JSON."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from lightning_grpo.checkpoints.files import Place, locate
from lightning_grpo.checkpoints.folder import (
    kind_of,
    next_serial,
    remove_checkpoint,
    resolve_checkpoint,
)
from lightning_grpo.checkpoints.manifest import Manifest, Metric, installed_versions
from lightning_grpo.checkpoints.store import Sections, open_checkpoint, write_checkpoint


class FolderCheckpointIO(CheckpointIO):
    """Saves what Lightning gives it as a checkpoint folder, and loads such folders.

    A callback installs it in `setup`: `trainer.strategy.checkpoint_io = FolderCheckpointIO()`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint. One process does it.

        Args:
            checkpoint: of Lightning; plain values and tensors only.
            path: folder that is not there yet, such as `new_url` gives.
            storage_options: the Metric for which it is kept, if any.
        """
        place = locate(path)
        manifest = manifest_of(checkpoint, place, metric_of(storage_options))
        write_checkpoint(str(place), sections_of(checkpoint), manifest)

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a whole checkpoint, of one process or sharded, and check it against its hashes.

        Args:
            path: as `resolve_checkpoint` takes it.
            map_location: has no effect, the tensors are on the CPU. The weights of a local
                checkpoint are views of its files, and take no memory of their own.
            weights_only: has no effect, nothing is ever unpickled.

        Returns:
            What was saved.
        """
        sections = open_checkpoint(resolve_checkpoint(path)).read_all()
        checkpoint = sections.state
        if sections.weights is not None:
            checkpoint["state_dict"] = sections.weights
        if sections.optimizers is not None:
            checkpoint["optimizer_states"] = sections.optimizers
        return checkpoint

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint; nothing to do when it is gone."""
        remove_checkpoint(path)


def sections_of(checkpoint: dict[str, Any]) -> Sections:
    """Lightning's dict in the parts that are stored apart; it stays as it is."""
    state = dict(checkpoint)
    weights = state.pop("state_dict", None)
    return Sections(state, weights, state.pop("optimizer_states", None))


def metric_of(storage_options: Any | None) -> Metric | None:
    """The metric that came as the storage options of a save."""
    if storage_options is not None and not isinstance(storage_options, Metric):
        raise TypeError(
            "storage_options of a checkpoint is the Metric for which it is kept, or None, got "
            f"{type(storage_options).__name__}"
        )
    return storage_options


def manifest_of(checkpoint: dict[str, Any], place: Place, metric: Metric | None) -> Manifest:
    """What is known of a checkpoint that is about to be written.

    Args:
        checkpoint: of Lightning.
        place: where it will be.
        metric: for which it is kept, if any.

    Returns:
        A manifest without files.
    """
    record = checkpoint.get("lightning_grpo") or {}
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Manifest(
        kind=kind_of(place.name),
        step=checkpoint.get("global_step", 0),
        serial=next_serial(str(place.parent)),
        files={},
        iteration=record.get("counters", {}).get("iterations"),
        stage=record.get("stage"),
        algorithm=record.get("algorithm"),
        world_size=torch.distributed.get_world_size() if is_distributed else 1,
        metric=metric,
        versions=installed_versions(),
    )
