"""Letters by their worth: an additive reward, to which every token contributes by itself."""

from __future__ import annotations

import random
import string
from typing import Any

from lightning_grpo.rewards import completion_text
from lightning_grpo.types import CompletionText

# What a letter is worth in English Scrabble.
POINTS = {
    letter: points
    for letters, points in (
        ("aeilnorstu", 1),
        ("dg", 2),
        ("bcmp", 3),
        ("fhvwy", 4),
        ("k", 5),
        ("jx", 8),
        ("qz", 10),
    )
    for letter in letters
}
MOST_POINTS = 10


class LetterPoints:
    """Rows that ask for letters of high worth, such as prompt `rka:` for 24 letters.

    The letters of a prompt are drawn at random and count for nothing: a reward is a matter of the
    completion alone. Each of its letters adds to the reward by itself, so that the credit of each
    token is known, and a reward for the whole can be compared with credit per token.

    Args:
        num_prompts: rows, >= 1; prompts may repeat.
        num_letters: T, letters that a completion is to have, >= 1.
        num_prompt_letters: letters of a prompt, >= 1.
        seed: decides which prompts are drawn.
    """

    def __init__(
        self,
        num_prompts: int = 4096,
        num_letters: int = 24,
        num_prompt_letters: int = 3,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("num_prompts", num_prompts),
            ("num_letters", num_letters),
            ("num_prompt_letters", num_prompt_letters),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        generator = random.Random(f"letter_points/{seed}")
        self._num_letters = num_letters
        self._prompts = [
            "".join(generator.choices(string.ascii_lowercase, k=num_prompt_letters)) + ":"
            for _ in range(num_prompts)
        ]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self._prompts[index], "num_letters": self._num_letters}


def letter_points(
    completions: list[CompletionText], num_letters: list[int], **_: Any
) -> list[float]:
    """Mean worth of the first T characters, from 0 to 1: missing ones and other signs are worth 0.

    reward = sum over t < T of points(character t) / (10 * T)

    Args:
        completions: B texts, or B message lists.
        num_letters: B times T.

    Returns:
        B rewards, from 0 to 1.
    """
    texts = [completion_text(completion) for completion in completions]
    return [
        sum(POINTS.get(character, 0) for character in text[:length]) / (MOST_POINTS * length)
        for text, length in zip(texts, num_letters, strict=True)
    ]


class NoisyLetterPoints:
    """`letter_points` with noise, as a judge has that errs.

    The noise is drawn from prompt, completion and seed alone: the same completion of the same
    prompt always gets the same reward.

    Args:
        noise_std: standard deviation of the noise, reward units, >= 0.
        seed: decides the noise.
    """

    def __init__(self, noise_std: float = 0.3, seed: int = 0) -> None:
        if not noise_std >= 0:
            raise ValueError(f"noise_std must be at least 0, got {noise_std}")
        self.noise_std = noise_std
        self.seed = seed

    def __call__(
        self,
        prompts: list[Any],
        completions: list[CompletionText],
        num_letters: list[int],
        **_: Any,
    ) -> list[float]:
        """Rewards of B completions, in any range."""
        exact = letter_points(completions, num_letters)
        return [
            points + random.Random(f"{self.seed}/{prompt}/{text}").gauss(0.0, self.noise_std)
            for prompt, text, points in zip(prompts, completions, exact, strict=True)
        ]
