"""Rewards that shape the form of a completion, whatever it says."""

from __future__ import annotations

from typing import Any


class SoftOverlong:
    """Penalty that grows over the last tokens before the limit.

    With n completion tokens, limit L and buffer c:

        0              n <= L - c
        (L - c - n)/c  L - c < n <= L
        -1             n > L

    Source: DAPO (arXiv:2503.14476) eq. 13.

    Args:
        max_completion_tokens: L, in tokens; with the limit of the rollouts, a truncated completion
            gets -1.
        buffer_tokens: c, in tokens, 1 to L.

    Raises:
        ValueError: the buffer is empty or longer than the limit.
    """

    def __init__(self, max_completion_tokens: int, buffer_tokens: int) -> None:
        if not 1 <= buffer_tokens <= max_completion_tokens:
            raise ValueError(
                f"buffer_tokens must be from 1 to max_completion_tokens ({max_completion_tokens}), "
                f"not {buffer_tokens}"
            )
        self.max_completion_tokens = max_completion_tokens
        self.buffer_tokens = buffer_tokens

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Score completions by their length.

        Args:
            completion_ids: B lists of token ids, unpadded; an EOS counts as a token.
            columns: other arguments, not used.

        Returns:
            B values from -1 to 0.
        """
        return [self._penalty(len(ids)) for ids in completion_ids]

    def _penalty(self, num_tokens: int) -> float:
        free = self.max_completion_tokens - self.buffer_tokens
        return max(-1.0, min(0.0, (free - num_tokens) / self.buffer_tokens))
