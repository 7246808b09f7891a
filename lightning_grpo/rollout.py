"""One rollout: complete a batch of prompts, decode the texts, keep the ids."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from lightning_grpo.generation import EngineName
from lightning_grpo.generation.protocol import Engine, OnFinished, Sampling, SamplingKey
from lightning_grpo.generation.transformers_engine import left_pad
from lightning_grpo.types import CompletionText, PromptBatch, Rollout


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
    """

    group_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    val_sampling: Sampling = field(default_factory=Sampling)
    engine: EngineName = "native"
    max_rows: int = 0
    num_val_samples: int = 4
    pass_k: int = 4
    seed: int = 0

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

    def with_seed(self, seed: int) -> RolloutSettings:
        """The same settings with another seed."""
        return dataclasses.replace(self, seed=seed)


def collect_rollout(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    sampling: Sampling,
    group_size: int,
    *,
    key: SamplingKey,
    on_finished: OnFinished | None = None,
) -> Rollout:
    """Complete each prompt `group_size` times and make the rollout of it.

    Args:
        engine: draws the completions.
        tokenizer: decodes them for rewards and for people.
        prompts: N prompts.
        sampling: what to draw from.
        group_size: G, completions per prompt.
        key: decides every draw.
        on_finished: told how many rows have ended.

    Returns:
        B = N * G rows on the engine's device, without rewards.
    """
    drawn = engine.generate(prompts, sampling, group_size, key=key, on_finished=on_finished)
    device = drawn.completion_ids.device
    repeated = [ids for ids in prompts.prompt_ids for _ in range(group_size)]
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompt_ids, prompt_mask = left_pad(repeated, int(pad_token_id), device)
    lengths = drawn.completion_mask.sum(1).tolist()
    token_lists = [
        row[:length] for row, length in zip(drawn.completion_ids.tolist(), lengths, strict=True)
    ]
    texts = tokenizer.batch_decode(token_lists, skip_special_tokens=True) if token_lists else []
    rendered = [prompt for prompt in prompts.prompts for _ in range(group_size)]
    completions: list[CompletionText] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(rendered, texts, strict=True)
    ]
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
        completions=completions,
        columns={
            name: [value for value in values for _ in range(group_size)]
            for name, values in prompts.columns.items()
        },
    )
