"""What the native engine asks of a decoder, and the counts of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from lightning_grpo.generation.steps import Steps


class Lengths(NamedTuple):
    """What a decoder has to hold in one rollout."""

    prompt: int
    """P, tokens of the longest prompt."""
    completion: int
    """C, tokens of the longest completion."""
    num_tokens: int
    """V, logits of a row; those past them belong to no token."""


class Decoder(Protocol):
    """A model, its weights as they are now, and the keys and values of the rows that are running.

    A prompt is run once, under a number that its caller chooses, and then any number of rows can
    start from it, at once or later. Rows are in the order in which they started.
    """

    steps: Steps
    """How steps are run. With captures, `step` may get more tokens than there are rows."""

    def prefill(self, numbers: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """Run prompts, none of them empty, in one forward.

        Args:
            numbers: one for each prompt, not in use yet.
            prompts: n lists of token ids.
        """
        ...

    def start(self, numbers: Sequence[int]) -> Tensor:
        """Add a row for each number given, after those that are running.

        Args:
            numbers: r numbers of prompts that have been run.

        Returns:
            (r, V) float32 logits of the first token of each new row.
        """
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Run one more token of every row.

        Args:
            tokens: (R,) int64.

        Returns:
            (R, V) float32 logits of the token after it.
        """
        ...

    def keep(self, rows: Sequence[int], prompts: Collection[int]) -> None:
        """Drop all other rows, and all other prompts.

        Args:
            rows: which of the R running rows go on, ascending.
            prompts: numbers of the prompts that rows are still to start from.
        """
        ...

    def num_kv_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        ...

    def close(self) -> None:
        """Let go of what the next rollout does not need; the last use in this one."""
        ...


MakeDecoder = Callable[[PreTrainedModel, Lengths], Decoder]


@dataclass
class RolloutCounts:
    """What one rollout took, as counts, which unlike times are the same on every machine."""

    num_prefill_tokens: int = 0
    """Tokens of the prompt forwards, padding included."""
    num_prefills: int = 0
    """Forwards of prompts."""
    num_steps: int = 0
    """Forwards of one token per row."""
    num_row_steps: int = 0
    """Rows in all those forwards together."""
    num_compactions: int = 0
    """Times that finished rows were dropped while others went on."""
    num_reads: int = 0
    """Times that the host read from the device which rows still run, or how many."""
    num_captures: int = 0
    """Steps that were captured, to be replayed from then on."""
    max_kv_bytes: int = 0
    """Most bytes of keys and values held at a time."""
