"""The card of an export: data, configuration, curves, evaluation, proof, and the command.

What comes from a run (names, prompts, options) is shown as code, on one line or in a block, so that
it is neither markup nor part of the front matter, whose values are all written by a YAML writer.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from upath import UPath

from lightning_grpo.redaction import redacted

CARD = "README.md"
_NUM_POINTS = 8
_CURVES = ("reward/mean", "val/pass_at_1", "ref/kl", "policy/entropy", "completion/tokens_mean")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_MAX_CHARACTERS = 300
_TASKS = {
    "merged": "text-generation",
    "adapter": "text-generation",
    "token_values": "token-classification",
    "sequence_value": "text-classification",
}


def card_text(
    *,
    form: str,
    options: Mapping[str, Any],
    about: Mapping[str, Any],
    step: int,
    rows: Sequence[Mapping[str, str]],
    proof: Sequence[str],
    command: Sequence[str],
) -> str:
    """The content of README.md.

    Args:
        form: of the export.
        options: the run's configuration as plain values.
        about: iteration, algorithm and the like, of the checkpoint.
        step: optimizer steps behind the checkpoint.
        rows: of the run's metrics.csv.
        proof: its numbers as sentences.
        command: that made the export, word by word.

    Returns:
        Markdown with front matter.
    """
    model, data = options.get("model") or {}, options.get("data") or {}
    facts = {
        "base model": model.get("name_or_path"),
        "training data": data.get("train_data"),
        "validation data": data.get("val_data"),
        "rewards": (options.get("reward") or {}).get("functions"),
        **{name.replace("_", " "): value for name, value in about.items()},
    }
    base = str(model.get("name_or_path") or "")
    lines = [
        "---",
        yaml.safe_dump(front_matter(base, form), sort_keys=False).rstrip(),
        "---",
        "",
        "# Trained by reinforcement learning with lightning_grpo",
        "",
        *(f"- {name}: {code(value)}" for name, value in facts.items() if value is not None),
        "",
        *_section("Evaluation", evaluation_table(rows, step)),
        *_section("Curves", curve_table(rows)),
        *_section("This folder against the checkpoint", [f"- {line}" for line in proof]),
        *_section("Command", block(" ".join(command))),
        *_section("Configuration of the run", block(_yaml(dict(options)))),
    ]
    return "\n".join(lines)


def front_matter(base: str, form: str) -> dict[str, Any]:
    """What the Hub reads of a card, as plain values.

    Args:
        base: name or folder of the model that the run began with.
        form: of the export.
    """
    front: dict[str, Any] = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": _TASKS[form],
        "tags": ["lightning_grpo", "reinforcement-learning"],
    }
    # The Hub refuses a card whose base model is no name of the Hub.
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        front["base_model"] = base
        if form != "adapter":
            front["base_model_relation"] = "finetune"
    return front


def read_rows_of_metrics(file: UPath | None) -> list[dict[str, str]]:
    """The rows of a metrics.csv.

    Args:
        file: where it would be; None when there is no run's folder.

    Returns:
        Name of the column -> text; no rows when the file is not there.
    """
    if file is None or not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def code(value: Any) -> str:
    """A value as code of Markdown, on one line, which it cannot end."""
    text = value if isinstance(value, str) else _yaml(value, flow=True)
    text = " ".join(_clean(text).split()).replace("`", "'").replace("|", "/")
    if len(text) > _MAX_CHARACTERS:
        text = text[:_MAX_CHARACTERS] + "..."
    return f"`{text or ' '}`"


def block(text: str) -> list[str]:
    """Text as a block of code of Markdown, which it cannot end."""
    text = _clean(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence]


def curve_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A few points of the curves of a run.

    Args:
        rows: of metrics.csv.

    Returns:
        Lines of Markdown; none when there is nothing to show.
    """
    names = [name for name in _CURVES if any(_number(row, name) for row in rows)]
    if not names:
        return []
    steps: dict[int, dict[str, str]] = {}
    for row in rows:  # a validation has a row of its own
        found = {name: shown for name in names if (shown := _number(row, name))}
        if found:
            steps.setdefault(int(row["step"]), {}).update(found)
    listed = sorted(steps)
    last = len(listed) - 1
    chosen = sorted({round(i * last / (_NUM_POINTS - 1)) for i in range(_NUM_POINTS)})
    # A curve that is measured now and then gets its value nearest before each point.
    lines = _head(["step", *names])
    for place in chosen:
        before = [steps[step] for step in listed[: place + 1]]
        cells = [next((s[n] for s in reversed(before) if n in s), "") for n in names]
        lines.append(_row([str(listed[place]), *cells]))
    return lines


def evaluation_table(rows: Sequence[Mapping[str, str]], step: int) -> list[str]:
    """Validation at the start of the run and at the checkpoint.

    Args:
        rows: of metrics.csv.
        step: optimizer steps behind the checkpoint.

    Returns:
        Lines of Markdown; none when the run measured nothing.
    """
    measured = [row for row in rows if any(_number(row, name) for name in filter(_is_val, row))]
    until = [row for row in measured if int(row["step"]) <= step]
    if not until:
        return []
    first, last = until[0], until[-1]
    lines = _head(["metric", f"step {first['step']}", f"step {last['step']}"])
    for name in sorted(filter(_is_val, last)):
        if _number(last, name):
            lines.append(_row([code(name), _number(first, name), _number(last, name)]))
    return lines


def _is_val(name: str | None) -> bool:
    return name is not None and name.startswith("val/")


def _number(row: Mapping[str, str], name: str) -> str:
    try:
        value = float(row.get(name) or "nan")
    except (TypeError, ValueError):
        return ""
    return "" if math.isnan(value) else f"{value:.4g}"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _head(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _yaml(value: Any, *, flow: bool = False) -> str:
    style: dict[str, Any] = {"default_flow_style": True, "width": 10_000} if flow else {}
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **style)
    return text.removesuffix("\n").removesuffix("\n...")


def _clean(text: str) -> str:
    """Text without secrets, the name of the home folder, and characters that control a terminal."""
    text = redacted(text)
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = text.replace(home, "~")
    kept = (c for c in text if c == "\n" or c == "\t" or c.isprintable())
    return "".join(kept).encode("utf-8", "replace").decode()
