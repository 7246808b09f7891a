"""Marks: where the run stands at the moments from which it can be resumed.

A mark holds all that a checkpoint holds but weights and moments, mostly as references, so that one
can be taken at every step. A checkpoint is the last mark and the weights as they are. It can be
written at any time at which the weights are still those of the mark: see `Marks.problem`.

    start    before the first batch
    rollout  a rollout has been scored, the stage has been entered
    queue    log-probs and advantages are there, no minibatch is used up
    step     an optimizer step has been made, the hooks after it have not been called
    batch    they have been called

What a signal or an error ends later than its last mark is done again by the resumed run.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.trainer import call
from torch import Tensor

from lightning_grpo.queue import ReplayShape
from lightning_grpo.resume.logged import Logged, logged_now
from lightning_grpo.resume.places import Place, is_row_due, place_after_batch, place_before_batch
from lightning_grpo.resume.randomness import Generators, generators_now
from lightning_grpo.saved_run import record_of
from lightning_grpo.snapshot import interrupts_deferred
from lightning_grpo.types import Minibatch, Rollout

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule

Point = Literal["start", "rollout", "queue", "step", "batch"]


@dataclass(frozen=True)
class Mark:
    """Where a run stood."""

    serial: int
    """Number of the mark in this process, from 1."""
    point: Point
    place: Place
    weights: tuple[Any, ...]
    """What the weights have gone through, see `weights_now`."""
    callbacks: dict[str, Any]
    record: dict[str, Any]
    data: dict[str, Any]
    data_before: dict[str, Any]
    """The same before the prompts of the present rollout were taken."""
    generators: Generators
    logged: Logged
    rollout: Rollout | None
    shape: ReplayShape | None
    """How the rollout is cut; None while it is not."""
    num_taken: int
    """Minibatches of the rollout that are used up."""
    metrics: dict[str, float]
    """Of the minibatch before an optimizer step, for the hooks after it."""
    is_step_skipped: bool
    num_rows: int | None
    """Rows of metrics.csv."""
    is_row_due: bool
    """Whether the row of the last step is to follow."""


class Marks:
    """Takes the marks of a run."""

    def __init__(self) -> None:
        self.last: Mark | None = None
        self.resume_from: dict[str, Any] | None = None
        """What a checkpoint says of its mark, until the run goes on from there."""
        self.group: Any = None
        """Ranks that send their states to rank 0, once they have."""
        self.resumed = 0
        """Serial of the mark that the run was resumed at; nothing new is in those up to it."""
        self._num_marks = 0
        self._is_stepping = False
        self._shield = contextlib.ExitStack()
        self._data_before: dict[str, Any] = {}

    def begin(self) -> None:
        """Forget what was before this fit."""
        self.last = self.resume_from = None
        self.resumed = 0
        self._is_stepping = False

    def before_update(self, module: GRPOModule, minibatch: Minibatch | None) -> None:
        """Mark the queue from which the first minibatch has just been taken."""
        if minibatch is not None and minibatch.index == 0:
            place = place_before_batch(module.trainer)
            self._take(module, "queue", place, shape=module.replay_shape)

    def before_step(self) -> None:
        """Hold back a Ctrl-C, which must not end the run inside of the step."""
        self._is_stepping = True
        self._shield.close()
        self._shield.enter_context(interrupts_deferred())

    def after_step(self, module: GRPOModule, num_taken: int) -> None:
        """Mark an optimizer step, or one that was skipped.

        Args:
            module: of the run.
            num_taken: minibatches of the rollout that are used up.
        """
        place = place_after_batch(module.trainer)
        self._take(module, "step", place, shape=module.replay_shape, num_taken=num_taken)
        self._is_stepping = False
        self._shield.close()

    def after_batch(self, module: GRPOModule) -> None:
        """Mark the end of an accumulation window, when all callbacks have had it."""
        last = self.last
        if last is None or last.point != "step":
            return
        trainer = module.trainer
        self._take(
            module,
            "batch",
            place_after_batch(trainer),
            shape=module.replay_shape if module.queue else None,
            num_taken=last.num_taken if module.queue else 0,
            is_row_due=is_row_due(trainer),
        )

    def after_rollout(self, module: GRPOModule) -> None:
        """Mark a scored rollout, once its stage has been entered."""
        self._take(module, "rollout", place_before_batch(module.trainer))

    def after_validation(self, module: GRPOModule) -> None:
        """Mark what callbacks have made of a validation."""
        last = self.last
        if module.trainer.state.fn != "fit":
            return
        if last is None:
            self._take(module, "start", Place())
        elif last.point in ("start", "batch"):
            place, num_taken = last.place.validated(), last.num_taken
            self._take(module, last.point, place, shape=last.shape, num_taken=num_taken)

    def go_on(self, module: GRPOModule) -> None:
        """Mark the place of the checkpoint that the run has been brought to."""
        assert self.resume_from is not None
        saved, self.resume_from = self.resume_from, None
        self._take(
            module,
            saved["point"],
            Place(**saved["place"]),
            shape=module.replay_shape if module.rollout is not None and saved["shape"] else None,
            num_taken=saved["num_taken"] if module.rollout is not None else 0,
            num_rows=saved["num_rows"],
            is_row_due=saved["is_row_due"],
        )
        self.resumed = self._num_marks

    def before_rollout(self, module: GRPOModule) -> None:
        """Note where the prompts of the next rollout begin."""
        self._data_before = data_state(module)

    def problem(self, module: GRPOModule) -> str:
        """Why no checkpoint can be written now; empty when one can."""
        if self.last is None:
            return "the run has not begun"
        if self._is_stepping:
            return "it was stopped inside of an optimizer step"
        if self.last.weights != weights_now(module):
            return "it was stopped while its weights were exchanged"
        return ""

    def let_signals_through(self) -> None:
        """Stop holding back a Ctrl-C, after an error inside of a step."""
        with contextlib.suppress(KeyboardInterrupt):
            self._shield.close()

    def _take(
        self,
        module: GRPOModule,
        point: Point,
        place: Place,
        *,
        shape: ReplayShape | None = None,
        num_taken: int = 0,
        num_rows: int | None = None,
        is_row_due: bool = False,
    ) -> None:
        trainer = module.trainer
        if self.resume_from is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._num_marks += 1
        self.last = Mark(
            serial=self._num_marks,
            point=point,
            place=place,
            weights=weights_now(module),
            callbacks=copied(call._call_callbacks_state_dict(trainer)),
            record=record_of(module),
            data=data_state(module),
            data_before=self._data_before,
            generators=generators_now(module.device),
            logged=logged_now(trainer),
            rollout=module.rollout,
            shape=shape,
            num_taken=num_taken,
            metrics=dict(module.minibatch_metrics),
            is_step_skipped=module.is_step_skipped,
            num_rows=rows_written(trainer) if num_rows is None else num_rows,
            is_row_due=is_row_due,
        )


def weights_now(module: GRPOModule) -> tuple[Any, ...]:
    """What changes with weights and moments: steps, rollbacks, the stage and its critic."""
    counters = module.counters
    return module.trainer.global_step, counters.rollbacks, module.stage, module.critic is None


def data_state(module: GRPOModule) -> dict[str, Any]:
    """Where the data module is in the stream of prompts."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    return data.state_dict() if data is not None else {}


def rows_written(trainer: Any) -> int | None:
    """Rows of the metrics of this run; None where no logger counts them."""
    counts = [logger.num_rows for logger in trainer.loggers if hasattr(logger, "num_rows")]
    return max(counts, default=None)


def copied(value: Any) -> Any:
    """A copy that later changes do not reach, of dicts, lists, tuples, tensors and plain values."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: copied(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(entry) for entry in value)
    return value
