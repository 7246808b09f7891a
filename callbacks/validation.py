"""ValidateAtEnds: measure before the first step and after the last."""

from __future__ import annotations

import time

import lightning as L

from lightning_grpo.module import GRPOModule
from lightning_grpo.resume.places import validate_now


class ValidateAtEnds(L.Callback):
    """Validate once before the first step (after a cold start) and once after the last.

    Without it a run shows no number to compare with.

    Args:
        at_start: before the first step of a new run; a resumed run is not measured again.
        at_end: after the last step, unless a validation has just been made there.
    """

    def __init__(self, at_start: bool = True, at_end: bool = True) -> None:
        self.at_start = at_start
        self.at_end = at_end
        self.results: list[tuple[int, dict[str, float]]] = []
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Measure the policy that reinforcement learning starts from."""
        if self.at_start and trainer.global_step == 0 and not self.results:
            validate_now(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Remember every result, and the time it took, for the summary."""
        module.phase.spend("validating", time.perf_counter() - self._start)
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        if trainer.state.fn == "fit" and metrics:
            self.results.append((trainer.global_step, metrics))

    def on_train_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Measure the policy that the run ends with."""
        was_just_measured = self.results and self.results[-1][0] == trainer.global_step
        if self.at_end and not was_just_measured:
            validate_now(trainer, module)

    def state_dict(self) -> dict[str, object]:
        """The results so far, so that a resumed run can still show the first."""
        return {"results": [[step, metrics] for step, metrics in self.results]}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take back the results of the run that is resumed."""
        self.results = [(step, dict(m)) for step, m in state_dict["results"]]  # type: ignore[attr-defined]
