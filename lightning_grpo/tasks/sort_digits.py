"""Sorting digits: a task with one right answer that a policy of a million parameters can learn."""

from __future__ import annotations

import hashlib
import random
from typing import Any, Literal

from lightning_grpo.rewards import exact_match
from lightning_grpo.types import CompletionText

# One digit string in so many is for validation, and never seen in training.
_VAL_SHARE = 8


def _prompt(digits: str) -> str:
    return f"{digits}="


def _answer(digits: str) -> str:
    return "".join(sorted(digits))


def _is_for_val(digits: str) -> bool:
    return hashlib.sha256(digits.encode()).digest()[0] % _VAL_SHARE == 0


class SortDigits:
    """Rows of distinct digit strings, such as prompt `52914=` and answer `12459`.

    Each length is equally likely, as far as there are enough strings of it. Whether a string
    belongs to training or to validation is decided by its hash, so the two share no prompt,
    whatever the other arguments are. The `completion` column holds the answer too, for a
    supervised cold start.

    Args:
        num_prompts: rows, >= 1.
        min_digits: length of the shortest digit string, >= 1.
        max_digits: length of the longest.
        distinct: no digit occurs twice in a string, which makes the task easier.
        split: half of the strings to draw from; one in eight is for val.
        seed: decides which strings are drawn.
    """

    def __init__(
        self,
        num_prompts: int = 4096,
        min_digits: int = 4,
        max_digits: int = 8,
        distinct: bool = False,
        split: Literal["train", "val"] = "train",
        seed: int = 0,
    ) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        if not 1 <= min_digits <= max_digits:
            raise ValueError(
                f"min_digits={min_digits} must lie between 1 and max_digits={max_digits}"
            )
        if distinct and max_digits > 10:
            raise ValueError(f"there are only 10 distinct digits, max_digits={max_digits}")
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        lengths = range(min_digits, max_digits + 1)
        self._digits = _draw(num_prompts, lengths, split == "val", distinct, seed)

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        digits = self._digits[index]
        answer = _answer(digits)
        return {"prompt": _prompt(digits), "answer": answer, "completion": answer}


def _draw(
    num_prompts: int, lengths: range, is_for_val: bool, distinct: bool, seed: int
) -> list[str]:
    generator = random.Random(f"sort_digits/{seed}")
    drawn: dict[str, None] = {}  # a dict keeps the order, and finds repetitions
    for _ in range(1000 + 100 * num_prompts):
        length = generator.choice(lengths)
        alphabet = "0123456789"
        picked = generator.sample(alphabet, length) if distinct else None
        digits = "".join(picked or generator.choices(alphabet, k=length))
        if _is_for_val(digits) == is_for_val:
            drawn[digits] = None
        if len(drawn) == num_prompts:
            return list(drawn)
    raise ValueError(
        f"SortDigits finds only {len(drawn)} different prompts of {lengths[0]} to {lengths[-1]} "
        f"digits in this split, not num_prompts={num_prompts}: raise max_digits"
    )


def sorted_exactly(
    completions: list[CompletionText], answer: list[str], **_: Any
) -> list[float | None]:
    """Reward 1 for the sorted digits and nothing else, 0 for anything else.

    Args:
        completions: B texts, or B message lists of which the last message counts.
        answer: B right answers.

    Returns:
        B rewards, 0 or 1.
    """
    return exact_match(completions, answer)
