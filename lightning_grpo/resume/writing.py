"""From the last mark of a run to what a checkpoint holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from lightning_grpo.resume import logged, randomness, rollouts
from lightning_grpo.resume.marks import Mark
from lightning_grpo.resume.places import loops_at
from lightning_grpo.saved_run import KEY

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule


class NotSavable(RuntimeError):
    """Weights and all else would be those of two moments."""


def write_mark(module: GRPOModule, checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint say where the run stood at its last mark. Collective.

    Args:
        module: in fit.
        checkpoint: as Lightning has made it, of the present moment; weights, moments and schedules
            are kept.

    Raises:
        NotSavable: the weights have changed since the mark, or the ranks are at different ones.
    """
    marks = module.marks
    problem, mark = marks.problem(module), marks.last
    serial = 0 if problem or mark is None else mark.serial
    ends = module.max_over_ranks(torch.tensor([float(serial), -float(serial)])).tolist()
    if problem or mark is None:
        raise NotSavable(problem)
    if ends != [serial, -serial]:
        raise NotSavable("its processes were stopped at different places")
    checkpoint["epoch"], checkpoint["global_step"] = mark.place.num_epochs, mark.place.num_steps
    checkpoint["loops"] = loops_at(mark.place, checkpoint["loops"])
    checkpoint["callbacks"] = mark.callbacks
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if data is not None and mark.data:
        checkpoint[type(data).__qualname__] = mark.data
    checkpoint[KEY] = mark.record | {"mark": state_of(module, mark)}


def state_of(module: GRPOModule, mark: Mark) -> dict[str, Any]:
    """A mark as tensors and plain values; on rank 0 with those of all ranks. Collective."""
    own = {
        "generators": randomness.encoded(mark.generators),
        "rollout": None if mark.rollout is None else rollouts.encoded(mark.rollout),
    }
    old_policy = None
    if module.old_policy is not None and mark.num_taken:
        old_policy = module.old_policy.whole(is_kept=module.trainer.is_global_zero)
    return {
        "point": mark.point,
        "place": mark.place.state_dict(),
        "shape": None if mark.shape is None else list(mark.shape),
        "num_taken": mark.num_taken,
        "data_before": mark.data_before,
        "logged": logged.encoded(mark.logged),
        "metrics": mark.metrics,
        "is_step_skipped": mark.is_step_skipped,
        "num_rows": mark.num_rows,
        "is_row_due": mark.is_row_due,
        "old_policy": old_policy,
        "ranks": gathered(module, own),
    }


def gathered(module: GRPOModule, own: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all ranks, on rank 0; nothing elsewhere. Collective."""
    trainer = module.trainer
    if trainer.world_size == 1:
        return [own]
    if module.marks.group is None:
        # Not over a GPU's own group, which would take the room of all states on the GPU of rank 0.
        module.marks.group = distributed.new_group(backend="gloo")
    states: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    distributed.gather_object(own, states, dst=0, group=module.marks.group)
    return states or []
