"""What a person sees: progress, samples, warnings, the closing summary."""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from runs import make_data, make_module, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_grpo.callbacks import HealthWarnings, IterationProgress, RunSummary, SampleTable
from lightning_grpo.callbacks.progress import redirect_logging
from lightning_grpo.callbacks.sample_table import (
    markdown_table,
    print_table,
    shorten,
    table_of,
)
from lightning_grpo.callbacks.summary import time_split, validation_table
from lightning_grpo.types import Rollout


def scored_rollout(rewards: list[float], completions: list[Any] | None = None, **changes: Any):
    num_rows = len(rewards)
    ids = torch.zeros(num_rows, 3, dtype=torch.int64)
    rollout = Rollout(
        prompt_ids=ids,
        prompt_mask=ids.bool(),
        completion_ids=ids,
        completion_mask=torch.ones_like(ids, dtype=torch.bool),
        action_mask=torch.ones_like(ids, dtype=torch.bool),
        sampler_logprobs=ids.float(),
        group_ids=torch.arange(num_rows) // 4,
        truncated=torch.zeros(num_rows, dtype=torch.bool),
        prompts=[f"prompt {row // 4}" for row in range(num_rows)],
        completions=completions or [f"text {row}" for row in range(num_rows)],
        rewards=torch.tensor(rewards, dtype=torch.float64),
        function_rewards={"only": torch.tensor(rewards, dtype=torch.float64)},
    )
    return rollout.replace(**changes)


# The sample table


def test_the_table_shows_best_worst_and_some_between_of_the_first_groups():
    rollout = scored_rollout([0.0, 3.0, 1.0, 2.0, 5.0, math.nan, 7.0, 6.0, 9.0, 9.0, 9.0, 9.0])
    assert SampleTable(num_groups=2, num_rows=3).pick_rows(rollout) == [1, 2, 0, 6, 4, 5]
    assert SampleTable(num_groups=1, num_rows=9).pick_rows(rollout) == [1, 3, 2, 0]
    assert SampleTable(num_groups=1, num_rows=1).pick_rows(rollout) == [1]


def test_cells_hold_texts_rewards_tokens_and_logged_columns():
    rollout = scored_rollout(
        [1.0, 0.5],
        [[{"role": "assistant", "content": "an answer"}], "x" * 100],
        truncated=torch.tensor([False, True]),
        function_rewards={"a": torch.tensor([1.0, math.nan]), "b": torch.tensor([0.0, 0.25])},
        extra_columns={"judged": ["yes", None]},
    )
    columns, data = table_of(rollout, [0, 1], max_chars=20)
    assert columns == ["prompt", "completion", "reward", "a", "b", "tokens", "judged"]
    assert data[0] == ["prompt 0", "assistant: an answer", "1", "1", "0", "3", "yes"]
    assert data[1] == [
        "prompt 0",
        f"{'x' * 10} ... {'x' * 10}",
        "0.5",
        "nan",
        "0.25",
        "3 (cut)",
        "None",
    ]


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[2J\x07",
    "[link](javascript:alert(1)) ![i](http://x/y.png) **bold** `code` | cell |",
    "line\nbreak\r\noverwritten\x00",
    "[bold red]rich markup[/]",
    "\u202eright to left",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_model_is_shown_and_never_interpreted(text):
    columns, data = table_of(scored_rollout([1.0], [text]), [0], max_chars=400)
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=False)
    print_table(columns, data, "samples", console.print)
    printed = stream.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", printed)
    if "markup" in text:
        assert text in printed
    markdown = markdown_table(columns, data)
    assert len(markdown.splitlines()) == 3
    cell = markdown.splitlines()[2].split(" | ")[1]
    assert not set(cell.replace("<br>", "").replace("&#", "").replace(";", "")) & set("<>|`*_[]()!")


def test_a_text_of_ten_megabytes_is_cut_before_anything_else():
    text = "a" * 5_000_000 + "\n" * 5_000_000
    shown = shorten(text, 400)
    assert len(shown) <= 410 and shown.startswith("a" * 200)


def read_samples(folder: Path) -> str:
    events = EventAccumulator(str(folder))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    return event.tensor_proto.string_val[0].decode()


