"""Attention of one token of each row to keys and values in a pool, as two Triton kernels.

The first reads each prompt once for all rows of a tile that start from it; the second goes on with
each row's own cells. Between them is what a running softmax knows: its maximum, its sum, and the
weighted values. No keys and values are gathered, no mask is made, and a row costs its own length.

Run in Triton's interpreter only: correct there; tile sizes and speed are not measured on a GPU.
"""

# Triton compiles its kernels; their arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_grpo.kernels.pooled_attention import Places, Widths

# Queries of a tile in the first kernel, and cells that are read at a time.
_QUERIES = 32
_CELLS = 64
# The least that a matrix product of Triton takes on each side.
_LEAST = 16


@triton.jit
def _load_cells(of_head, cells, is_there, stride, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Keys or values (cells, d) of one head."""
    column = tl.arange(0, WIDTH)
    offsets = (cells * stride)[:, None] + column[None, :]
    mask = is_there[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(of_head + offsets, mask=mask, other=0.0)


@triton.jit
def _add_cells(q, k, v, is_seen, scaling, maximum, total, values):
    """Take some more cells into a running softmax."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    scores = tl.where(is_seen, scores, -1e30)
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.where(is_seen, tl.exp(scores - new_maximum[:, None]), 0.0)
    shrink = tl.exp(maximum - new_maximum)
    total = total * shrink + tl.sum(weights, 1)
    added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_maximum, total, values * shrink[:, None] + added


@triton.jit
def _prompt_kernel(
    q,
    keys,
    values,
    starts,
    lengths,
    maxima,
    totals,
    weighted_values,
    num_rows,
    scaling,
    NUM_KV: tl.constexpr,
    PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """The cells of prompts, for a tile of (rows, heads of one key) queries."""
    NOWHERE: tl.constexpr = 1 << 62
    kv_head = tl.program_id(1)
    place = tl.arange(0, ROWS * HEADS)
    row = tl.program_id(0) * ROWS + place // HEADS
    head = place % HEADS
    is_query = (row < num_rows) & (head < PER_KV)
    query = (row * NUM_KV + kv_head) * PER_KV + head
    column = tl.arange(0, WIDTH)
    offsets = query[:, None] * HEAD_DIM + column[None, :]
    mask = is_query[:, None] & (column < HEAD_DIM)[None, :]
    q_tile = tl.load(q + offsets, mask=mask, other=0.0)
    keys += kv_head * HEAD_DIM
    values += kv_head * HEAD_DIM
    length = tl.load(lengths + row, mask=is_query, other=0)
    start = tl.load(starts + row, mask=is_query, other=0)
    start = tl.where(length > 0, start, NOWHERE)

    maximum = tl.full((ROWS * HEADS,), -1e30, tl.float32)
    total = tl.zeros((ROWS * HEADS,), tl.float32)
    weighted = tl.zeros((ROWS * HEADS, WIDTH), tl.float32)
    first = tl.min(start, 0)
    while first < NOWHERE:  # one prompt of the tile after the other
        is_mine = start == first
        end = tl.max(tl.where(is_mine, length, 0), 0)
        for offset in range(0, end, CELLS):
            cell = offset + tl.arange(0, CELLS)
            is_there = cell < end
            k = _load_cells(keys, first + cell, is_there, NUM_KV * HEAD_DIM, HEAD_DIM, WIDTH)
            v = _load_cells(values, first + cell, is_there, NUM_KV * HEAD_DIM, HEAD_DIM, WIDTH)
            is_seen = is_mine[:, None] & is_there[None, :]
            maximum, total, weighted = _add_cells(
                q_tile, k, v, is_seen, scaling, maximum, total, weighted
            )
        start = tl.where(is_mine, NOWHERE, start)
        first = tl.min(start, 0)
    tl.store(maxima + query, maximum, mask=is_query)
    tl.store(totals + query, total, mask=is_query)
    tl.store(weighted_values + offsets, weighted, mask=mask)


@triton.jit
def _completion_kernel(
    q,
    keys,
    values,
    starts,
    lengths,
    maxima,
    totals,
    weighted_values,
    out,
    scaling,
    NUM_KV: tl.constexpr,
    PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """The cells of one row's completion, for the heads of one key, and the result."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    head = tl.arange(0, HEADS)
    is_query = head < PER_KV
    query = (row * NUM_KV + kv_head) * PER_KV + head
    column = tl.arange(0, WIDTH)
    offsets = query[:, None] * HEAD_DIM + column[None, :]
    mask = is_query[:, None] & (column < HEAD_DIM)[None, :]
    q_tile = tl.load(q + offsets, mask=mask, other=0.0)
    maximum = tl.load(maxima + query, mask=is_query, other=0.0)
    total = tl.load(totals + query, mask=is_query, other=0.0)
    weighted = tl.load(weighted_values + offsets, mask=mask, other=0.0)
    keys += kv_head * HEAD_DIM
    values += kv_head * HEAD_DIM
    start, end = tl.load(starts + row), tl.load(lengths + row)
    for offset in range(0, end, CELLS):
        cell = offset + tl.arange(0, CELLS)
        is_there = cell < end
        k = _load_cells(keys, start + cell, is_there, NUM_KV * HEAD_DIM, HEAD_DIM, WIDTH)
        v = _load_cells(values, start + cell, is_there, NUM_KV * HEAD_DIM, HEAD_DIM, WIDTH)
        is_seen = is_query[:, None] & is_there[None, :]
        maximum, total, weighted = _add_cells(
            q_tile, k, v, is_seen, scaling, maximum, total, weighted
        )
    result = weighted / tl.where(is_query, total, 1.0)[:, None]
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


def kernel_attention(
    q: Tensor, kv: Tensor, places: Places, widths: Widths, scaling: float
) -> Tensor:
    """The same as `pooled_attention`, with sums in float32.

    Args:
        q: (R, H, d).
        kv: (2, cells, Hkv, d).
        places: of the rows.
        widths: not needed.
        scaling: of the products.

    Returns:
        (R, H, d) in the type of `kv`.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2]
    per_kv = num_heads // num_kv_heads
    heads = triton.next_power_of_2(per_kv)
    rows = max(_QUERIES // heads, 1)
    q = q.to(kv.dtype).contiguous()
    keys, values = kv.unbind()
    maxima, totals = torch.empty(2, num_rows, num_heads, device=q.device, dtype=torch.float32)
    weighted = torch.empty(q.shape, device=q.device, dtype=torch.float32)
    out = torch.empty_like(q)
    sizes: dict[str, Any] = {
        "NUM_KV": num_kv_heads,
        "PER_KV": per_kv,
        "HEAD_DIM": head_dim,
        "WIDTH": max(triton.next_power_of_2(head_dim), _LEAST),
        "CELLS": _CELLS,
    }
    state = (maxima, totals, weighted)
    _prompt_kernel[(triton.cdiv(num_rows, rows), num_kv_heads)](
        *(q, keys, values, places.prompt_start, places.prompt_length, *state, num_rows, scaling),
        ROWS=rows,
        HEADS=heads,
        **sizes,
    )
    _completion_kernel[(num_rows, num_kv_heads)](
        *(q, keys, values, places.start, places.length, *state, out, scaling),
        HEADS=max(heads, _LEAST),
        **sizes,
    )
    return out
