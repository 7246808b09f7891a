"""One rollout: complete a batch of prompts, decode the texts, keep the ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.generation import EngineName
from lightning_grpo.generation.protocol import OWN_SETTINGS, Engine, Sampling, SamplingKey
from lightning_grpo.generation.transformers_engine import left_pad
from lightning_grpo.types import CompletionText, PromptBatch, Rollout

# Called with rows that have ended: their numbers, completions and token ids.
OnCompleted = Callable[[Sequence[int], Sequence[CompletionText], Sequence[list[int]]], None]


@dataclass(frozen=True)
class RolloutSettings:
    """How completions are made, in training and in validation.

    Args:
        group_size: G, completions per prompt in training.
        sampling: the distribution of the training rollouts.
        val_sampling: the distribution of validation, test and predict.
        engine: see `generation.build_engine`.
        max_rows: rows decoded at a time; 0 decodes all at once.
        num_val_samples: completions per prompt in validation, test and predict, >= 1.
        pass_k: the k of pass@k, 1 to `num_val_samples`.
        seed: part of the key of every draw.
        sampling_column: data column with settings of a prompt's own, see `own_samplings`.
    """

    group_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    val_sampling: Sampling = field(default_factory=Sampling)
    engine: EngineName = "native"
    max_rows: int = 0
    num_val_samples: int = 4
    pass_k: int = 4
    seed: int = 0
    sampling_column: str | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"rollout.group_size must be at least 1, got {self.group_size}")
        if self.num_val_samples < 1:
            raise ValueError(
                f"rollout.num_val_samples must be at least 1, got {self.num_val_samples}"
            )
        if not 1 <= self.pass_k <= self.num_val_samples:
            raise ValueError(
                f"rollout.pass_k must lie between 1 and num_val_samples "
                f"({self.num_val_samples}), got {self.pass_k}"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "rollout.temperature must be above 0: greedy completions of one prompt are all "
                "the same (rollout.val_temperature may be 0)"
            )

    @property
    def restricts_tokens(self) -> bool:
        """Whether training may sample from another distribution than the model's."""
        return self.sampling.restricts_tokens or self.sampling_column is not None

    def sampling_of(self, prompts: PromptBatch, *, is_training: bool) -> Sampling | list[Sampling]:
        """What to draw from for some prompts: the same for all, or one sampling for each."""
        common = self.sampling if is_training else self.val_sampling
        values = prompts.columns.get(self.sampling_column or "")
        return common if values is None else own_samplings(common, values)

    def with_seed(self, seed: int) -> RolloutSettings:
        """The same settings with another seed."""
        return dataclasses.replace(self, seed=seed)


def own_samplings(common: Sampling, values: Sequence[Any]) -> list[Sampling]:
    """The sampling of each prompt: what its data says, and what is common for the rest.

    Args:
        common: of all prompts.
        values: one per prompt: None, or a dict with some of temperature, top_k, top_p,
            max_completion_tokens (at most the common one) and min_completion_tokens, of which None
            says nothing.

    Returns:
        A sampling for each prompt.

    Raises:
        ValueError: a value is none of these; it names the prompt, from 1.
    """
    samplings = []
    for number, value in enumerate(values, start=1):
        try:
            samplings.append(_own_sampling(common, value))
        except (ValueError, TypeError) as error:
            raise ValueError(f"prompt {number} of {len(values)}: {error}") from error
    return samplings


def _own_sampling(common: Sampling, value: Any) -> Sampling:
    if value is None:
        return common
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is neither a dict of sampling settings nor null")
    changes = {name: setting for name, setting in value.items() if setting is not None}
    for name, setting in changes.items():
        if name not in OWN_SETTINGS:
            raise ValueError(f"{name!r} is none of {', '.join(OWN_SETTINGS)}")
        kind = Real if name in ("temperature", "top_p") else int
        if not isinstance(setting, kind) or isinstance(setting, bool):
            raise ValueError(f"{name} is {setting!r}, not a number of its kind")
    own = dataclasses.replace(common, **changes)
    if own.max_completion_tokens > common.max_completion_tokens:
        raise ValueError(
            f"max_completion_tokens is {own.max_completion_tokens}, more than "
            f"rollout.max_completion_tokens ({common.max_completion_tokens}), which bounds all"
        )
    return own


def collect_rollout(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    sampling: Sampling | Sequence[Sampling],
    group_size: int,
    *,
    key: SamplingKey,
    on_completed: OnCompleted | None = None,
) -> Rollout:
    """Complete each prompt `group_size` times and make the rollout of it.

    Args:
        engine: draws the completions.
        tokenizer: decodes them for rewards and for people.
        prompts: N prompts.
        sampling: what to draw from, for all prompts or one for each.
        group_size: G, completions per prompt.
        key: decides every draw.
        on_completed: gets every row once, as soon as the engine says that it has ended.

    Returns:
        B = N * G rows on the engine's device, without rewards.
    """
    rendered = [prompt for prompt in prompts.prompts for _ in range(group_size)]
    completions: dict[int, CompletionText] = {}

    def complete(rows: Sequence[int], token_lists: Sequence[list[int]]) -> None:
        texts = tokenizer.batch_decode(list(token_lists), skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            is_text = isinstance(rendered[row], str)
            completions[row] = text if is_text else [{"role": "assistant", "content": text}]
        if on_completed is not None:
            on_completed(rows, [completions[row] for row in rows], token_lists)

    drawn = engine.generate(prompts, sampling, group_size, key=key, on_finished=complete)
    rest = [row for row in range(len(rendered)) if row not in completions]
    if rest:
        token_lists = completion_lists(drawn.completion_ids, drawn.completion_mask)
        complete(rest, [token_lists[row] for row in rest])
    device = drawn.completion_ids.device
    repeated = [ids for ids in prompts.prompt_ids for _ in range(group_size)]
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompt_ids, prompt_mask = left_pad(repeated, int(pad_token_id), device)
    group_ids = torch.tensor(prompts.group_ids, dtype=torch.int64, device=device)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=drawn.completion_ids,
        completion_mask=drawn.completion_mask,
        action_mask=drawn.completion_mask.clone(),
        sampler_logprobs=drawn.sampler_logprobs,
        group_ids=group_ids.repeat_interleave(group_size),
        truncated=drawn.truncated,
        prompts=rendered,
        completions=[completions[row] for row in range(len(rendered))],
        columns=repeated_columns(prompts, group_size),
    )


def repeated_columns(prompts: PromptBatch, group_size: int) -> dict[str, list[Any]]:
    """The columns of N prompts, each value once for every completion."""
    return {
        name: [value for value in values for _ in range(group_size)]
        for name, values in prompts.columns.items()
    }


def completion_lists(completion_ids: Tensor, completion_mask: Tensor) -> list[list[int]]:
    """Token ids without padding.

    Args:
        completion_ids: (B, C) right-padded.
        completion_mask: (B, C) bool.

    Returns:
        B lists.
    """
    lengths = completion_mask.sum(1).tolist()
    return [row[:length] for row, length in zip(completion_ids.tolist(), lengths, strict=True)]
