"""Attention over a packed stream: prompts to themselves, completions to prompt and themselves.

It is pure in (query, key, value, layout), so that recomputing activations repeats it exactly, and
never builds a mask over the whole stream, which would cost more than it saves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_grpo.packing import Bucket, PackedLayout

NAME = "lightning_grpo_packed"
# What an architecture may pass for an attention that this one does not compute.
_NOT_SUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in the form that transformers calls it.

    Args:
        module: the layer's attention.
        query: (1, heads, T, D).
        key: (1, key heads, T, D), rotated and normalised.
        value: (1, key heads, T, D).
        attention_mask: not used; the layout says what attends to what.
        packed_layout: of the stream.
        scaling: of the scores, 1 / sqrt(D) when None.
        sliding_window: of the layer; may not cut into a row.
        dropout: has to be 0.
        **kwargs: of other attention functions.

    Returns:
        (1, T, heads, D), and None for the weights.

    Raises:
        NotImplementedError: the layer asks for more than this.
    """
    asked = [name for name in _NOT_SUPPORTED if kwargs.get(name) is not None]
    if dropout:
        asked.append("dropout")
    if sliding_window is not None and packed_layout.max_positions > sliding_window:
        asked.append(f"sliding_window {sliding_window}")
    if asked:
        raise NotImplementedError(f"packed attention has no {', '.join(asked)}")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if device == "cpu" and query.shape[-1] == value.shape[-1]:
        out = MergedAttention.apply(query, key, value, packed_layout, scaling)
    else:
        out = concat_attention(query, key, value, packed_layout, scaling)
    return out.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout stands in for the mask that transformers would build."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextlib.contextmanager
def attention_in_use(model: nn.Module, name: str) -> Iterator[None]:
    """A transformers model with another attention function.

    Args:
        model: whose configuration names the function; it does so again afterwards.
        name: as transformers registers it.
    """
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def concat_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None
) -> Tensor:
    """Attend with the keys of the prompt put in front of each completion's own.

    Works on every device and under autograd as it is.

    Args:
        query: (1, heads, T, D).
        key: (1, key heads, T, D).
        value: (1, key heads, T, D).
        layout: of the stream.
        scaling: of the scores.

    Returns:
        (1, heads, T, D).
    """
    num_siblings = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_siblings, dim=1) for x in (key, value))
    prompts, completions = [], []
    for group in layout.groups:
        here = (..., group.prompt, slice(None))
        prompts.append(
            scaled_dot_product_attention(
                query[here], key[here], value[here], is_causal=True, scale=scaling
            )
        )
        if group.rows is None:
            continue
        q, k, v = (_padded(x, group.rows) for x in (query, key, value))
        k, v = (
            torch.cat([whole[here].expand(len(own), -1, -1, -1), own], dim=2)
            for whole, own in ((key, k), (value, v))
        )
        # Right padding comes after every real token, so that causality alone hides it.
        bias = causal_lower_right(q.shape[2], k.shape[2])
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)
        completions.append(_unpadded(out, group.rows).transpose(0, 1).unsqueeze(0))
    return torch.cat([*prompts, *completions], dim=2)


class MergedAttention(torch.autograd.Function):
    """Attend to the prompt and to the completion apart, and merge by their normalisers.

    out = sum_i exp(lse_i - lse) out_i,    lse = log sum_i exp(lse_i)

    Source: FlashAttention-2 (arXiv:2307.08691), sec. 2.3 and alg. 2: given the merged `out` and
    `lse`, its backward pass over some of the keys gives exactly the share of those keys.

    The keys of a prompt are read once for all completions of its group, and copied never.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackedLayout,
        scaling: float | None,
    ) -> Tensor:
        """Outputs (1, heads, T, D) of queries (1, heads, T, D)."""
        _, num_heads, length, width = query.shape
        out = query.new_empty(1, length, num_heads, width).transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(1, length, num_heads, dtype=wide).transpose(1, 2)
        for group in layout.groups:
            k, v = key[:, :, group.prompt], value[:, :, group.prompt]
            for part, is_causal in ((group.prompt, True), (group.completions, False)):
                if part.stop > part.start:
                    out[:, :, part], lse[:, :, part] = _attend(
                        query[:, :, part], k, v, is_causal, scaling
                    )
        flat_out, flat_lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)  # (T, heads, ...)
        for bucket in layout.buckets:
            q, k, v = (_padded(x, bucket) for x in (query, key, value))
            own, own_lse = _attend(q, k, v, True, scaling)
            own, own_lse = _unpadded(own, bucket), _unpadded(own_lse, bucket)
            to_prompt, prompt_lse = flat_out[bucket.places], flat_lse[bucket.places]
            merged = torch.logaddexp(prompt_lse, own_lse)
            share = (prompt_lse - merged).exp_().unsqueeze(-1)
            flat_out[bucket.places] = (share * to_prompt + (1 - share) * own).to(out.dtype)
            flat_lse[bucket.places] = merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query, key, value, out, lse = ctx.saved_tensors
        layout, scaling = ctx.layout, ctx.scaling
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        for group in layout.groups:
            prompt, part = group.prompt, group.completions
            k, v = key[:, :, prompt], value[:, :, prompt]
            q, o, of_row, g = (x[:, :, prompt] for x in (query, out, lse, grad))
            d_query[:, :, prompt], d_keys, d_values = _attend_backward(
                g, q, k, v, o, of_row, True, scaling
            )
            if part.stop > part.start:
                q, o, of_row, g = (x[:, :, part] for x in (query, out, lse, grad))
                d_query[:, :, part], more_keys, more_values = _attend_backward(
                    g, q, k, v, o, of_row, False, scaling
                )
                d_keys, d_values = d_keys + more_keys, d_values + more_values
            d_key[:, :, prompt], d_value[:, :, prompt] = d_keys, d_values
        for bucket in layout.buckets:
            q, k, v, o, g = (_padded(x, bucket) for x in (query, key, value, out, grad))
            # An infinite normaliser gives a padded query no weight anywhere.
            hidden = bucket.is_padding.unsqueeze(1)
            of_row = _padded(lse, bucket).masked_fill(hidden, torch.inf)
            found = _attend_backward(g, q, k, v, o, of_row, True, scaling)
            own_query, own_key, own_value = (_unpadded(x, bucket) for x in found)
            d_query[0].transpose(0, 1).index_add_(0, bucket.places, own_query)
            d_key[0].transpose(0, 1)[bucket.places] = own_key
            d_value[0].transpose(0, 1)[bucket.places] = own_value
        return d_query, d_key, d_value, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs, and the logarithm of each normaliser."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scaling
    )
    return out, lse


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scaling: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from outputs and normalisers over perhaps more keys."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    d_query, d_key, d_value = backward(
        grad, query, key, value, out, lse, 0.0, is_causal, scale=scaling
    )
    return d_query, d_key, d_value


def _padded(x: Tensor, bucket: Bucket) -> Tensor:
    """Rows (r, heads, w, ...) of a bucket out of a stream (1, heads, T, ...)."""
    rows: Tensor = x[0].transpose(0, 1).index_select(0, bucket.sources.flatten())
    return rows.view(*bucket.sources.shape, *rows.shape[1:]).transpose(1, 2)


def _unpadded(x: Tensor, bucket: Bucket) -> Tensor:
    """The real tokens (n, heads, ...) of a bucket's rows (r, heads, w, ...)."""
    return x.transpose(1, 2).flatten(0, 1).index_select(0, bucket.taken)