def hostile_reward(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
    log_extra("note", ["<img src=x onerror=alert(1)>"] * len(completions))
    return [float(row) for row in range(len(completions))]


def test_samples_reach_the_console_and_tensorboard(char_model, capsys):
    logger = TensorBoardLogger(".", name="logs", version="v")
    trainer = make_trainer(
        reward=hostile_reward,
        logger=logger,
        max_steps=2,
        callbacks=[SampleTable(every_n_iterations=5, num_groups=1, num_rows=2)],
    )
    trainer.fit(make_module(char_model), make_data())
    printed = capsys.readouterr().out
    assert printed.count("samples of iteration 1") == 1 and "samples of iteration 2" not in printed
    logger.experiment.flush()
    text = read_samples(Path("logs/v"))
    assert text.startswith("| prompt | completion | reward | tokens | note |")
    assert "<img" not in text and "&#60;img" in text
    assert len(text.splitlines()) == 4


def test_a_logger_with_tables_gets_the_table(char_model):
    from lightning.pytorch.loggers import CSVLogger

    tables = []

    class Tables(CSVLogger):
        def log_table(self, key: str, columns: list[str], data: list[list[str]]) -> None:
            tables.append((key, columns, data))

    samples = SampleTable(num_groups=1, num_rows=2, console=False)
    trainer = make_trainer(logger=Tables("."), max_steps=1, callbacks=[samples])
    trainer.fit(make_module(char_model), make_data())
    ((key, columns, data),) = tables
    assert (key, columns) == ("samples", ["prompt", "completion", "reward", "tokens"])
    assert len(data) == 2 and data[0][0] == data[1][0] == "00="


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Draw(L.Callback):
    """Draws the bar where the test looks at it; a thread of rich does so at other times."""

    def __init__(self, progress: IterationProgress) -> None:
        self.progress = progress

    def on_rollout_end(self, trainer: L.Trainer, module: L.LightningModule, rollout: Any) -> None:
        self.progress.bar.refresh()

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.progress.bar.refresh()


@pytest.mark.parametrize("width", [80, 160])
def test_the_bar_shows_iteration_phase_and_metrics_within_the_width(char_model, monkeypatch, width):
    stream = Terminal()
    progress = IterationProgress(refresh_per_second=200)
    progress.console = Console(file=stream, width=width, force_terminal=True)
    trainer = make_trainer(
        max_steps=3, enable_progress_bar=True, max_epochs=-1, callbacks=[progress, Draw(progress)]
    )
    trainer.fit(make_module(char_model), make_data(val_data=[{"prompt": "1="}]))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line.strip("\r") for line in re.split(r"[\n\r]", plain)]
    assert max(map(len, lines)) <= width
    assert any(re.search(r"iteration 0/3 .* generating \d+/32", line) for line in lines)
    assert any(re.search(r"iteration 2/3 .* updating 0/1", line) for line in lines)
    assert any(re.search(r"iteration 3/3 .* done", line) for line in lines)
    assert any(re.fullmatch(r"reward \d\.\d{3} kl -?\d\.\d{4} tok/s \d+ *", line) for line in lines)
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back


def test_validate_and_predict_have_a_bar_of_batches(char_model):
    stream = Terminal()
    progress = IterationProgress(refresh_per_second=200)
    progress.console = Console(file=stream, width=80, force_terminal=True)
    trainer = make_trainer(enable_progress_bar=True, callbacks=[progress])
    rows = [{"prompt": f"{i}="} for i in range(6)]
    data = make_data(rows, val_data=rows, predict_data=rows, val_prompts_per_batch=2)
    module = make_module(char_model)
    trainer.validate(module, data, verbose=False)
    trainer.predict(module, data)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"batch 1/3 .* validating \d+/8", plain)
    assert len(re.findall(r"batch 3/3 .* done", plain)) >= 2
    assert progress.bar is None


def test_without_a_terminal_there_is_a_line_now_and_then_and_at_the_end(char_model, capsys):
    progress = IterationProgress(seconds_between_lines=1000.0)
    trainer = make_trainer(
        max_steps=4, max_epochs=-1, enable_progress_bar=True, callbacks=[progress]
    )
    trainer.fit(make_module(char_model), make_data())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("iteration")]
    assert [line.split()[1] for line in lines] == ["1/4", "4/4"]
    assert re.search(r" reward \d\.\d{3} kl \S+ tok/s \d+$", lines[0])


