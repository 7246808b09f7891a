"""From rows to prompts: render each row as a string or a chat, and bound its length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from lightning_grpo.sources import Row, Rows
from lightning_grpo.tokenizing import left_truncate, tokenize_prompts
from lightning_grpo.types import Prompt, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["error", "drop", "left_truncate"]


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt.

    Args:
        prompt_column: column with the prompt, a string or a list of chat messages.
        prompt_template: text with columns in braces, used in place of the prompt column, such as
            "Question: {question}"; a literal brace is written twice.
        system_prompt: put before every chat that has no system message of its own; implies `chat`.
        chat: make strings the user message of a chat.
    """

    prompt_column: str = "prompt"
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class PromptSet:
    """All prompts of one data source, ready for generation."""

    prompts: list[Prompt]
    """As rendered: a left-truncated prompt is whole here and shorter in `prompt_ids`."""
    prompt_ids: list[list[int]]
    columns: dict[str, list[Any]]
    """All columns but the prompt column; None where a row lacks one."""
    row_indices: list[int]
    """Row of the source that each prompt was made from, from 0."""
    num_overlong: int
    """How many rows were dropped or truncated."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompt_ids), default=0)

    def select(self, indices: Sequence[int], group_ids: Sequence[int]) -> PromptBatch:
        """Return the prompts at `indices`, from 0, as groups with the given ids."""
        return PromptBatch(
            prompts=[self.prompts[i] for i in indices],
            prompt_ids=[self.prompt_ids[i] for i in indices],
            columns={name: [values[i] for i in indices] for name, values in self.columns.items()},
            group_ids=list(group_ids),
        )

    def sha256(self) -> str:
        """Return the hash of the rendered prompts and their columns, in their order.

        Objects in a column (images, dates) count by their type only.
        """
        digest = hashlib.sha256()
        names = sorted(self.columns)
        for row, prompt in enumerate(self.prompts):
            content = [prompt, *(self.columns[name][row] for name in names)]
            text = json.dumps(content, skipkeys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
        digest.update(json.dumps(names).encode())
        return digest.hexdigest()


def prepare_prompts(
    rows: Rows,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int | None = None,
    overlong_prompts: Overlong = "error",
) -> PromptSet:
    """Render and tokenize every row, and apply the bound on length.

    Args:
        rows: dicts.
        prompt_format: how a row becomes a prompt.
        tokenizer: of the policy; its chat template and special tokens are used.
        max_prompt_tokens: longest prompt in tokens, >= 1; None sets no bound.
        overlong_prompts: what to do with a longer one. left_truncate keeps the last tokens and a
            BOS in front; of a chat it cuts the opening of the first message too.

    Returns:
        The prompts, in the order of the rows.

    Raises:
        ValueError: a row cannot be rendered, or is too long (with its number, from 1).
    """
    listed = [rows[i] for i in range(len(rows))]
    columns = _columns_of(listed, prompt_format)
    prompts = _render_rows(listed, prompt_format)
    prompt_ids = tokenize_prompts(prompts, tokenizer)
    limit = max_prompt_tokens or max(map(len, prompt_ids), default=0)
    too_long = [i for i, ids in enumerate(prompt_ids) if len(ids) > limit]
    if too_long:
        _refuse_overlong(prompt_ids, too_long, limit, overlong_prompts)
    dropped = set(too_long) if overlong_prompts == "drop" else set()
    kept = [i for i in range(len(prompts)) if i not in dropped]
    for i in set(too_long) - dropped:
        prompt_ids[i] = left_truncate(prompts[i], prompt_ids[i], limit, tokenizer)
    return PromptSet(
        prompts=[prompts[i] for i in kept],
        prompt_ids=[prompt_ids[i] for i in kept],
        columns={name: [values[i] for i in kept] for name, values in columns.items()},
        row_indices=kept,
        num_overlong=len(too_long),
    )


def _render_rows(rows: Sequence[Row], prompt_format: PromptFormat) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(render_prompt(row, prompt_format))
        except ValueError as error:
            raise ValueError(f"row {number} of {len(rows)}: {error}") from error
    return prompts


def _columns_of(rows: Sequence[Row], prompt_format: PromptFormat) -> dict[str, list[Any]]:
    names: dict[str, None] = {}  # a dict keeps the order in which they appear
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} of {len(rows)} is a {type(row).__name__}: a dict from column to "
                "value is needed"
            )
        names.update(dict.fromkeys(row))
    if prompt_format.prompt_template is None:
        names.pop(prompt_format.prompt_column, None)
    return {name: [row.get(name) for row in rows] for name in names}


def render_prompt(row: Row, prompt_format: PromptFormat) -> Prompt:
    """Render one row.

    Args:
        row: column to value.
        prompt_format: how.

    Returns:
        A string, or the messages of a chat.

    Raises:
        ValueError: a column is missing, empty or of the wrong type, or the template is malformed.
    """
    template = prompt_format.prompt_template
    if template is None:
        prompt = _value(row, prompt_format.prompt_column)
    else:
        prompt = _fill(template, row)
    system = prompt_format.system_prompt
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if not prompt_format.chat and system is None:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    messages = _checked_messages(prompt)
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise ValueError(f"no column {column!r}; the row has {sorted(map(str, row))}")
    if row[column] is None:
        raise ValueError(f"the column {column!r} is null")
    return row[column]


def _fill(template: str, row: Row) -> str:
    try:
        for _, field, _, _ in Formatter().parse(template):
            if field is not None:
                _value(row, field.split(".")[0].split("[")[0])
        return template.format_map(row)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"prompt_template {template!r}: {error}") from error


def _checked_messages(prompt: Any) -> list[dict[str, Any]]:
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f"a prompt is a string or a list of messages, not {type(prompt).__name__} {prompt!r}"
        )
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message needs role and content, got {message!r}")
    if prompt[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's, so nothing is left to answer")
    return prompt


def _refuse_overlong(
    prompt_ids: Sequence[Sequence[int]],
    too_long: Sequence[int],
    limit: int,
    overlong_prompts: Overlong,
) -> None:
    lengths = [len(prompt_ids[i]) for i in too_long]
    counts = f"{len(too_long)} of {len(prompt_ids)} rows are longer than max_prompt_tokens={limit}"
    if overlong_prompts == "error":
        raise ValueError(
            f"row {too_long[0] + 1} has a prompt of {lengths[0]} tokens; {counts}, the longest "
            f"has {max(lengths)}: raise it, or set overlong_prompts to drop or left_truncate"
        )
    if overlong_prompts == "drop" and len(too_long) == len(prompt_ids):
        raise ValueError(f"{counts}: overlong_prompts=drop would leave none")
