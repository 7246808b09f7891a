"""The share of dead groups over G, by going on only with prompts that still have no spread.

A prompt whose completions differ in reward after G of them differs at any larger G, so that only
the others have to be completed further. What this costs is little more than the share of dead
groups at each size. After each round all prompts are known at every G so far, and the number of
those that are dead is binomial.

A sampler starts with `start_search`, draws as many completions as `draws_wanted` says, hands their
rewards to `continue_search`, and goes on until none are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_grpo.advantages import EQUAL_RELATIVE_SPREAD
from lightning_grpo.dead_groups import DeadShare
from lightning_grpo.intervals import binomial_interval


@dataclass(frozen=True)
class SpreadSearch:
    """What is known of N prompts."""

    num_drawn: Tensor
    """(N,) int64, scored completions up to the first that differed, or all of them so far."""
    has_spread: Tensor
    """(N,) bool, True where two rewards differ."""
    smallest: Tensor
    """(N,) float64, of the rewards that count; inf before the first."""
    largest: Tensor
    """(N,) float64, of the rewards that count; -inf before the first."""


def start_search(num_prompts: int) -> SpreadSearch:
    """Know nothing of so many prompts."""
    return SpreadSearch(
        num_drawn=torch.zeros(num_prompts, dtype=torch.long),
        has_spread=torch.zeros(num_prompts, dtype=torch.bool),
        smallest=torch.full((num_prompts,), math.inf, dtype=torch.float64),
        largest=torch.full((num_prompts,), -math.inf, dtype=torch.float64),
    )


def draws_wanted(search: SpreadSearch, cap: int) -> Tensor:
    """How many completions of each prompt to draw next: each round doubles the group.

    Args:
        search: so far.
        cap: the largest group, >= 2.

    Returns:
        (N,) int64; all 0 when the search is over. A prompt whose rewards are NaN again and again
        is wanted again and again: count the rounds.

    Raises:
        ValueError: a cap below 2.
    """
    if cap < 2:
        raise ValueError(f"cap is {cap}; a group needs at least 2 completions")
    target = min(cap, max(2, 2 * known_group_size(search, cap)))
    return torch.where(search.has_spread, 0, (target - search.num_drawn).clamp(min=0))


def known_group_size(search: SpreadSearch, cap: int) -> int:
    """The largest group size at which all prompts are known, at most `cap`."""
    still_open: list[int] = search.num_drawn[~search.has_spread].tolist()
    return min([cap, *still_open])


def continue_search(search: SpreadSearch, prompts: Sequence[int], rewards: Tensor) -> SpreadSearch:
    """Take in the rewards of more completions.

    Args:
        search: so far.
        prompts: (B,) the prompt of each row, 0 to N - 1, rows of a prompt in the order in which
            they were drawn.
        rewards: (B,) NaN where no function scored it: such a row is as if it was not drawn.

    Returns:
        What is known then.

    Raises:
        ValueError: lengths that differ, an infinite reward, or a prompt that is none of the N.
    """
    if rewards.shape != (len(prompts),) or bool(rewards.isinf().any()):
        raise ValueError(f"{len(prompts)} finite rewards are needed, one for each prompt given")
    num_drawn, has_spread = search.num_drawn.tolist(), search.has_spread.tolist()
    smallest, largest = search.smallest.tolist(), search.largest.tolist()
    for prompt, reward in zip(prompts, rewards.double().tolist()):
        if not 0 <= prompt < len(num_drawn):
            raise ValueError(f"prompt {prompt} is none of the {len(num_drawn)}, counted from 0")
        if has_spread[prompt] or math.isnan(reward):
            continue
        low, high = min(smallest[prompt], reward), max(largest[prompt], reward)
        num_drawn[prompt] += 1
        has_spread[prompt] = high - low > EQUAL_RELATIVE_SPREAD * max(abs(low), abs(high))
        smallest[prompt], largest[prompt] = low, high
    return SpreadSearch(
        num_drawn=torch.tensor(num_drawn, dtype=torch.long),
        has_spread=torch.tensor(has_spread, dtype=torch.bool),
        smallest=torch.tensor(smallest, dtype=torch.float64),
        largest=torch.tensor(largest, dtype=torch.float64),
    )


def searched_shares(search: SpreadSearch, cap: int, *, level: float = 0.9) -> list[DeadShare]:
    """Share of dead groups at each size from 2 on, as far as all prompts are known.

    The number of dead prompts is binomial at each size, so that `binomial_interval` is exact there:
    it covers at least as often as it says, and more often where prompts are few.

    Args:
        search: so far.
        cap: the largest size.
        level: probability, at least, of each interval by itself, (0, 1).

    Returns:
        One for each size; none before the first round.
    """
    num_prompts = len(search.num_drawn)
    found = []
    for group_size in range(2, known_group_size(search, cap) + 1):
        num_dead = int((~search.has_spread | (search.num_drawn > group_size)).sum())
        found.append(
            DeadShare(
                group_size=group_size,
                share=num_dead / num_prompts if num_prompts else math.nan,
                interval=binomial_interval(num_dead, num_prompts, level=level),
                num_prompts=num_prompts,
            )
        )
    return found
