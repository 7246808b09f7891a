"""What scores say before a training: which groups would teach, and what to change."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lightning_grpo.diagnosis.as_json import to_json
from lightning_grpo.diagnosis.measure import diagnose_rows
from lightning_grpo.diagnosis.page import to_html
from lightning_grpo.diagnosis.records import Diagnosis
from lightning_grpo.diagnosis.scores_file import ScoreColumns, read_scores
from lightning_grpo.diagnosis.text import summary


def diagnose(
    scores: str,
    output: str = "runs/diagnosis",
    group_size: int | None = None,
    level: float = 0.9,
    columns: ScoreColumns | None = None,
) -> Diagnosis:
    """Say what scored completions show: how many groups would teach nothing, and what to change.

    No model is loaded. Each row of the file is a completion with its prompt and its score; several
    completions of each prompt are needed for a statement about groups, and a few dozen prompts for
    any. With a second score of the same completions it says how much of the reward is noise, with
    a gold score whether the reward ranks siblings the right way, with their texts, lengths and
    whether they were cut or parsed what these are like. Advice comes with its interval, and where
    the scores do not allow any, it says so.

    Args:
        scores: .jsonl, .json, .csv or .parquet, .gz after it where compressed, at a path or a URL.
        output: folder for diagnosis.json and diagnosis.html, a page that needs nothing else.
        group_size: completions per prompt of the training that is thought of; that of the file when
            null. Above that, the file gives only bounds.
        level: of confidence of all intervals, between 0 and 1.
        columns: names of columns; the usual ones when null.

    Returns:
        What was found.
    """
    console = Console(highlight=False)
    with console.status("reading") as status:
        rows = read_scores(scores, columns)
        status.update("measuring")
        found = diagnose_rows(rows, source=scores, group_size=group_size, level=level)
        status.update("writing")
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "diagnosis.json").write_text(to_json(found), encoding="utf-8")
        (folder / "diagnosis.html").write_text(to_html(found), encoding="utf-8")
    console.print(summary(found, min(console.width, 110)), markup=False, soft_wrap=True)
    console.print(
        f"\nwritten to {folder / 'diagnosis.html'} and {folder / 'diagnosis.json'}",
        markup=False,
        soft_wrap=True,
    )
    return found
