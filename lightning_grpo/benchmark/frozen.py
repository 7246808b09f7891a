"""A batch whose completions and rewards are fixed, so that two trainers can compute the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_grpo.benchmark.regimes import SHAPES, Regime
from lightning_grpo.benchmark.workload import prompt_rows, varied_reward
from lightning_grpo.generation.transformers_engine import left_pad
from lightning_grpo.tokenizing import load_tokenizer
from lightning_grpo.types import Rollout


class Frozen(NamedTuple):
    """A batch whose completions are fixed."""

    prompts: list[str]
    """N."""
    prompt_ids: list[list[int]]
    """N."""
    completion_ids: list[list[int]]
    """B = N * G, those of a prompt together, of different lengths."""


def frozen_batch(folder: Path, regime: Regime, seed: int = 1) -> Frozen:
    """Draw completions of different lengths, half of the batch or more shorter than C.

    Args:
        folder: of the model and its tokenizer.
        regime: gives P, G and C; at most two prompts are taken.
        seed: of the draws.

    Returns:
        The batch.
    """
    draw = random.Random(seed)
    tokenizer = load_tokenizer(str(folder))
    last = SHAPES[regime.shape].vocab_size - 2
    prompts = [row["prompt"] for row in prompt_rows(regime, 1, seed)[:2]]
    completions = []
    for row in range(len(prompts) * regime.group_size):
        length = regime.completion_tokens if row % 2 else draw.randint(1, regime.completion_tokens)
        completions.append([draw.randint(1, last) for _ in range(length)])
    return Frozen(prompts, [tokenizer(text)["input_ids"] for text in prompts], completions)


def scored_rollout(batch: Frozen, regime: Regime, folder: Path, device: torch.device) -> Rollout:
    """The frozen batch as a rollout with rewards.

    Args:
        batch: fixed completions.
        regime: gives G.
        folder: of the tokenizer.
        device: where the tensors go.

    Returns:
        B rows.
    """
    tokenizer = load_tokenizer(str(folder))
    repeated = [ids for ids in batch.prompt_ids for _ in range(regime.group_size)]
    prompt_ids, prompt_mask = left_pad(repeated, tokenizer.pad_token_id, device)
    width = max(map(len, batch.completion_ids))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch.completion_ids])
    lengths = torch.tensor([len(row) for row in batch.completion_ids])
    mask = (torch.arange(width) < lengths.unsqueeze(1)).to(device)
    texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
    groups = torch.arange(len(batch.prompts), device=device)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=ids.to(device),
        completion_mask=mask,
        action_mask=mask,
        sampler_logprobs=torch.zeros(mask.shape, device=device),
        group_ids=groups.repeat_interleave(regime.group_size),
        truncated=torch.zeros(len(mask), dtype=torch.bool, device=device),
        rewards=torch.tensor(varied_reward(texts), dtype=torch.float64, device=device),
    )


def mean_advantage(batch: Frozen, regime: Regime, folder: Path) -> float:
    """Mean size of an advantage of the frozen batch, undivided."""
    rewards = scored_rollout(batch, regime, folder, torch.device("cpu")).rewards
    assert rewards is not None
    grouped = rewards.view(-1, regime.group_size)
    return float((grouped - grouped.mean(1, keepdim=True)).abs().mean())
