"""Exchanging whole groups between ranks, so that each has about the same number of tokens.

An update takes as long as the rank with most tokens needs, and lengths of completions differ a lot.
Every rank keeps its number of groups, and no gradient depends on where a group is.
"""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, distributed

from lightning_grpo.packing import num_packed_tokens
from lightning_grpo.replay import rows_by_group
from lightning_grpo.types import Rollout, join_rollouts, select_rows, to_device

if TYPE_CHECKING:
    from lightning_grpo.module import GRPOModule

# Ranks that differ by less than this share of their tokens are level.
_TOLERANCE = 0.02


def level_over_ranks(module: GRPOModule, rollout: Rollout) -> Rollout:
    """Exchange groups between ranks, if some have many more tokens than others. Collective.

    Args:
        module: with its policy and its ranks.
        rollout: of this rank, with rewards and without advantages.

    Returns:
        The rollout that this rank goes on with: the groups that it keeps, then those that it gets.
    """
    if module.num_ranks == 1:
        return rollout
    groups = rows_by_group(rollout)
    tokens = torch.tensor(group_tokens(rollout, is_packed=module.policy.is_packing))
    counts = module.gather_rows(torch.tensor([len(groups)])).long().tolist()
    held = swapped([part.tolist() for part in module.gather_rows(tokens).long().split(counts)])
    here = module.global_rank
    if all(source == rank for rank, own in enumerate(held) for source, _ in own):
        return rollout

    def rows_for(rank: int) -> Rollout:
        chosen = [index for source, index in held[rank] if source == here]
        rows = [row for index in chosen for row in groups[index]]
        return select_rows(rollout, torch.tensor(rows, dtype=torch.int64))

    parcels = [None if rank == here else as_bytes(rows_for(rank)) for rank in range(len(held))]
    num_failed = sum(parcel is None for parcel in parcels) - 1
    if float(module.sum_over_ranks(torch.tensor(float(num_failed)))) > 0:
        rank_zero_warn(
            "no groups are exchanged to level the ranks: columns of the data, or what reward "
            "functions logged for rows, hold more than texts, numbers, lists and dicts"
        )
        return rollout
    received = exchanged([parcel or b"" for parcel in parcels], module.device)
    parts = [rows_for(here), *(from_bytes(parcel) for parcel in received if parcel)]
    parts = [to_device(part, module.device) for part in parts]
    return join_rollouts(parts, int(module.tokenizer.pad_token_id or 0))


def group_tokens(rollout: Rollout, *, is_packed: bool) -> list[int]:
    """Tokens of each group.

    Args:
        rollout: B rows.
        is_packed: whether the prompt of a group counts once, or with each row.

    Returns:
        A number per group, in the order of their first rows.
    """
    group_ids = rollout.group_ids.tolist()
    prompts = rollout.prompt_mask.sum(1).tolist()
    completions = rollout.completion_mask.sum(1).tolist()
    tokens = []
    for rows in rows_by_group(rollout):
        ids, p, c = ([column[row] for row in rows] for column in (group_ids, prompts, completions))
        tokens.append(num_packed_tokens(ids, p, c) if is_packed else sum(p) + sum(c))
    return tokens


def swapped(tokens: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Decide which rank goes on with which groups.

    The rank with most tokens gives a group for a smaller one of another rank, of one with few if
    it can, such that both come as close together as they can; again and again while that helps.

    Source: own.

    Args:
        tokens: of each group of each rank.

    Returns:
        For each rank the groups that it goes on with, as many as it had: the rank that has it, and
        its index there.
    """
    held = [[(rank, index) for index in range(len(own))] for rank, own in enumerate(tokens)]
    totals = [sum(own) for own in tokens]
    tolerance = _TOLERANCE * sum(totals) / len(totals)
    while True:
        most, *others = sorted(range(len(held)), key=lambda rank: -totals[rank])
        for other in reversed(others):
            gap = totals[most] - totals[other]
            swap = _best_swap(tokens, held[most], held[other], gap) if gap > tolerance else None
            if swap is not None:
                break
        else:
            return held
        i, j, change = swap
        held[most][i], held[other][j] = held[other][j], held[most][i]
        totals[most] -= change
        totals[other] += change


def _best_swap(
    tokens: list[list[int]], more: list[tuple[int, int]], fewer: list[tuple[int, int]], gap: int
) -> tuple[int, int, int] | None:
    """The places of two groups, and the tokens that move, of what comes closest to half the gap."""
    swaps = [
        (i, j, tokens[a[0]][a[1]] - tokens[b[0]][b[1]])
        for i, a in enumerate(more)
        for j, b in enumerate(fewer)
    ]
    swaps = [swap for swap in swaps if 0 < swap[2] < gap]
    return min(swaps, key=lambda swap: abs(gap - 2 * swap[2]), default=None)


def as_bytes(rollout: Rollout) -> bytes | None:
    """A rollout as bytes that `from_bytes` takes, which runs no code from them.

    Args:
        rollout: B rows; none make no bytes.

    Returns:
        Bytes; None when its columns hold objects that would need code.
    """
    if not len(rollout):
        return b""
    rollout = to_device(rollout, torch.device("cpu"))
    content = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    file = io.BytesIO()
    try:
        torch.save(content, file)
        from_bytes(file.getvalue())
    except Exception:  # of the objects' own code, or of what refuses them
        return None
    return file.getvalue()


def from_bytes(parcel: bytes) -> Rollout:
    """What `as_bytes` was given."""
    return Rollout(**torch.load(io.BytesIO(parcel), map_location="cpu", weights_only=True))


def exchanged(parcels: list[bytes], device: torch.device) -> list[bytes]:
    """Send something to each rank, and get what each has sent here. Collective.

    Args:
        parcels: for each rank.
        device: that the ranks exchange tensors of.

    Returns:
        From each rank.
    """
    sizes = torch.tensor([len(parcel) for parcel in parcels], device=device)
    coming = torch.empty_like(sizes)
    distributed.all_to_all_single(coming, sizes)
    outgoing = torch.tensor([], dtype=torch.uint8)
    if any(parcels):
        outgoing = torch.frombuffer(bytearray(b"".join(parcels)), dtype=torch.uint8)
    incoming = torch.empty(int(coming.sum()), dtype=torch.uint8, device=device)
    splits: tuple[list[int], list[int]] = (coming.tolist(), sizes.tolist())
    distributed.all_to_all_single(incoming, outgoing.to(device), *splits)
    return [_bytes_of(part) for part in incoming.cpu().split(splits[0])]


def _bytes_of(tensor: Tensor) -> bytes:
    content: bytes = tensor.numpy().tobytes()
    return content
