"""What a rollout holds, by the engine that makes it: keys and values, copies of weights, logits.

At the longest prompts and completions. Sizes of tensors that outlive an operation are computed;
what operations need in between is measured on fake tensors, as that of the other passes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_grpo.generation.decode_loop import _COMPACT_BELOW, _MAX_PREFILL_TOKENS
from lightning_grpo.generation.fused_model import fused_layer, refuse_unsupported
from lightning_grpo.generation.fused_weights import HeldWeights, fused_linear
from lightning_grpo.generation.protocol import Sampling
from lightning_grpo.generation.sampling import sample_tokens
from lightning_grpo.memory.activations import (
    PassBytes,
    PassShape,
    autocast,
    fake_models,
    measure_pass,
)
from lightning_grpo.memory.model import ModelSpec, build_on_meta
from lightning_grpo.memory.tracking import LiveBytes

Decoder = Literal["fused", "cached", "transformers"]


@dataclass(frozen=True)
class RolloutShape:
    """The rows of a rollout or of a batch of validation.

    Args:
        num_prompts: N, prompts on this device.
        group_size: completions of each.
        max_rows: rows decoded at a time; 0 decodes all at once.
        num_prompt: P, prompt tokens.
        num_completion: C, completion tokens.
        temperature: other than 1 it costs a copy of the logits.
        is_autocast: whether it runs under bfloat16 autocast.
    """

    num_prompts: int
    group_size: int
    max_rows: int
    num_prompt: int
    num_completion: int
    temperature: float = 1.0
    is_autocast: bool = False

    @property
    def num_rows(self) -> int:
        """R, rows decoded at a time."""
        rows = max(self.num_prompts * self.group_size, 1)
        return min(self.max_rows, rows) if self.max_rows else rows

    @property
    def prompts_held(self) -> int:
        """Prompts that these rows are of; a group may lie across two times."""
        held = -(-self.num_rows // self.group_size) + bool(self.num_rows % self.group_size)
        return min(held, max(self.num_prompts, 1))

    @property
    def num_prefilled(self) -> int:
        """Prompts of one forward."""
        return max(min(self.prompts_held, _MAX_PREFILL_TOKENS // self.num_prompt), 1)


@functools.lru_cache(maxsize=64)
def decoder_of(spec: ModelSpec) -> Decoder:
    """The decoder of the native engine that a model has, if it passes its check.

    Args:
        spec: of the model.

    Returns:
        Its name.
    """
    model = build_on_meta(spec.with_layers(1)).policy.causal_lm
    try:
        refuse_unsupported(model)
    except NotImplementedError:
        kinds = {type(layer) for layer in DynamicCache(config=spec.config).layers}
        is_plain = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        return "cached" if is_plain else "transformers"
    return "fused"


def measure_rollout(spec: ModelSpec, shape: RolloutShape, decoder: Decoder) -> PassBytes:
    """Bytes of a rollout on top of the model's weights.

    Args:
        spec: of the policy alone.
        shape: of the rollout.
        decoder: that of the native engine, or transformers for the engine of that name.

    Returns:
        Keys and values as what is kept, copies of weights, and what is needed beside these.
    """
    if decoder == "fused":
        return _fused(spec, shape)
    whole = PassShape(
        shape.num_rows,
        shape.num_prompt,
        shape.num_completion,
        shape.temperature,
        shape.is_autocast,
    )
    if decoder == "transformers":
        return measure_pass(spec, whole, "rollout")
    prompts = replace(whole, num_rows=shape.num_prefilled, num_completion=1)
    prefill = measure_pass(spec, prompts, "rollout").workspace
    decode = measure_pass(spec, whole, "decode")
    per_token = decode.kept // (shape.num_rows * (shape.num_prompt + shape.num_completion))
    own = shape.num_rows * shape.num_completion * per_token
    # To start rows copies their prompts. To drop others copies what the rest has so far, twice,
    # and makes room behind it: here, when the longest completion is a quarter done.
    start = shape.num_rows * shape.num_prompt * per_token
    dropped = _COMPACT_BELOW * (2 * (start + own / 4) + own)
    return PassBytes(
        kept=decode.kept + shape.prompts_held * shape.num_prompt * per_token,
        weight_copies=decode.weight_copies,
        workspace=int(max(prefill, decode.workspace, start, dropped)),
    )


@functools.lru_cache(maxsize=64)
def _fused(spec: ModelSpec, shape: RolloutShape) -> PassBytes:
    config: Any = spec.config
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or spec.hidden_size // num_heads)
    width = 2 if shape.is_autocast else spec.dtype.itemsize
    # Of one layer: the prompts' keys and values, held once, and those of the rows.
    per_token = 2 * num_kv_heads * head_dim * width
    prompts = shape.prompts_held * shape.num_prompt * per_token
    own = shape.num_rows * shape.num_completion * per_token
    passes = _fused_passes(spec.with_layers(1), shape, num_kv_heads)
    # Queries, keys, values and what attention gives are alive in the feed-forward part too.
    attention = 3 * (num_heads + num_kv_heads) * head_dim * width
    prefill = passes.prefill + shape.num_prefilled * shape.num_prompt * attention
    scores = 3 * shape.num_rows * num_heads * (shape.num_prompt + shape.num_completion) * 4
    # Rows are dropped layer by layer, prompts in all layers at once, when rows are gone already.
    gone = (1 - _COMPACT_BELOW) * own
    dropped = max(2 * _COMPACT_BELOW * own, spec.num_layers * (prompts - gone))
    return PassBytes(
        kept=spec.num_layers * (prompts + own),
        weight_copies=spec.num_layers * passes.layer_copies + passes.head_copies,
        # Prompts run before their rows take anything.
        workspace=int(
            max(prefill - spec.num_layers * own, passes.decode, scores, dropped)
            + passes.prompt_logits
        ),
    )


class _FusedPasses(NamedTuple):
    """Bytes of a model with one layer."""

    layer_copies: int
    """Weights of the layer in the form in which they are applied, where that is a copy."""
    head_copies: int
    """The same of the output layer."""
    prompt_logits: int
    """Logits of the first token of each prompt."""
    prefill: int
    """Peak of the feed-forward part over the tokens of prompts, its input counted."""
    decode: int
    """Peak of drawing a token of each row."""


def _fused_passes(spec: ModelSpec, shape: RolloutShape, num_kv_heads: int) -> _FusedPasses:
    fakes = fake_models(spec)
    model: Any = fakes.models.policy.causal_lm.eval()
    num_tokens = fakes.models.policy.num_tokens
    dtype = model.model.embed_tokens.weight.dtype
    sizes = shape.num_prefilled, shape.num_prompt, spec.hidden_size
    with fakes.mode, torch.no_grad(), LiveBytes(model) as live, autocast(shape.is_autocast):
        held = HeldWeights()
        num_heads = model.config.num_attention_heads
        layer = fused_layer(model.model.layers[0], num_heads, num_kv_heads, held, "layer")
        layer_copies = live.now
        head = fused_linear([model.get_output_embeddings()], held, "head", num_outputs=num_tokens)
        head_copies = live.now - layer_copies
        before = live.peak = live.now
        layer.mlp(torch.zeros(sizes, dtype=dtype) + torch.zeros(sizes, dtype=dtype))
        prefill = live.peak - before
        rows = torch.zeros(shape.num_rows, spec.hidden_size, dtype=dtype)
        uniforms = torch.zeros(shape.num_rows, dtype=torch.float64)
        before = live.peak = live.now
        sample_tokens(head(rows).float(), Sampling(shape.temperature), uniforms)
        decode = live.peak - before
    logits = shape.prompts_held * num_tokens * 4
    return _FusedPasses(layer_copies, head_copies, logits, prefill, decode)
