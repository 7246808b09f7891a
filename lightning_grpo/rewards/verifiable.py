"""Rewards that a rule verifies: 1 for right, 0 for wrong, None for a row without an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_grpo.rewards.answers import (
    completion_text,
    extract_gsm8k_strict,
    extract_last_number,
    gold_number,
)
from lightning_grpo.types import CompletionText


def exact_match(
    completions: list[CompletionText], answer: list[Any], **columns: Any
) -> list[float | None]:
    """Reward a completion that is the answer, character for character, whitespace around it aside.

    Source: own.

    Args:
        completions: B completions.
        answer: data column, B answers; None where there is none.
        columns: other arguments, not used.

    Returns:
        B values: 1 for right, 0 for wrong, None without an answer.
    """
    return [
        None if gold is None else float(completion_text(completion).strip() == str(gold).strip())
        for completion, gold in zip(completions, answer)
    ]


def numeric_match(
    completions: list[CompletionText], answer: list[Any], **columns: Any
) -> list[float | None]:
    """Reward a completion whose last number equals the answer, exactly.

    Source: own.

    Args:
        completions: B completions.
        answer: data column, B numbers, or texts with one number each; None where there is none.
        columns: other arguments, not used.

    Returns:
        B values: 1 for right, 0 for wrong, None without an answer.

    Raises:
        ValueError: an answer has no number, or several.
    """
    return _numbers_match(completions, answer, extract_last_number)


def gsm8k_strict(
    completions: list[CompletionText], answer: list[Any], **columns: Any
) -> list[float | None]:
    """Reward a completion that gives the right number in the form `#### n`.

    Source: GSM8K (arXiv:2110.14168), format of the answers.
    Departs: numbers are compared as numbers (18 equals 18.0), and the last `####` counts.

    Args:
        completions: B completions.
        answer: data column, B answers as in GSM8K (`... #### n`) or bare numbers; None where there
            is none.
        columns: other arguments, not used.

    Returns:
        B values: 1 for right, 0 for wrong or for another form, None without an answer.

    Raises:
        ValueError: an answer has no number, or several without `####`.
    """
    return _numbers_match(completions, answer, extract_gsm8k_strict)


def gsm8k_flexible(
    completions: list[CompletionText], answer: list[Any], **columns: Any
) -> list[float | None]:
    """Reward a completion whose last number is right, in whatever form it stands.

    Source: GSM8K (arXiv:2110.14168), format of the answers.
    Departs: the completion need not have the form.

    Args:
        completions: B completions.
        answer: data column, B answers as in GSM8K (`... #### n`) or bare numbers; None where there
            is none.
        columns: other arguments, not used.

    Returns:
        B values: 1 for right, 0 for wrong, None without an answer.

    Raises:
        ValueError: an answer has no number, or several without `####`.
    """
    return _numbers_match(completions, answer, extract_last_number)


def format_reward(completions: list[CompletionText], **columns: Any) -> list[float]:
    """Reward a completion that is `<think>...</think><answer>...</answer>` and nothing else.

    Each tag stands once; whitespace may stand before, between and after the two parts.

    Source: DeepSeek-R1 (arXiv:2501.12948), format reward.

    Args:
        completions: B completions.
        columns: other arguments, not used.

    Returns:
        B values, 1 or 0.
    """
    return [float(_has_format(completion_text(completion))) for completion in completions]


def _numbers_match(
    completions: list[CompletionText], answer: list[Any], extract: Callable[[str], str | None]
) -> list[float | None]:
    golds = [gold_number(gold) for gold in answer]
    return [
        None if gold is None else float(extract(completion_text(completion)) == gold)
        for completion, gold in zip(completions, golds)
    ]


def _has_format(text: str) -> bool:
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return False
    thought, _, rest = text.partition("</think>")
    rest = rest.strip()
    is_thought = thought.lstrip().startswith("<think>")
    return is_thought and rest.startswith("<answer>") and rest.endswith("</answer>")
