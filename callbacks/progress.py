"""IterationProgress: the progress bar, counted in iterations, and the phase now running."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
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
    line per iteration, at most one in `seconds_between_lines`.

    Args:
        refresh_per_second: how often the bar is drawn.
        seconds_between_lines: least time between two lines where there is no terminal.
    """

    def __init__(self, refresh_per_second: float = 4.0, seconds_between_lines: float = 5.0) -> None:
        super().__init__()
        self.refresh_per_second = refresh_per_second
        self.seconds_between_lines = seconds_between_lines
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
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
        if not self._is_enabled or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("iteration"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            _Metrics(trainer),
            _PhaseNow(module),
            console=self.console,
            refresh_per_second=self.refresh_per_second,
        )
        self.bar.start()
        self.bar.add_task("fit", total=None)
        module.print_above_bar = self.bar.console.print

    def on_train_start(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Set the number of iterations, now that the data is there."""
        if self.bar is not None:
            total = num_iterations(trainer)
            self.bar.update(
                self.bar.task_ids[0], total=total, completed=module.counters.iterations
            )

    def on_iteration_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Move on by one."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=module.counters.iterations)
        now = time.monotonic()
        if self.bar is None and self._is_enabled:
            if now - self._last_line < self.seconds_between_lines:
                return
            self._last_line = now
            total = num_iterations(trainer)
            of_total = "" if total is None else f"/{total}"
            line = f"iteration {module.counters.iterations}{of_total} {metrics_line(trainer)}"
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Leave the bar as it is."""
        self._stop(module)

    def on_exception(
        self, trainer: L.Trainer, module: GRPOModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop(module)

    def teardown(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop(module)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        (self.bar.console.print if self.bar is not None else print)(*args)

    def _stop(self, module: GRPOModule) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
            module.print_above_bar = None


def num_iterations(trainer: L.Trainer) -> int | None:
    """Iterations of the whole fit, if none is cut short; None when there is no end."""
    slots = trainer.datamodule.slots_per_iteration  # type: ignore[attr-defined]
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        return None
    return -(-int(steps) * trainer.accumulate_grad_batches // slots)


def metrics_line(trainer: L.Trainer) -> str:
    """Reward, KL and speed of the newest iteration in one line."""
    logged = trainer.callback_metrics
    shown = [
        ("reward", "reward/mean", "{:.3f}"),
        ("kl", "ref/kl", "{:.4f}"),
        ("val", "val/pass_at_1", "{:.3f}"),
        ("tok/s", "throughput/completion_tokens_per_s", "{:.0f}"),
    ]
    return " ".join(
        f"{label} {form.format(float(logged[name]))}"
        for label, name, form in shown
        if name in logged
    )


class _Metrics(ProgressColumn):
    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__()
        self.trainer = trainer

    def render(self, task: Task) -> Text:
        return Text(metrics_line(self.trainer), style="cyan")


class _PhaseNow(ProgressColumn):
    def __init__(self, module: GRPOModule) -> None:
        super().__init__()
        self.module = module

    def render(self, task: Task) -> Text:
        return Text(str(self.module.phase), style="magenta")
