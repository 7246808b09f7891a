"""From a checkpoint back to the place where the run stood when it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_grpo.loaders import Slot
from lightning_grpo.queue import ReplayShape, cut_rollout, make_minibatches
from lightning_grpo.resume import logged, randomness, rollouts
from lightning_grpo.resume.marks import rows_written
from lightning_grpo.resume.places import Place, finish, finish_batch, log_row, set_steps
from lightning_grpo.types import to_device

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule


def go_on(module: GRPOModule) -> None:
    """Bring a run to the mark of its checkpoint, and do what was to follow it. Collective.

    Args:
        module: in the last hook before the first batch; weights, moments, counters, callbacks and
            loops are those of the checkpoint.
    """
    saved = module.marks.resume_from
    if saved is None:
        return
    trainer, place, point = module.trainer, Place(**saved["place"]), saved["point"]
    set_steps(trainer, place)
    logged.put_back(trainer, saved["logged"], repeats_batch=point in ("rollout", "queue"))
    module.minibatch_metrics = dict(saved["metrics"])
    module.is_step_skipped = saved["is_step_skipped"]
    if saved["old_policy"] is not None and module.old_policy is not None:
        module.old_policy.put(saved["old_policy"])
    stepped = None
    if len(saved["ranks"]) == trainer.world_size:
        state = saved["ranks"][trainer.global_rank]
        stepped = restore_rollout(module, saved, state["rollout"])
        randomness.put_back(state["generators"], module.device)
    else:
        go_on_with_other_ranks(module, saved)
    module.marks.go_on(module)
    if stepped is not None:
        finish_batch(trainer, stepped, place.num_batches - 1)
    elif saved["is_row_due"] and is_row_missing(trainer, saved["num_rows"]):
        log_row(trainer)
    finish(trainer, module, place)


def is_row_missing(trainer: L.Trainer, num_rows: int | None) -> bool:
    """Whether a process was ended between a save and the row of the metrics that follows it."""
    found = rows_written(trainer)
    return found is not None and num_rows is not None and found <= num_rows


def restore_rollout(
    module: GRPOModule, saved: dict[str, Any], fields: dict[str, Any] | None
) -> Slot | None:
    """Put the rollout and what is left of its minibatches where they were. Collective.

    Args:
        module: without a rollout.
        saved: of the mark.
        fields: of this rank's rollout.

    Returns:
        The batch that the last step was made on, if its hooks are still to be called.
    """
    if fields is None:
        return None
    module.rollout = to_device(rollouts.decoded(fields), module.device)
    if saved["shape"] is None:
        return None  # it has only been scored: InnerEpochReplay takes it from here
    module.replay_shape = shape = ReplayShape(*saved["shape"])
    cut = cut_rollout(module, module.rollout, shape)
    num_taken = saved["num_taken"]
    is_stepped = saved["point"] == "step"
    window = module.trainer.accumulate_grad_batches
    if (len(cut.rows) - num_taken) % window:
        rank_zero_warn(
            f"{len(cut.rows) - num_taken} minibatches were left of a rollout, which is no multiple "
            f"of the present trainer.accumulate_grad_batches {window}: they are left out"
        )
        end_iteration(module)
        return None
    left = make_minibatches(module, module.rollout, cut, window, first=num_taken)
    module.queue.extend(left)
    if not is_stepped:
        return None
    slot = Slot()
    # Only its hooks see it: what its loss was divided by is of no use any more.
    slot.minibatch = make_minibatches(module, module.rollout, cut, 1, first=num_taken - 1)[0]
    return slot


def go_on_with_other_ranks(module: GRPOModule, saved: dict[str, Any]) -> None:
    """Go on with another number of ranks than the checkpoint is of, and say what that means.

    Args:
        module: without a rollout.
        saved: of the mark.
    """
    ranks = saved["ranks"]
    message = (
        f"the checkpoint is of {len(ranks)} processes, and this run has "
        f"{module.trainer.world_size}: it goes on, but not to the same bits"
    )
    if ranks[0]["rollout"] is not None and saved["num_taken"]:
        end_iteration(module)
        message += "; the minibatches that were left of a rollout are left out"
    elif ranks[0]["rollout"] is not None:
        module.trainer.datamodule.load_state_dict(saved["data_before"])  # type: ignore[attr-defined]
        message += "; a rollout that no step was made on is made again"
    rank_zero_warn(message)


def end_iteration(module: GRPOModule) -> None:
    """Leave the rest of a rollout."""
    module.rollout = None
    module.queue.clear()
    module.counters.iterations += 1
