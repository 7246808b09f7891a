"""Where Lightning's loops are, and bringing them there again.

Lightning saves its counters as they are at the moment, tells from small differences between them
at which moment that was, and is wrong in some: it leaves out a validation or the end of an epoch,
or trains one batch too many. Here they are only ever saved as they are between two batches, and
what was still to do after the last of them is done before the first one of the resumed run.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.trainer import call

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule


_OPTIMIZATION = "epoch_loop.automatic_optimization.optim_progress"


@dataclass(frozen=True)
class Place:
    """A place between two batches."""

    num_epochs: int = 0
    """Epochs that are over."""
    is_in_epoch: bool = False
    """False before the first batch of all."""
    num_batches: int = 0
    """Batches of this epoch that are over."""
    num_batches_of_all: int = 0
    """The same over all epochs."""
    is_last_batch: bool = False
    """Whether the epoch had no more."""
    num_steps: int = 0
    """Optimizer steps, skipped ones included."""
    num_steps_of_epoch: int = 0
    is_validation_due: bool = False
    """Whether a validation comes before the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def validated(self) -> Place:
        """The same place after a validation."""
        return replace(self, is_validation_due=False)


def place_before_batch(trainer: L.Trainer) -> Place:
    """The place from which the batch that has just begun can be begun again."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return _place(
        trainer,
        is_last_batch=False,
        num_batches=progress.current.completed,
        num_batches_of_all=progress.total.completed,
    )


def place_after_batch(trainer: L.Trainer) -> Place:
    """The place after the batch whose hooks are called now."""
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    progress: Any = loop.batch_progress
    return _place(
        trainer,
        num_batches=progress.current.processed,
        num_batches_of_all=progress.total.processed,
        is_last_batch=progress.is_last_batch,
        is_validation_due=loop._should_check_val_fx(fetcher),
    )


def _place(trainer: L.Trainer, **changes: Any) -> Place:
    loop = trainer.fit_loop.epoch_loop
    epochs: Any = trainer.fit_loop.epoch_progress
    steps = loop.automatic_optimization.optim_progress.optimizer.step
    return Place(
        num_epochs=epochs.current.processed,
        is_in_epoch=True,
        num_steps=steps.total.completed,
        num_steps_of_epoch=steps.current.completed,
        **changes,
    )


def loops_at(place: Place, loops: dict[str, Any]) -> dict[str, Any]:
    """What Lightning saves of its loops when it is at a place.

    Args:
        place: where they are to be.
        loops: as they are now.

    Returns:
        A changed copy.
    """
    loops = copy.deepcopy(loops)
    fit = loops["fit_loop"]
    begun = place.num_epochs + place.is_in_epoch
    over = {"processed": place.num_epochs, "completed": place.num_epochs}
    fit["epoch_progress"] = _both({"ready": begun, "started": begun} | over)
    fit["epoch_loop.batch_progress"] = {
        "current": _all_at(place.num_batches),
        "total": _all_at(place.num_batches_of_all),
        "is_last_batch": place.is_last_batch,
    }
    step = fit[_OPTIMIZATION]["optimizer"]["step"]
    step["current"] = {"ready": place.num_steps_of_epoch, "completed": place.num_steps_of_epoch}
    step["total"] = {"ready": place.num_steps, "completed": place.num_steps}
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = place.num_steps
    fit["epoch_loop.val_loop.batch_progress"] = {**_both(_all_at(0)), "is_last_batch": False}
    return loops


def _all_at(number: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), number)


def _both(tracker: dict[str, int]) -> dict[str, Any]:
    return {"current": dict(tracker), "total": dict(tracker)}


def let_run_begin(trainer: L.Trainer, loops: dict[str, Any]) -> None:
    """Keep Lightning from calling a run over before its end was measured.

    Lightning does not begin a run that has made all its steps, and so would leave out a
    validation after the last one. `finish` puts the number of steps right.

    Args:
        trainer: in fit.
        loops: of a checkpoint, before Lightning has read them; changed.
    """
    step = loops["fit_loop"][_OPTIMIZATION]["optimizer"]["step"]
    if 0 < trainer.max_steps <= step["total"]["completed"]:
        step["total"] = dict.fromkeys(("ready", "completed"), trainer.max_steps - 1)


def set_steps(trainer: L.Trainer, place: Place) -> None:
    """Let Lightning count the steps of a place, and log what is due as of its last step.

    Args:
        trainer: in fit, resumed at that place.
        place: where the run is resumed.
    """
    loop = trainer.fit_loop.epoch_loop
    total = loop.automatic_optimization.optim_progress.optimizer.step.total
    total.ready = total.completed = place.num_steps
    loop._batches_that_stepped = max(place.num_steps - 1, 0)


def finish_batch(trainer: L.Trainer, batch: Any, batch_idx: int) -> None:
    """Call the hooks that come after an optimizer step.

    Args:
        trainer: in fit, with the state of right after the step.
        batch: that the step was made on.
        batch_idx: its number in the epoch.
    """
    call._call_callback_hooks(trainer, "on_train_batch_end", {}, batch, batch_idx)
    call._call_lightning_module_hook(trainer, "on_train_batch_end", {}, batch, batch_idx)
    trainer._logger_connector.on_batch_end()
    log_row(trainer)


def log_row(trainer: L.Trainer) -> None:
    """Write the row of the metrics that belongs to the last step."""
    trainer._logger_connector.update_train_step_metrics()


def count_steps(trainer: L.Trainer) -> None:
    """Keep the step that is logged at the number of steps.

    Lightning's own counter of them is one ahead after some resumes.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def is_row_due(trainer: L.Trainer) -> bool:
    """Whether the step whose hooks are called now will have a row in the metrics."""
    return bool(trainer._logger_connector.should_update_logs)


def validate_now(trainer: L.Trainer, module: GRPOModule) -> None:
    """Run fit's own validation loop between steps, as Lightning does inside an epoch.

    Args:
        trainer: in fit.
        module: whose policy is measured.
    """
    if not trainer.enable_validation or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    try:
        loop.run()
    finally:
        trainer.training = True
        connector._first_loop_iter = first_loop_iter
    module.policy.train()


def finish(trainer: L.Trainer, module: GRPOModule, place: Place) -> None:
    """Do what Lightning would have done between the last batch and the next.

    Args:
        trainer: in fit, resumed at a place, in the last hook before the first batch.
        module: of the run.
        place: where the run is resumed.
    """
    loop = trainer.fit_loop.epoch_loop
    if place.is_validation_due:
        validate_now(trainer, module)
    loop._batches_that_stepped = place.num_steps
    if place.is_last_batch or 0 < trainer.max_steps <= place.num_steps:
        finish_epoch(trainer)


def finish_epoch(trainer: L.Trainer) -> None:
    """End the epoch that a run was resumed at the end of, so that Lightning begins the next."""
    fit_loop = trainer.fit_loop
    # First: none of the loops must take itself for one that goes on in the middle.
    fit_loop.epoch_loop.on_iteration_done()
    fit_loop.epoch_loop.val_loop.on_iteration_done()
    fit_loop.on_iteration_done()
    fit_loop.on_advance_end()
