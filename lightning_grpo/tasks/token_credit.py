"""Digits moved on by three: a reward that adds up over the tokens of the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from lightning_grpo.rewards import completion_text
from lightning_grpo.types import CompletionText

_SHIFT = 3


def shifted(digits: str) -> str:
    """Each digit moved on by 3, from 9 back to 0.

    Args:
        digits: such as 4095.

    Returns:
        Such as 7328.
    """
    return "".join(str((int(digit) + _SHIFT) % 10) for digit in digits)


class ShiftedDigits:
    """Rows of digit strings, such as prompt `4095=` and answer `7328`.

    Each digit of the answer is right or wrong by itself, so that the credit of each token is
    known, and one advantage for the whole completion can be compared with credit per token. The
    `completion` column holds the answer too, for a supervised cold start.

    Args:
        num_prompts: rows, >= 1; with few digits they may repeat.
        num_digits: T, digits of a prompt and of its answer, >= 1.
        seed: decides which strings are drawn.
    """

    def __init__(self, num_prompts: int = 4096, num_digits: int = 16, seed: int = 0) -> None:
        for name, value in (("num_prompts", num_prompts), ("num_digits", num_digits)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        generator = random.Random(f"shifted_digits/{num_digits}/{seed}")
        self._digits = [
            "".join(generator.choices("0123456789", k=num_digits)) for _ in range(num_prompts)
        ]

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        digits = self._digits[index]
        answer = shifted(digits)
        return {"prompt": f"{digits}=", "answer": answer, "completion": answer}


def right_digits(
    completions: Sequence[CompletionText], answer: Sequence[str], **_: Any
) -> list[float]:
    """Number of places at which completion and answer hold the same digit.

    Args:
        completions: B texts, or B message lists of which the last message counts.
        answer: B right answers of T digits.

    Returns:
        B rewards from 0 to T.
    """
    texts = [completion_text(completion) for completion in completions]
    return [
        float(sum(x == y for x, y in zip(text, right)))
        for text, right in zip(texts, answer, strict=True)
    ]
