"""The engine that works for every model: `generate` of transformers, with our own draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from lightning_grpo.generation.protocol import OnFinished, Sampling, SamplingKey, per_prompt
from lightning_grpo.generation.sampling import keyed_uniforms, refuse_nonfinite
from lightning_grpo.generation.token_sampler import NO_TOKEN, TokenSampler, bad_sequences
from lightning_grpo.policy import Policy
from lightning_grpo.types import Completions, PromptBatch


class TransformersEngine:
    """Completes prompts through `model.generate`, with the policy's own weights.

    `generate` runs greedily over logits in which our processor left one token, so that the draws
    are ours (keyed, and the log-probs are those of the very distribution drawn from).

    Args:
        policy: the policy whose weights generate; its training mode is left to the caller.
        tokenizer: for stop strings, bad words and the padding id.
        eos_token_ids: every id that ends a completion.
        max_rows: rows decoded at a time; 0 decodes all at once.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        *,
        max_rows: int = 0,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.eos_token_ids = list(eos_token_ids)
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling | Sequence[Sampling],
        group_size: int,
        *,
        key: SamplingKey,
        on_finished: OnFinished | None = None,
    ) -> Completions:
        """Draw `group_size` completions of each prompt; see `Engine.generate`."""
        return self.policy.call_unsharded(
            lambda model: self.complete(
                model, prompts, sampling, group_size, key=key, on_finished=on_finished
            )
        )

    @torch.no_grad()
    def complete(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: Sampling | Sequence[Sampling],
        group_size: int,
        *,
        key: SamplingKey,
        on_finished: OnFinished | None = None,
    ) -> Completions:
        """Do the same with a model whose parameters are whole on this rank.

        Args:
            model: the policy's.
            prompts: as in `generate`.
            sampling: as in `generate`.
            group_size: as in `generate`.
            key: as in `generate`.
            on_finished: as in `generate`.

        Returns:
            The completions.
        """
        num_rows = len(prompts) * group_size
        chunk_size = self.max_rows or max(num_rows, 1)
        rows = list(range(num_rows))
        samplings = per_prompt(sampling, len(prompts))
        parts = []
        for start in range(0, num_rows, chunk_size):
            chunk = rows[start : start + chunk_size]
            draws = _Draws(
                key,
                group_ids=[prompts.group_ids[row // group_size] for row in chunk],
                rows=[row % group_size for row in chunk],
                sampler=self.token_sampler([samplings[row // group_size] for row in chunk]),
                num_tokens=self.policy.num_tokens,
                device=self.policy.device,
            )
            ends = _Ends(self.eos_token_ids, self.stop_criteria(samplings[0]), draws)
            if on_finished is not None:
                ends.report = partial(_report, on_finished, start)
            prompt_ids = [prompts.prompt_ids[row // group_size] for row in chunk]
            self._decode(model, prompt_ids, draws, ends)
            parts.append(ends.completions())
        return _concatenate(parts, self.pad_token_id, self.policy.device)

    @property
    def pad_token_id(self) -> int:
        """The id that fills the padding; masks go by position, so any id serves."""
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    def stop_criteria(self, sampling: Sampling) -> StopStringCriteria | None:
        """What finds the stop strings at the end of rows; None without stop strings."""
        if not sampling.stop_strings:
            return None
        return StopStringCriteria(tokenizer=self.tokenizer, stop_strings=sampling.stop_strings)

    def token_sampler(self, samplings: Sequence[Sampling]) -> TokenSampler:
        """What draws the tokens of rows with these samplings, one for each row."""
        words = samplings[0].bad_words if samplings else []
        return TokenSampler(
            samplings,
            bad_sequences=bad_sequences(words, self.tokenizer),
            eos_token_ids=self.eos_token_ids,
            num_tokens=self.policy.num_tokens,
            device=self.policy.device,
        )

    def _decode(
        self, model: PreTrainedModel, prompt_ids: list[list[int]], draws: _Draws, ends: _Ends
    ) -> None:
        ids, mask = left_pad(prompt_ids, self.pad_token_id, self.policy.device)
        ends.num_prompt_tokens = ids.shape[1]
        # A blank configuration in place of the model's own: what that one sets (repetition
        # penalty, top_k, suppressed tokens) would change the distribution behind our back.
        own_config = model.generation_config
        generate: Any = model.generate
        model.generation_config = GenerationConfig()
        try:
            generate(
                input_ids=ids,
                attention_mask=mask.long(),
                generation_config=GenerationConfig(
                    max_new_tokens=draws.sampler.max_completion_tokens,
                    do_sample=False,
                    pad_token_id=self.pad_token_id,
                    use_cache=True,
                ),
                logits_processor=LogitsProcessorList([draws]),
                stopping_criteria=StoppingCriteriaList([ends]),
                synced_gpus=False,
            )
        finally:
            model.generation_config = own_config


class _Draws(LogitsProcessor):
    """Draws the next token of each row and leaves only that one to choose."""

    def __init__(
        self,
        key: SamplingKey,
        *,
        group_ids: list[int],
        rows: list[int],
        sampler: TokenSampler,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self.key = key
        self.group_ids = torch.tensor(group_ids, dtype=torch.int64, device=device)
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self.sampler = sampler
        self.num_tokens = num_tokens
        shape = (len(rows), sampler.num_recent)
        self.recent = torch.full(shape, NO_TOKEN, device=device)
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms = keyed_uniforms(self.key, self.group_ids, self.rows, len(self.tokens))
        tokens, logprobs = self.sampler.draw(
            scores[:, : self.num_tokens],
            uniforms,
            drawn=len(self.tokens),
            recent=self.recent,
            own=self.sampler.own,
        )
        if self.recent.shape[1]:
            self.recent = torch.cat([self.recent[:, 1:], tokens.unsqueeze(1)], dim=1)
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)


class _Ends(StoppingCriteria):
    """Notes where each row ended, and whether by itself or at the limit."""

    def __init__(
        self, eos_token_ids: list[int], stop_strings: StopStringCriteria | None, draws: _Draws
    ) -> None:
        device = draws.group_ids.device
        self.eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self.stop_strings = stop_strings
        self.draws = draws
        self.lengths = torch.zeros(len(draws.rows), dtype=torch.int64, device=device)
        self.truncated = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.report: OnFinished | None = None
        self.is_reported = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.num_prompt_tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        ended = torch.isin(self.draws.tokens[-1], self.eos)
        sampler = self.draws.sampler
        drawn = torch.full_like(self.lengths, len(self.draws.tokens))
        # Only what was generated: a stop string in the prompt ends nothing.
        generated = input_ids[:, self.num_prompt_tokens :]
        if self.stop_strings is not None:
            is_stop = self.stop_strings(generated, scores)
            ended = ended | (is_stop & sampler.may_stop(drawn, sampler.own))
        is_at_limit = drawn >= sampler.own.get(
            "max_completion_tokens", sampler.max_completion_tokens
        )
        stops = (self.lengths == 0) & (ended | is_at_limit)
        self.lengths = torch.where(stops, drawn, self.lengths)
        self.truncated |= stops & ~ended
        self._report_finished(generated)
        return self.lengths > 0

    def _report_finished(self, ids: Tensor) -> None:
        """Hand out the rows that have ended and have not been handed out yet."""
        if self.report is None:
            return
        rows = ((self.lengths > 0) & ~self.is_reported).nonzero().flatten()
        if not len(rows):
            return
        self.is_reported[rows] = True
        pairs = zip(ids[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        self.report(rows.tolist(), [row[:length] for row, length in pairs])

    def completions(self) -> Completions:
        """The rows of this chunk, as long as its longest."""
        ids = torch.stack(self.draws.tokens, dim=1)
        mask = torch.arange(ids.shape[1], device=ids.device) < self.lengths.unsqueeze(1)
        logprobs = torch.stack(self.draws.logprobs, dim=1)
        refuse_nonfinite(logprobs, mask)
        return Completions(ids, mask, torch.where(mask, logprobs, 0.0), self.truncated)


def _report(
    on_finished: OnFinished, start: int, rows: Sequence[int], token_lists: Sequence[list[int]]
) -> None:
    """Report rows of a chunk that begins at row `start`."""
    on_finished([start + row for row in rows], token_lists)


def left_pad(
    rows: list[list[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pad token lists on the left to one width.

    Args:
        rows: B lists of token ids.
        pad_token_id: fills the padding.
        device: where the tensors go.

    Returns:
        ids (B, P) int64 and mask (B, P) bool, True = real token.
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.tensor(
        [[pad_token_id] * (width - len(row)) + row for row in rows], dtype=torch.int64
    ).reshape(len(rows), width)
    mask = torch.tensor(
        [[False] * (width - len(row)) + [True] * len(row) for row in rows], dtype=torch.bool
    ).reshape(len(rows), width)
    return ids.to(device), mask.to(device)


def _concatenate(parts: list[Completions], pad_token_id: int, device: torch.device) -> Completions:
    width = max((part.completion_ids.shape[1] for part in parts), default=1)

    def widen(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)

    if not parts:
        empty = torch.zeros(0, width, device=device)
        return Completions(empty.long(), empty.bool(), empty, empty[:, 0].bool())
    mask = torch.cat([widen(part.completion_mask, False) for part in parts])
    ids = torch.cat([widen(part.completion_ids, pad_token_id) for part in parts])
    return Completions(
        completion_ids=torch.where(mask, ids, pad_token_id),
        completion_mask=mask,
        sampler_logprobs=torch.cat([widen(part.sampler_logprobs, 0.0) for part in parts]),
        truncated=torch.cat([part.truncated for part in parts]),
    )
