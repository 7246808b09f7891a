"""The weights of Llama-shaped models in the form in which the fused decoder applies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

_ARCHITECTURES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# These turn with the length of the batch, so that there is no table for them.
_MOVING_ROPE = ("dynamic", "longrope")
Apply = Callable[[Tensor], Tensor]


class FusedLayer(NamedTuple):
    """One decoder layer, ready to be applied."""

    input_norm: Apply
    qkv: Apply
    qk_norm: Apply
    """Of queries and keys together, (..., heads, d)."""
    attention_out: Apply
    scaling: float
    mlp_norm: Apply
    gate_up: Apply
    activation: Apply
    mlp_out: Apply

    def mlp(self, x: Tensor) -> Tensor:
        """Add the feed-forward part to hidden states (..., hidden)."""
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(self.activation(gate) * up)


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse a model that the fused decoder does not cover.

    Args:
        model: the transformers model.

    Raises:
        NotImplementedError: another architecture, or an option of one that is not covered.
    """
    if type(model) not in _ARCHITECTURES:
        raise NotImplementedError(f"{type(model).__name__} has no fused decoder")
    config: Any = model.config
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = window is not None if layer_types is None else "sliding_attention" in layer_types
    if slides and window < config.max_position_embeddings:
        raise NotImplementedError("a sliding window has no fused decoder")
    body: Any = model.model
    if body.rotary_emb.rope_type in _MOVING_ROPE:
        raise NotImplementedError(f"rope {body.rotary_emb.rope_type} has no fused decoder")


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type that matrix products are made in: that of autocast where it is on."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def fused_layer(layer: Any, num_heads: int, num_kv_heads: int) -> FusedLayer:
    """Take the weights of a decoder layer as they are now.

    Args:
        layer: of one of the architectures.
        num_heads: H, of queries.
        num_kv_heads: of keys and values.

    Returns:
        The layer; query, key and value weights are copies, and so are those of gate and up.
    """
    attention, mlp = layer.self_attn, layer.mlp
    return FusedLayer(
        input_norm=fused_norm(layer.input_layernorm),
        qkv=fused_linear([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norm=_qk_norm(attention, num_heads, num_kv_heads),
        attention_out=fused_linear([attention.o_proj]),
        scaling=attention.scaling,
        mlp_norm=fused_norm(layer.post_attention_layernorm),
        gate_up=fused_linear([mlp.gate_proj, mlp.up_proj]),
        activation=mlp.act_fn,
        mlp_out=fused_linear([mlp.down_proj]),
    )


def fused_linear(modules: list[Any], num_outputs: int | None = None) -> Apply:
    """Several linear layers of one input as one, their outputs side by side.

    Args:
        modules: at least one; others than nn.Linear are called one after the other.
        num_outputs: leave the outputs past these out.

    Returns:
        The function from (..., in) to (..., out).
    """
    if any(type(module) is not nn.Linear for module in modules):
        return lambda x: torch.cat([module(x) for module in modules], dim=-1)[..., :num_outputs]
    # One type for all of the rollout: autocast would cast the weights again at every token.
    dtype = compute_dtype(modules[0].weight)
    parts = [module.weight.detach().to(dtype) for module in modules]
    weight = (torch.cat(parts) if len(parts) > 1 else parts[0])[:num_outputs]
    bias = None
    if any(module.bias is not None for module in modules):
        biases = [
            weight.new_zeros(len(module.weight)) if module.bias is None else module.bias.detach()
            for module in modules
        ]
        bias = torch.cat(biases).to(dtype)[:num_outputs]
    return lambda x: F.linear(x, weight, bias)


def fused_norm(module: Any) -> Apply:
    """An RMSNorm as one operation."""
    weight, eps = module.weight.detach(), module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _qk_norm(attention: Any, num_heads: int, num_kv_heads: int) -> Apply:
    if not hasattr(attention, "q_norm"):
        return lambda x: x
    eps, size = attention.q_norm.variance_epsilon, attention.head_dim
    weight = torch.cat(
        [
            attention.q_norm.weight.detach().expand(num_heads, size),
            attention.k_norm.weight.detach().expand(num_kv_heads, size),
        ]
    )
    return lambda x: F.rms_norm(x, (size,), eps=eps) * weight


def rope_tables(model: PreTrainedModel, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, from the model's own rotary module.

    Args:
        model: of one of the architectures.
        num_positions: of the longest sequence.

    Returns:
        cos and sin (positions, d); the first half of the sines is negated, so that
        x * cos + roll(x, d / 2) * sin rotates.

    Raises:
        NotImplementedError: only a part of each head is rotated.
    """
    body: Any = model.model
    weight = body.embed_tokens.weight
    positions = torch.arange(num_positions, device=weight.device)[None]
    cos, sin = body.rotary_emb(weight, positions)
    if cos.shape[-1] != body.layers[0].self_attn.head_dim:
        raise NotImplementedError("rope on a part of each head has no fused decoder")
    half = sin.shape[-1] // 2
    return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
