"""Rollout engines behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lightning_grpo.generation.native_engine import NativeEngine
from lightning_grpo.generation.protocol import Engine, Sampling, SamplingKey
from lightning_grpo.generation.transformers_engine import TransformersEngine
from lightning_grpo.policy import Policy

EngineName = Literal["native", "transformers"]

__all__ = [
    "Engine",
    "EngineName",
    "NativeEngine",
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
    first_decoder: str | None = None,
) -> Engine:
    """Make the engine of that name.

    Args:
        name: "native" runs each prompt once for all its completions and drops finished ones; it
            checks itself against the model at the first rollout, and where they differ it is
            "transformers", which runs every model through its own `generate`.
        policy: whose weights generate.
        tokenizer: for stop strings.
        eos_token_ids: ids that end a completion.
        max_rows: rows decoded at a time; 0 decodes all at once.
        first_decoder: of the native engine, see there.

    Returns:
        The engine.

    Raises:
        ValueError: there is no engine of that name.
    """
    if name == "native":
        return NativeEngine(
            policy, tokenizer, eos_token_ids, max_rows=max_rows, first_decoder=first_decoder
        )
    if name == "transformers":
        return TransformersEngine(policy, tokenizer, eos_token_ids, max_rows=max_rows)
    raise ValueError(f"rollout.engine {name!r} is unknown: choose native or transformers")