def test_a_bar_that_is_disabled_on_other_ranks_prints_nothing(char_model, capsys):
    progress = IterationProgress(seconds_between_lines=0.0)
    trainer = make_trainer(max_steps=2, enable_progress_bar=True, callbacks=[progress])
    progress.disable()
    trainer.fit(make_module(char_model), make_data())
    assert "iteration" not in capsys.readouterr().err


def test_log_handlers_follow_the_bar_and_come_back():
    old, new = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(old)
    logger = logging.getLogger("some.library")
    logger.addHandler(handler)
    try:
        redirect_logging(old, new)
        logger.warning("above the bar")
        redirect_logging(new, old)
        logger.warning("after it")
    finally:
        logger.removeHandler(handler)
    assert (old.getvalue(), new.getvalue()) == ("after it\n", "above the bar\n")


# Warnings


def equal_reward(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def unscored(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


def caught(trainer: Any, module: Any, data: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    return [str(warning.message) for warning in found if "lightning_grpo" in warning.filename]


def test_equal_rewards_are_warned_of_once_after_five_iterations(char_model):
    trainer = make_trainer(
        reward=equal_reward,
        max_steps=7,
        max_epochs=-1,
        callbacks=[HealthWarnings(truncated_frac=1)],
    )
    (message,) = caught(trainer, make_module(char_model), make_data())
    assert message.startswith("iterations 1 to 5: all completions of every prompt got the same")
    assert "rollout.group_size" in message


def test_a_new_beginning_of_the_trouble_is_told_again(char_model):
    calls = []

    def sometimes(completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        return [float(row == 0 and len(calls) == 3) for row in range(len(completions))]

    health = HealthWarnings(dead_iterations=2, truncated_frac=1)
    trainer = make_trainer(reward=sometimes, max_steps=6, max_epochs=-1, callbacks=[health])
    messages = caught(trainer, make_module(char_model), make_data())
    assert [m.split(":")[0] for m in messages] == ["iterations 1 to 2", "iterations 4 to 5"]


def test_truncation_is_warned_of_with_the_option_to_raise(char_model):
    trainer = make_trainer(
        max_completion_tokens=1, max_steps=2, max_epochs=-1, callbacks=[HealthWarnings(5, 0.5)]
    )
    (message,) = caught(trainer, make_module(char_model), make_data())
    assert message.startswith("iteration 1: ") and "rollout.max_completion_tokens (1)" in message


def test_no_score_at_all_is_warned_of(char_model):
    trainer = make_trainer(reward=unscored, max_steps=1, callbacks=[HealthWarnings(5, 1)])
    messages = caught(trainer, make_module(char_model), make_data())
    assert any("no reward function scored any completion" in message for message in messages)


# The closing summary


def test_the_summary_says_what_changed_and_where_time_went(char_model, capsys):
    from lightning_grpo.callbacks import ValidateAtEnds

    trainer = make_trainer(max_steps=2, callbacks=[ValidateAtEnds(), RunSummary()])
    rows = [{"prompt": f"{i}="} for i in range(4)]
    trainer.fit(make_module(char_model), make_data(val_data=rows))
    out = capsys.readouterr().out
    assert re.search(r"metric .* before .* after", out)
    assert "val/pass_at_1" in out and "val/reward" in out
    assert "2 iterations, 2 optimizer steps (0 skipped), 64 completions, " in out
    assert re.search(r"time \d+\.\d s: .*updating .* s \(\d+%\)", out)
    for phase in ("generating", "scoring", "validating", "rest"):
        assert phase in out
    assert "files in " in out


def test_shares_of_the_time_add_up():
    text = time_split({"a": 6.0, "b": 3.0}, 10.0)
    assert text == "a 6.0 s (60%), b 3.0 s (30%), rest 1.0 s (10%)"


def test_before_and_after_stand_side_by_side():
    stream = io.StringIO()
    table = validation_table({"val/x": 0.25, "val/gone": 1.0}, {"val/x": 0.75})
    Console(file=stream, width=80).print(table)
    assert "val/x" in stream.getvalue() and "val/gone" not in stream.getvalue()
    assert re.search(r"val/x\s+. +0\.25 . +0\.75", stream.getvalue())
