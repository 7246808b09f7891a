"""The sizes that are measured: shapes of models, regimes of steps, and the presets of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from transformers import Qwen2Config

Length = Literal["fixed", "variable"]
ShapeName = Literal["tiny", "30m", "0.5b"]
Preset = Literal["cpu", "cuda", "growth"]

_MAX_POSITIONS = 32768
AXES = ("shape", "length", "prompt_tokens", "completion_tokens", "group_size", "num_completions")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 with tied embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int

    def config(self) -> Qwen2Config:
        """The configuration of transformers."""
        return Qwen2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=_MAX_POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )


SHAPES: dict[str, Shape] = {
    "tiny": Shape(128, 4, 4, 2, 352, 512),
    "30m": Shape(512, 10, 8, 2, 1408, 4096),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936),
}


@dataclass(frozen=True)
class Regime:
    """Sizes of one training step.

    Args:
        shape: name of the model's shape.
        length: whether every completion has C tokens, or may end by itself before.
        prompt_tokens: P, of every prompt.
        completion_tokens: C, the longest completion.
        group_size: G, completions per prompt.
        num_completions: B, completions per step, a multiple of G.
        mean_tokens: mean length at which completions of variable length end, were C unbounded.
        rows_per_forward: completions of a forward with gradients, for all contestants; None leaves
            this package its default and gives TRL all B at once.
    """

    shape: str = "tiny"
    length: str = "fixed"
    prompt_tokens: int = 128
    completion_tokens: int = 64
    group_size: int = 8
    num_completions: int = 64
    mean_tokens: int = 30
    rows_per_forward: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "completion_tokens", "num_completions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mean_tokens < 2:
            raise ValueError(f"mean_tokens must be at least 2, got {self.mean_tokens}")
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}: GRPO compares siblings"
            )
        if self.num_completions % self.group_size:
            raise ValueError(
                f"num_completions {self.num_completions} must be a multiple of group_size "
                f"{self.group_size}"
            )
        rows = self.rows_per_forward or self.num_completions
        if rows < self.group_size or rows % self.group_size or self.num_completions % rows:
            raise ValueError(
                f"rows_per_forward {rows} must be a multiple of group_size {self.group_size} that "
                f"divides num_completions {self.num_completions}"
            )
        if self.prompt_tokens + self.completion_tokens > _MAX_POSITIONS:
            raise ValueError(
                f"prompt_tokens {self.prompt_tokens} and completion_tokens "
                f"{self.completion_tokens} make more than {_MAX_POSITIONS}"
            )

    @property
    def num_prompts(self) -> int:
        """N, prompts per step."""
        return self.num_completions // self.group_size

    @property
    def label(self) -> str:
        """In a few words."""
        length = f"C={self.completion_tokens}"
        if self.length == "variable":
            length = f"C<={self.completion_tokens}, mean {self.mean_tokens}"
        sizes = f"P={self.prompt_tokens} {length} G={self.group_size} B={self.num_completions}"
        forward = f", {self.rows_per_forward} a forward" if self.rows_per_forward else ""
        return f"{self.shape} {sizes}{forward}"

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def regimes_of(
    axes: Sequence[Any], *, mean_tokens: int, rows_per_forward: int | None
) -> list[Regime]:
    """Every combination of the values of the axes, the last axis running fastest.

    Args:
        axes: a value or a list of values for each of shape, length, prompt_tokens,
            completion_tokens, group_size and num_completions.
        mean_tokens: of variable lengths.
        rows_per_forward: of all regimes.

    Returns:
        At least one regime.

    Raises:
        ValueError: a list is empty.
    """
    lists = [axis if isinstance(axis, list) else [axis] for axis in axes]
    for name, values in zip(AXES, lists, strict=True):
        if not values:
            raise ValueError(f"{name} must have at least one value")
    others = (mean_tokens, rows_per_forward)
    return [Regime(*(values + others)) for values in product(*lists)]


def preset_regimes(preset: Preset) -> list[Regime]:
    """The regimes that a preset stands for.

    Args:
        preset: cpu is the table that figures are published from, cuda the same for a GPU, and
            growth changes one size at a time.

    Returns:
        The regimes.
    """
    if preset == "cpu":
        return [
            *(Regime("tiny", "fixed", p) for p in (32, 128, 256, 1024)),
            Regime("tiny", "fixed", 256, group_size=16),
            *(Regime("tiny", "variable", p, 128) for p in (64, 256)),
            *(Regime("tiny", "fixed", p, rows_per_forward=8) for p in (32, 256)),
            *(
                Regime("30m", length, p, num_completions=32)
                for length in ("fixed", "variable")
                for p in (128, 256)
            ),
        ]
    if preset == "cuda":
        return [
            Regime("0.5b", length, 256, 512, 16, 256, mean_tokens=200, rows_per_forward=32)
            for length in ("fixed", "variable")
        ]
    return [
        *(Regime(prompt_tokens=p) for p in (16, 64, 128, 256, 512)),
        *(Regime(completion_tokens=c) for c in (16, 32, 128, 256)),
        *(Regime(group_size=g) for g in (2, 4, 16)),
        *(Regime(num_completions=b) for b in (16, 32, 128)),
        Regime("30m", num_completions=16),
    ]
