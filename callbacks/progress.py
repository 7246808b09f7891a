"""IterationProgress: the progress bar, counted in iterations, and the phase now running."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lightning_grpo.module import GRPOModule
from lightning_grpo.types import Rollout


class IterationProgress(ProgressBar):
    """Show iteration, reward, KL, tokens per second, and what the run is doing.

    On a terminal it is a bar that stays at the bottom; elsewhere (a file, a job's log) it is one
    line per iteration, at most one in `seconds_between_lines`, and the last one.

    Args:
        refresh_per_second: how often the bar is drawn.
        seconds_between_lines: least time between two lines where there is no terminal.
    """

    def __init__(self, refresh_per_second: float = 4.0, seconds_between_lines: float = 5.0) -> None:
        super().__init__()
        self.refresh_per_second = refresh_per_second
        self.seconds_between_lines = seconds_between_lines
        self.console = Console(file=sys.stderr)
        self.bar: _TwoLines | None = None
        self._is_enabled = True
        self._last_line = 0.0

    def disable(self) -> None:
        """Show nothing, as Lightning asks on all ranks but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._is_enabled = True

    def on_fit_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Draw the bar, before a cold start or the first validation."""
        self._start(module, "iteration", None)

    def on_validation_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Draw a bar for `validate`; inside a fit the phase tells enough."""
        if trainer.state.fn == "validate":
            self._start(module, "batch", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Draw a bar for `test`."""
        self._start(module, "batch", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Draw a bar for `predict`."""
        self._start(module, "batch", sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Move on by a batch of `validate`."""
        if trainer.state.fn == "validate":
            self._advance()

    def on_test_batch_end(self, *args: Any) -> None:
        """Move on by a batch of `test`."""
        self._advance()

    def on_predict_batch_end(self, *args: Any) -> None:
        """Move on by a batch of `predict`."""
        self._advance()

    def on_validation_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Leave the bar of `validate` as it is, above the results."""
        if trainer.state.fn == "validate":
            self._stop(module, "done")

    def on_test_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Leave the bar as it is, above the results."""
        self._stop(module, "done")

    def on_predict_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Leave the bar as it is."""
        self._stop(module, "done")

    def _start(self, module: GRPOModule, unit: str, total: float | None) -> None:
        if not self._is_enabled or not self.console.is_terminal or self.bar is not None:
            return
        self.bar = _TwoLines(
            TextColumn(unit),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            _PhaseNow(module),
            console=self.console,
            refresh_per_second=self.refresh_per_second,
        )
        original = sys.stderr
        self.bar.start()
        redirect_logging(original, sys.stderr)
        self.bar.add_task(unit, total=total)
        module.print_above_bar = self.bar.console.print

    def _advance(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0])

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Set the number of iterations, now that the data is there."""
        if self.bar is not None:
            total = num_iterations(trainer, module)
            self.bar.update(self.bar.task_ids[0], total=total, completed=module.counters.iterations)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Take the newest metrics."""
        if self.bar is not None:
            self.bar.metrics = metrics_line(trainer)

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Move on by one."""
        if self.bar is not None:
            done, total = module.counters.iterations, num_iterations(trainer, module)
            self.bar.update(self.bar.task_ids[0], completed=done, total=total)
        if self.bar is not None or not self._is_enabled:
            return
        now = time.monotonic()
        done, total = module.counters.iterations, num_iterations(trainer, module)
        if now - self._last_line < self.seconds_between_lines and done != total:
            return
        self._last_line = now
        of_total = "" if total is None else f"/{total}"
        print(f"iteration {done}{of_total} {metrics_line(trainer)}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Leave the bar as it is."""
        self._stop(module, "done")

    def on_exception(
        self, trainer: L.Trainer, module: GRPOModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop(module, "stopped")

    def teardown(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop(module, "done")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        (self.bar.console.print if self.bar is not None else print)(*args)

    def _stop(self, module: GRPOModule, last_phase: str) -> None:
        if self.bar is not None:
            module.phase.enter(last_phase)
            redirected = sys.stderr
            self.bar.stop()
            redirect_logging(redirected, sys.stderr)
            self.bar = None
            module.print_above_bar = None


def redirect_logging(old: Any, new: Any) -> None:
    """Make log handlers that write to one stream write to another.

    Handlers keep the stream they were made with; what they wrote past the bar would tear it.

    Args:
        old: the stream to replace.
        new: the stream to write to.
    """
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def num_iterations(trainer: L.Trainer, module: GRPOModule) -> int | None:
    """Iterations that are done and those that the remaining steps will make, if none is cut short.

    Args:
        trainer: in fit, between two iterations.
        module: with the counters of the run.

    Returns:
        The sum; None when the run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        return None
    slots = trainer.datamodule.slots_per_iteration  # type: ignore[attr-defined]
    num_left = max(int(steps) - trainer.global_step, 0) * trainer.accumulate_grad_batches
    return module.counters.iterations + int(-(-num_left // slots))


def metrics_line(trainer: L.Trainer) -> str:
    """Reward, KL and speed of the newest iteration in one line."""
    logged = trainer.callback_metrics
    shown = [
        ("reward", "reward/mean", "{:.3f}"),
        ("kl", "ref/kl", "{:.4f}"),
        ("explained", "value/explained_var", "{:.2f}"),
        ("val", "val/pass_at_1", "{:.3f}"),
        ("tok/s", "throughput/completion_tokens_per_s", "{:.0f}"),
    ]
    return " ".join(
        f"{label} {form.format(float(logged[name]))}"
        for label, name, form in shown
        if name in logged
    )


class _TwoLines(Progress):
    """The bar, and the metrics under it: side by side they would not fit into 80 columns."""

    # Set by the training thread: rich draws in a thread of its own, and what Lightning has logged
    # changes under its hands.
    metrics: str = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.metrics:
            yield Text(self.metrics, style="cyan", no_wrap=True, overflow="ellipsis")


class _PhaseNow(ProgressColumn):
    def __init__(self, module: GRPOModule) -> None:
        super().__init__()
        self.module = module

    def render(self, task: Task) -> Text:
        return Text(str(self.module.phase), style="magenta", no_wrap=True, overflow="ellipsis")
