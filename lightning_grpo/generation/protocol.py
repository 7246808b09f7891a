"""What a rollout engine is: the settings it samples with and the one method it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lightning_grpo.types import Completions, PromptBatch

# Called with rows that have ended, as numbers from 0 to N * G - 1, and the token ids of each,
# unpadded and up to and including what ended it; no row comes twice.
OnFinished = Callable[[Sequence[int], Sequence[list[int]]], None]


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from, and where they end.

    Args:
        temperature: divides the logits, >= 0; 0 takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all. With fewer than all, the sampled
            distribution is not the one the loss differentiates: log-probs are then recomputed.
        top_p: keep the smallest set of tokens with at least this probability, (0, 1].
        max_completion_tokens: C, the longest completion in tokens, EOS included.
        stop_strings: texts that end a completion, besides the model's EOS ids.
        bad_words: texts whose tokens, as the tokenizer makes them of the text by itself and behind
            a space, are never drawn in a row; other tokens can still spell them.
        min_completion_tokens: the shortest completion in tokens, EOS included: neither an EOS nor
            a stop string ends it before; 1 to `max_completion_tokens`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_completion_tokens: int = 256
    stop_strings: list[str] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    min_completion_tokens: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.max_completion_tokens < 1:
            raise ValueError(
                f"max_completion_tokens must be at least 1, got {self.max_completion_tokens}"
            )
        if not 1 <= self.min_completion_tokens <= self.max_completion_tokens:
            raise ValueError(
                f"min_completion_tokens must lie between 1 and max_completion_tokens "
                f"({self.max_completion_tokens}), got {self.min_completion_tokens}"
            )
        if not all(self.bad_words):
            raise ValueError("bad_words has an empty text, which every completion contains")

    @property
    def restricts_tokens(self) -> bool:
        """Whether some tokens can never be drawn, so that it is not the model's distribution."""
        return (
            self.top_k > 0
            or self.top_p < 1
            or self.temperature == 0
            or bool(self.bad_words)
            or self.min_completion_tokens > 1
        )


# What prompts of one batch may have each for itself.
OWN_SETTINGS = ("temperature", "top_k", "top_p", "max_completion_tokens", "min_completion_tokens")


def per_prompt(sampling: Sampling | Sequence[Sampling], num_prompts: int) -> list[Sampling]:
    """One sampling for each prompt.

    Args:
        sampling: of all prompts, or one for each.
        num_prompts: N.

    Returns:
        N samplings.

    Raises:
        ValueError: another number of them, or they differ in stop strings or bad words.
    """
    if isinstance(sampling, Sampling):
        return [sampling] * num_prompts
    samplings = list(sampling)
    if len(samplings) != num_prompts:
        raise ValueError(f"there are {len(samplings)} samplings for {num_prompts} prompts")
    for name in ("stop_strings", "bad_words"):
        if any(getattr(other, name) != getattr(samplings[0], name) for other in samplings):
            raise ValueError(f"{name} has to be the same for all prompts of a batch")
    return samplings


class SamplingKey(NamedTuple):
    """What, besides group, row and position, a draw depends on."""

    seed: int
    """The run's seed, or another one for validation."""
    iteration: int
    """Iteration of the run, from 0."""


class Engine(Protocol):
    """Anything that completes prompts with the current policy."""

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling | Sequence[Sampling],
        group_size: int,
        *,
        key: SamplingKey,
        on_finished: OnFinished | None = None,
    ) -> Completions:
        """Draw G completions of each prompt.

        Args:
            prompts: N prompts.
            sampling: temperature, truncation and stops, of all prompts or one for each, see
                `per_prompt`.
            group_size: G, completions per prompt, >= 1.
            key: with group id, row in the group and position it decides every draw.
            on_finished: gets each of the N * G rows once, soon after it has ended.

        Returns:
            N * G rows, the G rows of a prompt together, in the order of the prompts.
        """
        ...
