"""The layout of a packed forward: each prompt once, completions behind it, no padding.

The rows of a micro-batch become one stream of tokens,

    prompt 1 | prompt 2 | ... | completions of group 1 | completions of group 2 | ...

and a completion attends to the prompt of its group and to itself (see packed_attention.py). Since
attention is causal, the states of a prompt do not depend on what follows it, so that the siblings
of a group share them exactly; autograd adds their gradients up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Completions are padded for the attention to themselves, to at most twice their own length.
_MAX_PADDING = 2


class Bucket(NamedTuple):
    """Completions of similar length, padded to one width w for their attention to themselves."""

    sources: Tensor
    """(r, w) place in the stream; a padded one repeats the last token of its row."""
    is_padding: Tensor
    """(r, w) bool."""
    places: Tensor
    """(n,) places in the stream of the tokens that are no padding."""
    taken: Tensor
    """(n,) where those tokens are in the flattened (r * w) bucket."""


class Group(NamedTuple):
    """Where a prompt and its completions are in the stream."""

    prompt: slice
    completions: slice
    rows: Bucket | None
    """The group's completions below each other; None when they have no token."""


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The rows of a micro-batch as one stream of T tokens."""

    token_ids: Tensor
    """(1, T)."""
    position_ids: Tensor
    """(1, T); those of each completion continue at the length of its prompt."""
    groups: list[Group]
    """Places of the groups, in the order of their first rows."""
    buckets: list[Bucket]
    """All completions, the longest first."""
    state_index: Tensor
    """(B, C + 1) place of the token whose hidden state predicts each completion token, and of the
    last; the last token of a prompt is there once for each of its completions."""
    state_mask: Tensor
    """(B, C + 1) bool, True where there is such a token."""
    max_positions: int
    """Tokens of the longest row, its prompt counted."""

    def states(self, hidden: Tensor) -> Tensor:
        """From hidden states (1, T, H) those of the completions (B, C + 1, H), 0 off the mask."""
        rows = hidden[0].index_select(0, self.state_index.flatten())
        rows = rows.unflatten(0, self.state_index.shape)
        return torch.where(self.state_mask.unsqueeze(-1), rows, 0.0)


def pack_rows(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor | None = None,
) -> PackedLayout:
    """Lay out rows so that the prompt of each group is there once.

    Args:
        prompt_ids: (B, P) left-padded.
        prompt_mask: (B, P) bool, True = real token.
        completion_ids: (B, C) right-padded.
        completion_mask: (B, C) bool, True = real token.
        group_ids: (B,) rows with the same id and the same prompt share it; without ids none do.

    Returns:
        The layout, on the device of the rows.

    Raises:
        ValueError: a row without a prompt.
    """
    device = prompt_ids.device
    first_of_row = _first_rows(prompt_ids, prompt_mask, group_ids)
    lengths = torch.stack([prompt_mask.sum(1), completion_mask.sum(1), first_of_row.to(device)])
    prompt_lengths, completion_lengths, firsts = lengths.tolist()
    if 0 in prompt_lengths:
        raise ValueError("a row without a prompt token cannot be packed")
    members: dict[int, list[int]] = {}
    for row, first in enumerate(firsts):
        members.setdefault(first, []).append(row)
    starts, groups = _places(members, prompt_lengths, completion_lengths, device)
    order = [row for rows in members.values() for row in rows]
    heads = torch.tensor(list(members), device=device)
    tails = torch.tensor(order, device=device)
    positions = [torch.arange(prompt_lengths[first]) for first in members]
    positions += [
        torch.arange(prompt_lengths[row], prompt_lengths[row] + completion_lengths[row])
        for row in order
    ]
    last_of_prompt = {first: group.prompt.stop - 1 for first, group in zip(members, groups)}
    ends = torch.tensor([last_of_prompt[first] for first in firsts], device=device)
    places = torch.tensor(starts, device=device).unsqueeze(1) + completion_mask.cumsum(1) - 1
    return PackedLayout(
        token_ids=torch.cat(
            [
                prompt_ids[heads][prompt_mask[heads]],
                completion_ids[tails][completion_mask[tails]],
            ]
        ).unsqueeze(0),
        position_ids=torch.cat(positions).unsqueeze(0).to(device),
        groups=groups,
        buckets=_buckets(starts, completion_lengths, device),
        state_index=torch.cat([ends.unsqueeze(1), places], dim=1),
        state_mask=torch.cat([torch.ones_like(completion_mask[:, :1]), completion_mask], dim=1),
        max_positions=max(p + c for p, c in zip(prompt_lengths, completion_lengths)),
    )


def num_packed_tokens(
    group_ids: list[int], prompt_lengths: list[int], completion_lengths: list[int]
) -> int:
    """Tokens that a packed forward of some rows takes.

    tokens = sum over groups of P + sum over rows of C

    Args:
        group_ids: of the rows.
        prompt_lengths: tokens of each row's prompt.
        completion_lengths: tokens of each row's completion.

    Returns:
        T.
    """
    return sum(dict(zip(group_ids, prompt_lengths)).values()) + sum(completion_lengths)


def _first_rows(prompt_ids: Tensor, prompt_mask: Tensor, group_ids: Tensor | None) -> Tensor:
    """The first row with the same group and prompt, for each row (B,)."""
    own = torch.arange(len(prompt_ids))
    if group_ids is None:
        return own
    seen: dict[int, int] = {}
    firsts = torch.tensor([seen.setdefault(g, row) for row, g in enumerate(group_ids.tolist())])
    there = firsts.to(prompt_ids.device)
    real = torch.where(prompt_mask, prompt_ids, -1)
    is_same = (real == real[there]).all(1).cpu()
    return torch.where(is_same, firsts, own)


def _places(
    members: dict[int, list[int]],
    prompt_lengths: list[int],
    completion_lengths: list[int],
    device: torch.device,
) -> tuple[list[int], list[Group]]:
    """Where each row's completion starts in the stream, and where the groups are."""
    starts = [0] * len(prompt_lengths)
    groups = []
    prompt_start = 0
    start = sum(prompt_lengths[first] for first in members)
    for first, rows in members.items():
        prompt = slice(prompt_start, prompt_start + prompt_lengths[first])
        prompt_start, group_start = prompt.stop, start
        for row in rows:
            starts[row] = start
            start += completion_lengths[row]
        real = [row for row in rows if completion_lengths[row]]
        bucket = None
        if real:
            lengths = [completion_lengths[row] for row in real]
            bucket = _bucket([starts[row] for row in real], lengths, device)
        groups.append(Group(prompt, slice(group_start, start), bucket))
    return starts, groups


def _buckets(starts: list[int], lengths: list[int], device: torch.device) -> list[Bucket]:
    order = sorted((row for row in range(len(lengths)) if lengths[row]), key=lambda r: -lengths[r])
    parts: list[list[int]] = []
    for row in order:
        if not parts or lengths[row] * _MAX_PADDING < lengths[parts[-1][0]]:
            parts.append([])
        parts[-1].append(row)
    return [_bucket([starts[r] for r in p], [lengths[r] for r in p], device) for p in parts]


def _bucket(starts: list[int], lengths: list[int], device: torch.device) -> Bucket:
    offsets = torch.arange(max(lengths))
    limits = torch.tensor(lengths).unsqueeze(1)
    index = torch.tensor(starts).unsqueeze(1) + torch.minimum(offsets, limits - 1)
    is_padding = offsets >= limits
    taken = (~is_padding).flatten().nonzero().squeeze(1)
    parts = (index, is_padding, index.flatten()[taken], taken)
    return Bucket(*(part.to(device) for part in parts))
