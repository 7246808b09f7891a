"""The card of an exported model: what it is, how it was made, and what its proof gave."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_grpo.export.proof import Proof

_NUM_POINTS = 8
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Tokens of the Hub and of the usual services, wherever they stand.
_SECRET = re.compile(r"\b(hf_|sk-|gh[pousr]_|AKIA|xox[a-z]-)[A-Za-z0-9_-]{8,}")
_SECRET_OPTION = re.compile(r"(?i)((?:token|secret|password|api_?key)[\w.]*[=\s]+)\S+")


def write_card(
    folder: Path,
    *,
    options: Mapping[str, Any],
    about: Mapping[str, Any],
    proof: Proof,
    metrics_file: Path | None,
    command: Sequence[str],
) -> None:
    """Write README.md.

    Args:
        folder: of the export.
        options: the run's configuration as plain values.
        about: step, iteration, algorithm and the like, of the checkpoint.
        proof: of the folder.
        metrics_file: the run's metrics.csv.
        command: that made the export.
    """
    model, data = options.get("model") or {}, options.get("data") or {}
    base = str(model.get("name_or_path") or "")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightning_grpo", "reinforcement-learning"],
    }
    # What is no name of the Hub would make the Hub refuse the card.
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        front["base_model"] = base
    source = data.get("train_data")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        "# A language model trained by reinforcement learning",
        "",
        f"Trained with lightning_grpo from {literal(base)} on {literal(source)}.",
        "",
        *(f"- {name.replace('_', ' ')}: {literal(value)}" for name, value in about.items()),
        "",
        "## Rewards and evaluation",
        "",
        *(curve_table(metrics_file) if metrics_file is not None else []),
        "## This folder against the checkpoint it was made of",
        "",
        *(f"- {line}" for line in proof.as_lines()),
        "",
        "## Command",
        "",
        *fenced(redacted(" ".join(command))),
        "",
        "## Configuration of the run",
        "",
        *fenced(redacted(yaml.safe_dump(dict(options), sort_keys=False).rstrip())),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def literal(value: Any) -> str:
    """A value as code of Markdown, on one line, that cannot end the code."""
    text = redacted(" ".join(str(value).split())).replace("`", "'")
    return f"`{text}`" if text else "``"


def fenced(text: str) -> list[str]:
    """Text as a block of Markdown that it cannot end: a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence]


def redacted(text: str) -> str:
    """Text without what looks like a secret."""
    text = _SECRET.sub("<secret>", text)
    return _SECRET_OPTION.sub(r"\1<secret>", text)


def curve_table(file: Path) -> list[str]:
    """A few points of the curves of a run as a table of Markdown.

    Args:
        file: metrics.csv.

    Returns:
        Lines, with an empty one at the end; none when there is nothing to show.
    """
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines: list[str] = []
    for names in (("reward/mean", "ref/kl", "completion/tokens_mean"), ("val/pass_at_1",)):
        present = [name for name in names if any(row.get(name) for row in rows)]
        if not present:
            continue
        points = [row for row in rows if row.get(present[0])]
        step = max((len(points) - 1) / max(_NUM_POINTS - 1, 1), 1)
        chosen = sorted(
            {round(i * step) for i in range(_NUM_POINTS) if round(i * step) < len(points)}
        )
        lines += ["| step | " + " | ".join(present) + " |", "|---" * (len(present) + 1) + "|"]
        for index in chosen:
            values = (
                f"{float(points[index][name]):.4g}" if points[index].get(name) else ""
                for name in present
            )
            lines.append(f"| {points[index]['step']} | " + " | ".join(values) + " |")
        lines.append("")
    return lines
