"""What a rollout engine is: the settings it samples with and the one method it has."""

from __future__ import annotations

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
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_completion_tokens: int = 256
    stop_strings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.max_completion_tokens < 1:
            raise ValueError(
                f"max_completion_tokens must be at least 1, got {self.max_completion_tokens}"
            )

    @property
    def restricts_tokens(self) -> bool:
        """Whether some tokens can never be drawn, so that it is not the model's distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.temperature == 0


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
        sampling: Sampling,
        group_size: int,
        *,
        key: SamplingKey,
        on_finished: OnFinished | None = None,
    ) -> Completions:
        """Draw G completions of each prompt.

        Args:
            prompts: N prompts.
            sampling: temperature, truncation and stops.
            group_size: G, completions per prompt, >= 1.
            key: with group id, row in the group and position it decides every draw.
            on_finished: gets each of the N * G rows once, soon after it has ended.

        Returns:
            N * G rows, the G rows of a prompt together, in the order of the prompts.
        """
        ...
