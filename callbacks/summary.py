"""RunSummary: what a finished run achieved, where its time went, and where its files are."""

from __future__ import annotations

import time

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from upath import UPath

from lightning_grpo.callbacks.validation import ValidateAtEnds
from lightning_grpo.checkpoint_paths import checkpoint_dir, shown
from lightning_grpo.checkpoints import list_checkpoints
from lightning_grpo.module import GRPOModule


class RunSummary(L.Callback):
    """Print a closing summary of `fit`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def setup(self, trainer: L.Trainer, module: GRPOModule, stage: str) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, module: GRPOModule) -> None:
        """Print the summary when the last step and the last validation are done."""
        console = Console(highlight=False)
        results = [r for c in callbacks_of(trainer) for r in getattr(c, "results", [])]
        if len(results) > 1:
            console.print(validation_table(results[0][1], results[-1][1]))
        counters = module.counters
        console.print(
            f"{counters.iterations} iterations, {counters.optimizer_steps} optimizer steps "
            f"({counters.skipped_steps} skipped), {counters.completions:,} completions, "
            f"{counters.tokens:,} completion tokens",
            soft_wrap=True,
        )
        total = time.perf_counter() - self._start
        console.print(
            f"time {total:.1f} s: {time_split(module.phase.seconds, total)}", soft_wrap=True
        )
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for line in file_lines(module.run_dir):
                console.print(line, soft_wrap=True)


def callbacks_of(trainer: L.Trainer) -> list[ValidateAtEnds]:
    """The callbacks that hold validation results."""
    found = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in found if isinstance(callback, ValidateAtEnds)]


def validation_table(before: dict[str, float], after: dict[str, float]) -> Table:
    """Validation before and after, side by side.

    Args:
        before: metrics of the first validation.
        after: metrics of the last.

    Returns:
        A table to print.
    """
    table = Table(title="validation")
    for name in ("metric", "before", "after"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name in sorted(before):
        if name in after:
            table.add_row(name, f"{before[name]:.4g}", f"{after[name]:.4g}")
    return table


def time_split(seconds: dict[str, float], total: float) -> str:
    """Seconds and shares of each phase, the longest first, and the rest."""
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    rest = total - sum(seconds.values())
    parts.append(("rest", max(rest, 0.0)))
    return ", ".join(f"{name} {value:.1f} s ({value / total:.0%})" for name, value in parts)


def file_lines(run_dir: UPath) -> list[str]:
    """One line for each thing that the run has left behind.

    Args:
        run_dir: the run's folder.

    Returns:
        Lines of text, with the command that shows or resumes it.
    """
    lines = [f"files in {run_dir}"]
    if (run_dir / "metrics.csv").exists():
        lines.append(f"  metrics     {run_dir / 'metrics.csv'}")
        lines.append(f"  curves      tensorboard --logdir {run_dir}")
    if (run_dir / "config.yaml").exists():
        lines.append(f"  config      {run_dir / 'config.yaml'}")
    for url in sorted(checkpoint.url for checkpoint in list_checkpoints(checkpoint_dir(run_dir))):
        lines.append(f"  checkpoint  {shown(url)}")
    return lines
