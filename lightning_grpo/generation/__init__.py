"""Rollout engines behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lightning_grpo.generation.protocol import Engine, Sampling, SamplingKey
from lightning_grpo.generation.transformers_engine import TransformersEngine
from lightning_grpo.policy import Policy

EngineName = Literal["transformers"]

__all__ = [
    "Engine",
    "EngineName",
    "Sampling",
    "SamplingKey",
    "TransformersEngine",
    "build_engine",
]


def build_engine(
    name: EngineName,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    *,
    max_rows: int = 0,
) -> Engine:
    """Make the engine of that name.

    Args:
        name: "transformers" runs every model through its own `generate`.
        policy: whose weights generate.
        tokenizer: for stop strings.
        eos_token_ids: ids that end a completion.
        max_rows: rows decoded at a time; 0 decodes all at once.

    Returns:
        The engine.

    Raises:
        ValueError: there is no engine of that name.
    """
    if name == "transformers":
        return TransformersEngine(policy, tokenizer, eos_token_ids, max_rows=max_rows)
    raise ValueError(f"rollout.engine {name!r} is unknown: choose transformers")
