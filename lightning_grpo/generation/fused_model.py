"""Llama-shaped models without their modules: fewer, larger operations for each token.

Query, key and value come from one matrix product, and so do the gate and the up projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from lightning_grpo.generation.fused_weights import (
    Apply,
    HeldWeights,
    called_as_is,
    compute_dtype,
    fused_linear,
    fused_norm,
)

_ARCHITECTURES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# These turn with the length of the batch, so that there is no table for them.
_MOVING_ROPE = ("dynamic", "longrope")


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


class FusedModel:
    """A Llama, Mistral, Qwen2 or Qwen3, with its weights as they are now.

    Args:
        model: in eval mode; its weights must not change while this is used.
        num_tokens: V, logits that are computed.
        held: takes the weights; those of an earlier policy in it are overwritten.

    Raises:
        NotImplementedError: another architecture, or an option of one that is not covered.
    """

    def __init__(self, model: PreTrainedModel, num_tokens: int, held: HeldWeights) -> None:
        refuse_unsupported(model)
        body: Any = model.model
        config: Any = model.config
        self.model = model
        self.device = body.embed_tokens.weight.device
        self.dtype = compute_dtype(body.embed_tokens.weight)
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = body.layers[0].self_attn.head_dim
        self.embed: Apply = called_as_is([body.embed_tokens], held, "embed")
        self.layers = [
            fused_layer(layer, self.num_heads, self.num_kv_heads, held, f"layer{index}")
            for index, layer in enumerate(body.layers)
        ]
        self.final_norm = fused_norm(body.norm, held, "final_norm")
        head: Any = model.get_output_embeddings()
        self.head = fused_linear([head], held, "head", num_outputs=num_tokens)

    def qkv(
        self, layer: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., heads, d) of hidden states (..., hidden)."""
        qkv = layer.qkv(layer.input_norm(x)).unflatten(-1, (-1, self.head_dim))
        num_rotated = self.num_heads + self.num_kv_heads
        qk = layer.qk_norm(qkv[..., :num_rotated, :])
        # The signs of rotate_half are in the table of sines.
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        return qk[..., : self.num_heads, :], qk[..., self.num_heads :, :], qkv[..., num_rotated:, :]

    def run_prompts(
        self,
        prompts: Sequence[list[int]],
        cos: Tensor,
        sin: Tensor,
        keep: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """Run prompts, padded on the right.

        Args:
            prompts: n lists of token ids.
            cos: of every position, see `rope_tables`.
            sin: the same.
            keep: gets the number of a layer, and its keys and values (n, P, Hkv, d).

        Returns:
            (n, V) float32 logits after the last token of each prompt.
        """
        width = max(len(prompt) for prompt in prompts)
        # Behind a causal mask no token sees the padding after it: no other mask is needed.
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        ids, last = ids.to(self.device), last.to(self.device)
        cos, sin = cos[:width, None], sin[:width, None]
        repeats = self.num_heads // self.num_kv_heads
        x = self.embed(ids)  # (n, P, hidden)
        for index, layer in enumerate(self.layers):
            q, k, v = self.qkv(layer, x, cos, sin)  # (n, P, heads, d)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.repeat_interleave(repeats, dim=2).transpose(1, 2),
                v.repeat_interleave(repeats, dim=2).transpose(1, 2),
                is_causal=True,
                scale=layer.scaling,
            )
            x = layer.mlp(x + layer.attention_out(attended.transpose(1, 2).flatten(2)))
            keep(index, k, v)
        rows = torch.arange(len(ids), device=self.device)
        return self.head(self.final_norm(x[rows, last])).float()


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse a model that `FusedModel` does not cover.

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


def fused_layer(
    layer: Any, num_heads: int, num_kv_heads: int, held: HeldWeights, name: str
) -> FusedLayer:
    """One decoder layer of transformers, its weights as they are now.

    Args:
        layer: of one of the architectures.
        num_heads: of the queries.
        num_kv_heads: of the keys and values.
        held: takes the weights.
        name: of the weights.
    """
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    return FusedLayer(
        input_norm=fused_norm(layer.input_layernorm, held, f"{name}.input_norm"),
        qkv=fused_linear(projections, held, f"{name}.qkv"),
        qk_norm=_qk_norm(attention, num_heads, num_kv_heads, held, f"{name}.qk_norm"),
        attention_out=fused_linear([attention.o_proj], held, f"{name}.attention_out"),
        scaling=attention.scaling,
        mlp_norm=fused_norm(layer.post_attention_layernorm, held, f"{name}.mlp_norm"),
        gate_up=fused_linear([mlp.gate_proj, mlp.up_proj], held, f"{name}.gate_up"),
        activation=mlp.act_fn,
        mlp_out=fused_linear([mlp.down_proj], held, f"{name}.mlp_out"),
    )


def _qk_norm(
    attention: Any, num_heads: int, num_kv_heads: int, held: HeldWeights, name: str
) -> Apply:
    if not hasattr(attention, "q_norm"):
        return lambda x: x
    q_norm, k_norm, size = attention.q_norm, attention.k_norm, attention.head_dim
    eps = q_norm.variance_epsilon
    parts = [q_norm.weight.expand(num_heads, size), k_norm.weight.expand(num_kv_heads, size)]
    weight = held.join(name, parts, q_norm.weight.dtype)
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
