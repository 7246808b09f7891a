"""SampleTable: a few prompts, completions and rewards, where a person can read them."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_grpo.module import GRPOModule
from lightning_grpo.types import CompletionText, Prompt, Rollout


class SampleTable(L.Callback):
    """Show samples of a rollout in the console, in TensorBoard, and in loggers with tables.

    Args:
        every_n_iterations: how often; 0 never.
        num_groups: prompts shown.
        num_rows: completions shown of each prompt, best and worst included.
        max_chars: longest prompt or completion shown, in characters.
        console: show them in the console too.
    """

    def __init__(
        self,
        every_n_iterations: int = 50,
        num_groups: int = 2,
        num_rows: int = 3,
        max_chars: int = 400,
        console: bool = True,
    ) -> None:
        self.every_n_iterations = every_n_iterations
        self.num_groups = num_groups
        self.num_rows = num_rows
        self.max_chars = max_chars
        self.console = console

    @rank_zero_only
    def on_rewards_end(self, trainer: L.Trainer, module: GRPOModule, rollout: Rollout) -> None:
        """Show samples of the rollout that has just been scored."""
        iteration = module.counters.iterations
        if self.every_n_iterations < 1 or iteration % self.every_n_iterations:
            return
        rows = self.pick_rows(rollout)
        columns, data = table_of(rollout, rows, self.max_chars)
        if self.console:
            title = f"samples of iteration {iteration + 1}"
            print_table(columns, data, title, module.print_above_bar)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = markdown_table(columns, data)
                logger.experiment.add_text("samples", text, trainer.global_step)
            elif hasattr(logger, "log_table"):
                logger.log_table(key="samples", columns=columns, data=data)

    def pick_rows(self, rollout: Rollout) -> list[int]:
        """The first groups, and of each the best, the worst and some between.

        Args:
            rollout: scored, B rows.

        Returns:
            Row numbers, the best of each group first.
        """
        assert rollout.rewards is not None
        rewards = rollout.rewards.nan_to_num(float("-inf")).tolist()
        groups: dict[int, list[int]] = {}
        for row, group in enumerate(rollout.group_ids.tolist()):
            groups.setdefault(group, []).append(row)
        picked: list[int] = []
        for members in list(groups.values())[: self.num_groups]:
            ranked = sorted(members, key=lambda row: -rewards[row])
            last = len(ranked) - 1
            num = min(self.num_rows, len(ranked))
            steps = [round(i * last / max(num - 1, 1)) for i in range(num)]
            picked += [ranked[i] for i in steps]
        return picked


def table_of(
    rollout: Rollout, rows: list[int], max_chars: int
) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of some rows.

    Args:
        rollout: scored, B rows.
        rows: which rows.
        max_chars: longest text.

    Returns:
        Names, and one list of strings per row.
    """
    assert rollout.rewards is not None
    functions = rollout.function_rewards if len(rollout.function_rewards) > 1 else {}
    columns = ["prompt", "completion", "reward", *functions, "tokens", *rollout.extra_columns]
    lengths = rollout.completion_mask.sum(1).tolist()
    data = [
        [
            shorten(rollout.prompts[row], max_chars),
            shorten(rollout.completions[row], max_chars),
            f"{float(rollout.rewards[row]):.3g}",
            *(f"{float(values[row]):.3g}" for values in functions.values()),
            f"{lengths[row]}{' (cut)' if rollout.truncated[row] else ''}",
            *(shorten(str(v[row]), max_chars) for v in rollout.extra_columns.values()),
        ]
        for row in rows
    ]
    return columns, data


def shorten(text: Prompt | CompletionText, max_chars: int) -> str:
    """Text of a prompt or completion, printable, its middle left out when it is too long."""
    if not isinstance(text, str):
        text = "\n".join(
            f"{m['role']}: {m['content'] if isinstance(m['content'], str) else json.dumps(m)}"
            for m in text
        )
    if len(text) > max_chars:
        half = max_chars // 2
        text = f"{text[:half]} ... {text[len(text) - half :]}"
    # Control characters of a completion could move the cursor of the terminal.
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in text)


def print_table(columns: list[str], data: list[list[str]], title: str, write: Any) -> None:
    """Print a table with rich, above the progress bar.

    Args:
        columns: names.
        data: cells.
        title: above the table.
        write: prints a renderable, or None to print to a console of its own.
    """
    table = Table(title=title, show_lines=True)
    for name in columns:
        table.add_column(name, overflow="fold")
    for cells in data:
        table.add_row(*(Text(cell) for cell in cells))
    (write or Console().print)(table)


def markdown_table(columns: list[str], data: list[list[str]]) -> str:
    """The table as Markdown, with the model's text shown and never interpreted."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(escape_markdown(cell) for cell in cells) + " |" for cells in data]
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Replace what Markdown or HTML would act on by character references."""
    escaped = "".join(f"&#{ord(c)};" if c in "&<>|`*_[]()!#\\~:" else c for c in text)
    return escaped.replace("\n", "<br>")
