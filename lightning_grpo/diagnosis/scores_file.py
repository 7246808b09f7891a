"""Reading completions that somebody has scored: a row each, in columns of known or given names."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.diagnosis.cells import flag, is_cut, number, optional_number, text_of
from lightning_grpo.sources import Row, Rows, read_rows

# What each column is called where its name is not given: the first that a file has.
USUAL_NAMES = {
    "prompt_id": ("prompt_id", "group_id", "group"),
    "prompt": ("prompt",),
    "completion_id": ("completion_id", "id"),
    "completion": ("completion", "response"),
    "score": ("score", "reward"),
    "second_score": ("score_2", "reward_2"),
    "gold": ("gold",),
    "num_tokens": ("num_tokens", "completion_tokens", "length"),
    "truncated": ("is_truncated", "truncated", "finish_reason", "finish"),
    "parsed": ("is_parsed", "parsed"),
}


@dataclass
class ScoreColumns:
    """Names of the columns of a file of scores; null for the usual ones.

    Args:
        prompt_id: says which rows have the same prompt; prompt_id, group_id or group, or else the
            prompt itself.
        prompt: text or chat.
        completion_id: tells the completions of a prompt apart; completion_id or id.
        completion: text or chat; completion or response.
        score: a number, or a list of numbers where the completion was scored several times, of
            which the first counts; score or reward.
        second_score: of the same completion by the same scorer; score_2 or reward_2.
        gold: score of a better judge, the higher the better.
        num_tokens: length of the completion; num_tokens, completion_tokens or length.
        truncated: true where the completion was cut, or a reason to finish, of which "length" is
            cut; is_truncated, truncated, finish_reason or finish.
        parsed: true where an answer was found; is_parsed or parsed.
    """

    prompt_id: str | None = None
    prompt: str | None = None
    completion_id: str | None = None
    completion: str | None = None
    score: str | None = None
    second_score: str | None = None
    gold: str | None = None
    num_tokens: str | None = None
    truncated: str | None = None
    parsed: str | None = None


@dataclass(frozen=True)
class ScoredRows:
    """B completions of N prompts with their scores. A value that a row lacks is NaN."""

    columns: dict[str, str]
    """What is read -> the column that it is read from."""
    group_ids: Tensor
    """(B,) int64, the prompt of each row, 0 to N - 1 in the order in which they first occur."""
    names: list[str]
    """N, what a prompt is called: its id, or its text."""
    prompts: list[str]
    """N, texts."""
    completions: list[str] | None
    """B, texts."""
    scores: Tensor
    """(B, K) float64, the first is there for all."""
    gold: Tensor | None
    """(B,) float64."""
    num_tokens: Tensor | None
    """(B,) float64."""
    truncated: Tensor | None
    """(B,) float64, 1 where the completion was cut."""
    parsed: Tensor | None
    """(B,) float64, 1 where an answer was found."""

    @property
    def rewards(self) -> Tensor:
        """(B,) float64, the scores that count."""
        return self.scores[:, 0]


def read_scores(
    source: str | os.PathLike[str] | Rows, columns: ScoreColumns | None = None
) -> ScoredRows:
    """Read scored completions.

    Args:
        source: a file or URL as `read_rows` takes it, or a sequence of dicts.
        columns: names of columns.

    Returns:
        The rows.

    Raises:
        ValueError: the file is missing, empty or malformed, a column that is needed or named is not
            there, or a value is not what its column should hold; it names row and column.
    """
    rows = read_rows(source)
    found = find_columns(rows, columns or ScoreColumns())
    if "score" not in found:
        raise ValueError(
            f"no column of scores: it is called {_any_of('score')}, or name it with "
            f"--columns.score; there are {sorted(rows[0])}"
        )
    if not {"prompt", "prompt_id"} & set(found):
        raise ValueError(
            "no column says which rows have the same prompt: it is called "
            f"{_any_of('prompt_id')} or prompt, or name it with --columns.prompt_id; there are "
            f"{sorted(rows[0])}"
        )
    group_ids, names, prompts = _groups(rows, found)
    if "completion_id" in found:
        _check_ids(rows, found["completion_id"], group_ids)

    def numbers(role: str, read: Callable[[Any], float]) -> Tensor | None:
        if role not in found:
            return None
        return _values(rows, found[role], read)

    completions = None
    if "completion" in found:
        completions = [text_of(row.get(found["completion"])) for row in rows]
    return ScoredRows(
        columns=found,
        group_ids=torch.tensor(group_ids),
        names=names,
        prompts=prompts,
        completions=completions,
        scores=_scores(rows, found),
        gold=numbers("gold", optional_number),
        num_tokens=numbers("num_tokens", optional_number),
        truncated=numbers("truncated", is_cut),
        parsed=numbers("parsed", flag),
    )


def find_columns(rows: Sequence[Row], columns: ScoreColumns) -> dict[str, str]:
    """Say which column holds what.

    Args:
        rows: all of them; a column counts if any row has it.
        columns: names that are given.

    Returns:
        What is read -> column, without what is not there.

    Raises:
        ValueError: a column that was named is in no row.
    """
    present = {name for row in rows for name in row}
    given = {f.name: getattr(columns, f.name) for f in fields(columns)}
    for role, name in given.items():
        if name is not None and name not in present:
            raise ValueError(
                f"--columns.{role}: there is no column {name!r}; there are {sorted(present)}"
            )
    found: dict[str, str] = {}
    for role, name in given.items():
        # What has been named to be one thing is not taken for another.
        free = [n for n in USUAL_NAMES[role] if n in present and n not in given.values()]
        if name is not None or free:
            found[role] = name if name is not None else free[0]
    return found


def _groups(rows: Sequence[Row], found: dict[str, str]) -> tuple[list[int], list[str], list[str]]:
    """The prompt of each row, and the names and the texts of the prompts."""
    key = found.get("prompt_id", found.get("prompt", ""))
    numbers: dict[str, int] = {}
    first_rows: list[int] = []
    names: list[str] = []
    prompts: list[str] = []
    group_ids: list[int] = []
    for i, row in enumerate(rows):
        if row.get(key) is None or row[key] == "":
            raise ValueError(f"row {i + 1}: {key} is missing: to which prompt does it belong?")
        name = text_of(row[key])
        text = text_of(row.get(found["prompt"])) if "prompt" in found else name
        if name not in numbers:
            numbers[name] = len(names)
            names.append(name)
            prompts.append(text)
            first_rows.append(i)
        group = numbers[name]
        if text and prompts[group] and text != prompts[group]:
            raise ValueError(
                f"row {i + 1}: {key} {name!r} has another prompt than in row "
                f"{first_rows[group] + 1}: an id names one prompt"
            )
        group_ids.append(group)
    return group_ids, names, prompts


def _check_ids(rows: Sequence[Row], column: str, group_ids: list[int]) -> None:
    """Refuse two completions of a prompt with the same id."""
    seen: dict[tuple[int, str], int] = {}
    for i, row in enumerate(rows):
        value = row.get(column)
        if value is None or value == "":
            continue
        first = seen.setdefault((group_ids[i], text_of(value)), i)
        if first != i:
            raise ValueError(
                f"row {i + 1}: {column} {text_of(value)!r} is that of row {first + 1} too, with "
                "the same prompt: is the row there twice? If the column does not name completions, "
                "leave it out, or say which one does with --columns.completion_id; if it names "
                f"prompts, with --columns.prompt_id {column}"
            )


def _values(rows: Sequence[Row], column: str, read: Callable[[Any], float]) -> Tensor:
    """A column as (B,) float64; an error names the first bad row and counts the others."""
    values: list[float] = []
    problems: list[str] = []
    for i, row in enumerate(rows):
        try:
            values.append(read(row.get(column)))
        except ValueError as error:
            problems.append(f"row {i + 1}: {column}: {error}")
    if problems:
        others = f" (and {len(problems) - 1} more rows)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{others}; mend the value or leave the row out")
    return torch.tensor(values, dtype=torch.float64)


def _scores(rows: Sequence[Row], found: dict[str, str]) -> Tensor:
    """All scores of each row, (B, K), NaN behind the last of a row."""
    column = found["score"]
    cells = [row.get(column) for row in rows]
    num_listed = max([1, *(len(cell) for cell in cells if isinstance(cell, list))])

    def one_of(k: int) -> Callable[[Any], float]:
        def read(value: Any) -> float:
            if not isinstance(value, list):
                return number(value) if k == 0 else math.nan
            if not value:
                raise ValueError("the list is empty")
            return number(value[k]) if k < len(value) else math.nan

        return read

    scores = [_values(rows, column, one_of(k)) for k in range(num_listed)]
    if "second_score" in found:
        scores.append(_values(rows, found["second_score"], optional_number))
    return torch.stack(scores, dim=1)


def _any_of(role: str) -> str:
    *first, last = USUAL_NAMES[role]
    return f"{', '.join(first)} or {last}" if first else last
