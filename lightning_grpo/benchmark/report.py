"""The tables of a benchmark, in Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lightning_grpo.benchmark.parity import LOGPROB_TOLERANCE, NORM_TOLERANCE, Dtype
from lightning_grpo.benchmark.results import PHASES, Row, Spread, columns_of
from lightning_grpo.benchmark.rooflines import Machine
from lightning_grpo.benchmark.turns import Contestant, names_of

MB = 1e6


@dataclass
class Report:
    """All that a benchmark has found so far."""

    machine_name: str
    is_cuda: bool
    machine: Machine
    versions: dict[str, str]
    num_threads: int
    num_warmup: int
    contestants: Sequence[Contestant]
    gate: dict[str, tuple[float, ...]] | None
    """Reduction -> differences of log-probs, loss and gradient norm; None without TRL."""
    rows: list[Row] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dtype(self) -> Dtype:
        """Of the forwards."""
        return "bfloat16" if self.is_cuda else "float32"

    def write(self, folder: Path) -> None:
        """Write benchmark.md and benchmark.csv.

        Args:
            folder: made where it is missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "benchmark.md").write_text(self.markdown(), encoding="utf-8")
        lines = io.StringIO()
        table = [columns_of(row) for row in self.rows]
        writer = csv.DictWriter(lines, fieldnames=list(table[0]) if table else [])
        writer.writeheader()
        writer.writerows(table)
        text = lines.getvalue().replace("\r\n", "\n")
        (folder / "benchmark.csv").write_text(text, encoding="utf-8")

    def markdown(self) -> str:
        """All tables."""
        parts = [
            self.preface(),
            table_text(STEP_HEADS, [step_cells(row, self.is_cuda) for row in self.rows]),
            f"## Where a step goes\n\nMilliseconds, medians, in {self.clock}. `scoring` is old "
            "and reference log-probs, advantages and minibatches. Tokens are those that go "
            "through the model.",
            table_text(PROFILE_HEADS, [profile_cells(row) for row in self.rows]),
            "## How much of the machine is used\n\n"
            f"Against a copy at {self.machine.bytes_per_s / 1e9:,.1f} GB/s and a matrix product "
            f"at {self.machine.flops_per_s / 1e9:,.0f} GFLOP/s in {self.dtype}"
            f"{'' if self.is_cuda else ', per second of process CPU time'}. Useful "
            "operations are those of the update without padding and without shared prompts, so "
            "that sharing can lift them above what the machine ran.",
            table_text(USE_HEADS, [use_cells(row) for row in self.rows]),
        ]
        if self.gaps:
            parts += [
                "## Sampler against trainer\n\nLog-probs of the sampled tokens, in nats, from "
                "the rollout and from the training forward.",
                table_text(GAP_HEADS, [gap_cells(gap) for gap in self.gaps]),
            ]
        return "\n\n".join(parts) + "\n"

    @property
    def clock(self) -> str:
        """The time that counts, in words."""
        return "wall time" if self.is_cuda else "process CPU time"

    def preface(self) -> str:
        """Machine, protocol and gate."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        steps = ", ".join(sorted({str(row.num_steps) for row in self.rows})) or "no"
        lines = [
            "# One training step, by turns",
            f"{self.machine_name}, {self.num_threads} thread(s), {self.dtype}; {versions}.",
            f"Every contestant has its own process and makes one step by turns: {self.num_warmup} "
            f"warm-up and {steps} timed steps, medians (least to most). A step is all of it, from "
            f"one to the next: rollout, reward, update, logging. Speeds and ratios are those of "
            f"{self.clock}; a ratio is the median over the pairs of steps made by turns. Same "
            "weights, prompts, reward, learning rate, clipping, beta 0.",
            names_of(self.contestants),
            self.gate_text(),
        ]
        return "\n\n".join(lines)

    def gate_text(self) -> str:
        """What the gate measured."""
        if self.gate is None:
            return "TRL is not installed: there is no gate, and the stand-in is not TRL."
        found = "; ".join(
            f"reduction {name}: log-probs {values[0]:.1g} nats, loss {values[1]:.1g}, gradient "
            f"norm {values[2]:.1g}"
            for name, values in self.gate.items()
        )
        return (
            "Gate: ours and TRL on one frozen batch differ by at most (relative, but for the "
            f"log-probs) {found}; allowed are {LOGPROB_TOLERANCE[self.dtype]:g} nats and "
            f"{NORM_TOLERANCE[self.dtype]:g}."
        )


STEP_HEADS = (
    *("regime", "contestant", "CPU ms", "wall ms", "samples/s", "completion tokens/s"),
    *("mean C", "ours is faster by", "peak MB", "above start"),
)
PROFILE_HEADS = ("regime", "contestant", *PHASES, "tokens of the rollout", "of the update")
USE_HEADS = (
    *("regime", "contestant", "rollout: floor/time", "decode MBU"),
    *("update MFU, useful", "hardware"),
)
GAP_HEADS = ("engine", "precision", "mean", "max")


def table_text(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right.

    Args:
        heads: of the columns.
        rows: cells; a first cell like the one above is left empty.

    Returns:
        Lines.
    """
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 2}{'---:|' * (len(heads) - 2)}"]
    above = ""
    for first, *rest in rows:
        lines.append(f"| {' | '.join([first if first != above else '', *rest])} |")
        above = first
    return "\n".join(lines)


