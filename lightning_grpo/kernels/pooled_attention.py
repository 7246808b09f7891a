"""Attention of one token of each row to keys and values that lie in a pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where in the pool the keys and values of each row lie, (R,) int64 each."""

    prompt_start: Tensor
    """First cell of its prompt, which rows may share."""
    prompt_length: Tensor
    """Cells of its prompt; 0 where there is no row."""
    start: Tensor
    """First cell of its completion."""
    length: Tensor
    """Cells of its completion, at least 1."""


class Widths(NamedTuple):
    """The most cells that a prompt and a completion can have."""

    prompt: int
    completion: int


# (R, H, d) queries, (2, cells, Hkv, d) keys and values, places, widths, scaling -> (R, H, d).
Attend = Callable[[Tensor, Tensor, Places, Widths, float], Tensor]


def pooled_attention(
    q: Tensor, kv: Tensor, places: Places, widths: Widths, scaling: float
) -> Tensor:
    """Attention of one token of each row to its prompt and to its completion, in plain PyTorch.

    out[r,h] = softmax_c(scaling * q[r,h] . k[c]) @ v[c],    c the cells of row r

    It gathers keys and values as wide as they can be: what the kernel is checked against, and the
    way of a machine without Triton.

    Args:
        q: (R, H, d).
        kv: (2, cells, Hkv, d); what lies in cell 0 is finite.
        places: of the rows.
        widths: of prompts and completions.
        scaling: of the products.

    Returns:
        (R, H, d) in the type of `kv`.
    """
    prompt_columns = torch.arange(widths.prompt, device=q.device)
    columns = torch.arange(widths.completion, device=q.device)
    start, length = places.start.unsqueeze(1), places.length.unsqueeze(1)
    cells = torch.cat([places.prompt_start.unsqueeze(1) + prompt_columns, start + columns], dim=1)
    is_hidden = torch.cat(
        [prompt_columns >= places.prompt_length.unsqueeze(1), columns >= length], dim=1
    )
    k, v = kv[:, cells.masked_fill(is_hidden, 0)].unbind()  # (R, cells, Hkv, d)
    q = (q * scaling).to(kv.dtype).unflatten(1, (kv.shape[2], -1))  # (R, Hkv, H / Hkv, d)
    scores = torch.einsum("rkhd,rckd->rkhc", q, k)
    scores = scores.masked_fill(is_hidden[:, None, None], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(kv.dtype, torch.float32)).to(kv.dtype)
    return torch.einsum("rkhc,rckd->rkhd", weights, v).flatten(1, 2)
