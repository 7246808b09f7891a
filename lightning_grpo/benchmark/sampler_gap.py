"""How far the log-probs of the sampler are from those of the training forward, per decoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_grpo.benchmark.frozen import frozen_batch
from lightning_grpo.benchmark.parity import Dtype
from lightning_grpo.benchmark.regimes import Regime
from lightning_grpo.generation import NativeEngine, Sampling, SamplingKey, TransformersEngine
from lightning_grpo.packing_check import settle_packing
from lightning_grpo.policy import Policy, eos_token_ids, load_policy
from lightning_grpo.rollout import collect_rollout
from lightning_grpo.scoring import evaluating, score_rollout
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.types import PromptBatch


class Gap(NamedTuple):
    """Between sampler and trainer, in nats."""

    engine: str
    """Engine and decoder."""
    dtype: str
    """Of the forwards; the parameters are float32."""
    mean: float
    """Mean size of a difference."""
    max: float
    """Largest difference."""


def sampler_gaps(folder: Path, regime: Regime, device: torch.device) -> list[Gap]:
    """Sample with every engine and decoder, and score with the training forward.

    Args:
        folder: of the model.
        regime: gives P, G and C; two prompts are taken.
        device: where.

    Returns:
        A gap for each decoder and precision; NaN where the decoder is not for this model or did
        not pass its own check.
    """
    tokenizer = load_tokenizer(str(folder))
    policy = load_policy(str(folder), num_tokens=len(tokenizer))
    settle_packing(policy, "auto")
    policy.to(device)
    eos = eos_token_ids(policy, tokenizer)
    prompts = frozen_batch(folder, regime)
    batch = PromptBatch(
        list(prompts.prompts), prompts.prompt_ids, {}, list(range(len(prompts.prompts)))
    )
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    gaps = []
    for dtype in dtypes:
        for name in [*NativeEngine(policy, tokenizer, eos).decoders, "transformers"]:
            engine: Any = TransformersEngine(policy, tokenizer, eos)
            if name != "transformers":
                engine = NativeEngine(policy, tokenizer, eos)
                engine.decoders = {name: engine.decoders[name]}
            mean, largest = _gap(policy, tokenizer, engine, batch, regime, dtype)
            label = name if name == "transformers" else f"native, {name}"
            if getattr(engine, "decoder_name", name) != name:
                mean = largest = float("nan")
            gaps.append(Gap(label, dtype, mean, largest))
    return gaps


def _gap(
    policy: Policy, tokenizer: Any, engine: Any, batch: PromptBatch, regime: Regime, dtype: Dtype
) -> tuple[float, float]:
    precision = torch.autocast(
        policy.device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False
    )
    sampling = Sampling(max_completion_tokens=regime.completion_tokens)
    with evaluating(policy), torch.no_grad(), precision, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a decoder that does not fit shows as NaN
        rollout = collect_rollout(
            engine, tokenizer, batch, sampling, regime.group_size, key=SamplingKey(0, 0)
        )
        scored = score_rollout(policy, rollout, [torch.arange(len(rollout))], temperature=1.0)
    assert scored.logprobs is not None
    difference = (scored.logprobs - rollout.sampler_logprobs).abs()[rollout.completion_mask]
    return float(difference.mean()), float(difference.max())