def step_cells(row: Row, is_cuda: bool) -> list[str]:
    """Time, speed and memory of a contestant."""
    speedup = ""
    if row.speedup is not None and row.contestant != "ours":
        speedup = f"{row.speedup.median:.2f} ({row.speedup.least:.2f} to {row.speedup.most:.2f})"
    peak = f"{row.peak_bytes / MB:,.0f}"
    if is_cuda:
        peak += f" ({row.reserved_bytes / MB:,.0f} reserved)"
    return [
        row.regime.label,
        row.contestant,
        milliseconds(row.cpu_s),
        milliseconds(row.wall_s),
        f"{row.samples_per_s:,.1f}",
        f"{row.completion_tokens_per_s:,.0f}",
        f"{row.completion_tokens:.1f}",
        speedup,
        peak,
        f"{(row.peak_bytes - row.start_bytes) / MB:,.0f}",
    ]


def milliseconds(value: Spread) -> str:
    """A spread of seconds."""
    return f"{value.median * 1e3:,.0f} ({value.least * 1e3:,.0f} to {value.most * 1e3:,.0f})"


def profile_cells(row: Row) -> list[str]:
    """Where the step of a contestant goes."""
    phases = [f"{row.phases_s[name] * 1e3:,.0f}" for name in PHASES]
    tokens = (f"{row.rollout_tokens:,.0f}", f"{row.update_tokens:,.0f}")
    return [row.regime.label, row.contestant, *phases, *tokens]


def use_cells(row: Row) -> list[str]:
    """How much of the machine a contestant uses."""
    shares = (row.rollout_floor, row.mbu, row.mfu_useful, row.mfu_hardware)
    return [row.regime.label, row.contestant, *(f"{share:.1%}" for share in shares)]


def gap_cells(gap: dict[str, Any]) -> list[str]:
    """The gap of one engine."""
    numbers = (gap["mean"], gap["max"])
    shown = ("not for this model" if number != number else f"{number:.1e}" for number in numbers)
    return [gap["engine"], gap["dtype"], *shown]


def console_table(rows: Sequence[Row]) -> Table:
    """What matters most, narrow enough for a terminal.

    Args:
        rows: of the report.

    Returns:
        A table to print.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for head in ("regime", "contestant", "CPU ms", "wall ms", "samples/s", "ratio", "peak MB"):
        table.add_column(head, justify="left" if head in ("regime", "contestant") else "right")
    above = ""
    for row in rows:
        cells = (
            row.contestant,
            f"{row.cpu_s.median * 1e3:,.0f}",
            f"{row.wall_s.median * 1e3:,.0f}",
            f"{row.samples_per_s:,.1f}",
            f"{row.speedup.median:.2f}" if row.speedup else "",
            f"{row.peak_bytes / MB:,.0f}",
        )
        table.add_row(row.regime.label if row.regime.label != above else "", *cells)
        above = row.regime.label
    table.caption = "ratio: time of a step / that of ours"
    return table
