"""The loop of the native engine: which rows run, what is drawn for them, and where they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StopStringCriteria

from lightning_grpo.generation.decoder import Decoder, RolloutCounts
from lightning_grpo.generation.protocol import OnFinished, SamplingKey
from lightning_grpo.generation.sampling import keyed_uniforms, refuse_nonfinite
from lightning_grpo.generation.token_sampler import NO_TOKEN, TokenSampler
from lightning_grpo.types import Completions, PromptBatch

# Finished rows are dropped when fewer than this share of the rows still run: to drop them copies
# the keys and values of the others.
_COMPACT_BELOW = 0.75
# Draws are made ahead, in one go for so many tokens of each row.
_NUM_DRAWS_AHEAD = 32
# Steps between two questions which rows still run. A GPU has to catch up before it answers.
_CHECK_EVERY = {"cpu": 1, "other": 16}
# Bounds the activations of one forward of prompts.
_MAX_PREFILL_TOKENS = 16384


@dataclass(frozen=True)
class Ending:
    """What ends a completion before its limit, and what fills the padding after it.

    Args:
        eos_token_ids: every id that ends a completion.
        stop_strings: finds stop strings at the end of the generated tokens.
        pad_token_id: fills the padding.
    """

    eos_token_ids: Sequence[int]
    stop_strings: StopStringCriteria | None
    pad_token_id: int


class DecodeLoop:
    """Completes one batch of prompts with one decoder.

    Rows start in their order, as many as there is room for; where finished rows make room, more
    start. Which rows run at a time changes no draw.

    Args:
        decoder: with nothing in it yet.
        prompts: N prompts.
        sampler: draws for the N * G rows, and knows their limits.
        group_size: G.
        key: decides every draw.
        ending: what ends a completion.
        num_tokens: V, tokens that can be drawn.
        device: of the decoder.
        max_rows: rows that run at a time; 0 for all.
        on_finished: gets the rows that have ended.
        counts: added to.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: PromptBatch,
        sampler: TokenSampler,
        group_size: int,
        *,
        key: SamplingKey,
        ending: Ending,
        num_tokens: int,
        device: torch.device,
        counts: RolloutCounts,
        max_rows: int = 0,
        on_finished: OnFinished | None = None,
    ) -> None:
        self.decoder = decoder
        self.sampler = sampler
        self.key = key
        self.ending = ending
        self.num_tokens = num_tokens
        self.device = device
        self.counts = counts
        self.on_finished = on_finished
        self.num_rows = len(prompts) * group_size
        self.max_rows = max_rows or self.num_rows
        # The same tokens twice are one prompt to run, though two groups.
        numbers: dict[tuple[int, ...], int] = {}
        of_prompt = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts.prompt_ids]
        self.unique_prompts = [list(ids) for ids in numbers]
        self.prompt_of_row = [number for number in of_prompt for _ in range(group_size)]
        self.is_prefilled: set[int] = set()

        def of_rows(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.group_ids = of_rows(prompts.group_ids).repeat_interleave(group_size)
        self.row_in_group = torch.arange(self.num_rows, device=device) % group_size
        self.is_eos = torch.zeros(num_tokens, dtype=torch.bool, device=device)
        self.is_eos[of_rows([i for i in ending.eos_token_ids if i < num_tokens])] = True
        # The last column takes what rows draw after their end.
        shape = (self.num_rows, sampler.max_completion_tokens + 1)
        self.ids = torch.full(shape, ending.pad_token_id, dtype=torch.int64, device=device)
        # Explicit: the default may be that of a half precision run.
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        self.lengths = of_rows([0] * self.num_rows)
        self.truncated = torch.zeros(self.num_rows, dtype=torch.bool, device=device)
        self.is_reported = torch.zeros_like(self.truncated)
        self.num_reported = 0

        self.num_started = 0
        self.num_draws = 0  # tokens drawn of the row that started first
        self.running: list[int] = []  # the rows in the decoder
        self.started_at: list[int] = []  # num_draws when each of them started
        self.is_running = self.truncated[:0]
        self.rows = self.drawn = self.lengths[:0]  # (R,) row, and tokens drawn of it
        stops = ending.stop_strings
        width = stops.maximum_token_len if stops is not None else 0
        shape = (0, max(width, sampler.num_recent))
        self.recent = torch.zeros(shape, dtype=torch.int64, device=device)  # (R, W) last tokens
        self.draws_ahead = self.logprobs[:0, :0]  # (R, n) uniforms
        self.num_draws_used = 0

    def run(self) -> Completions:
        """Complete all rows."""
        num_running, checked_at = 0, 0
        tokens = self.lengths[:0]
        check_every = _CHECK_EVERY.get(self.device.type, _CHECK_EVERY["other"])
        while True:
            # This also holds at the start, and when the last row has ended.
            has_room = num_running < _COMPACT_BELOW * len(self.running) or num_running == 0
            if has_room:
                tokens = tokens[self._drop_finished()]
            logits = self._step(tokens) if self.running else None
            if has_room and self.num_started < self.num_rows:
                started = self._start()
                logits = started if logits is None else torch.cat([logits, started])
                del started  # as large as the logits of a step
                num_running = len(self.running)
            if logits is None:
                return self._completions()
            tokens = self._draw(logits)
            is_at_limit = self.num_draws - min(self.started_at) >= self.ids.shape[1] - 1
            if self.num_draws - checked_at >= check_every or is_at_limit:
                checked_at = self.num_draws
                num_running = int(self.is_running.sum())
                if self.num_started - num_running > self.num_reported:
                    self._report_finished()

    def _step(self, tokens: Tensor) -> Tensor:
        self.counts.num_steps += 1
        self.counts.num_row_steps += len(tokens)
        return self.decoder.step(tokens)

    def _draw(self, logits: Tensor) -> Tensor:
        """Draw the next token of every row in the decoder, and note which rows end."""
        if self.num_draws_used == self.draws_ahead.shape[1]:
            ahead = torch.arange(_NUM_DRAWS_AHEAD, device=self.device)
            self.draws_ahead = keyed_uniforms(
                self.key,
                self.group_ids[self.rows].unsqueeze(1),
                self.row_in_group[self.rows].unsqueeze(1),
                self.drawn.unsqueeze(1) + ahead,
            )
            self.num_draws_used = 0
        uniforms = self.draws_ahead[:, self.num_draws_used]
        self.num_draws_used += 1
        self.num_draws += 1
        own = {name: values[self.rows] for name, values in self.sampler.own.items()}
        tokens, logprobs = self.sampler.draw(
            logits, uniforms, drawn=self.drawn, recent=self.recent, own=own
        )
        limit = self.ids.shape[1] - 1
        column = self.drawn.clamp(max=limit)
        self.ids[self.rows, column] = tokens
        self.logprobs[self.rows, column] = logprobs
        self.drawn = self.drawn + 1
        ended = self.is_eos[tokens]
        if self.recent.shape[1]:
            self.recent = torch.cat([self.recent[:, 1:], tokens.unsqueeze(1)], dim=1)
        if self.ending.stop_strings is not None:
            is_stop = self.ending.stop_strings(self.recent, None)
            ended = ended | (is_stop & self.sampler.may_stop(self.drawn, own))
        is_at_limit = self.drawn >= own.get("max_completion_tokens", limit)
        stops = self.is_running & (ended | is_at_limit)
        self.lengths[self.rows] = torch.where(stops, self.drawn, self.lengths[self.rows])
        self.truncated[self.rows] |= stops & ~ended
        self.is_running = self.is_running & ~stops
        return tokens

    def _report_finished(self) -> None:
        """Hand out the rows that have ended since the last report."""
        if self.on_finished is None:
            return
        rows = ((self.lengths > 0) & ~self.is_reported).nonzero().flatten()
        self.is_reported[rows] = True
        self.num_reported += len(rows)
        lengths = self.lengths[rows].tolist()
        token_lists = self.ids[rows, : max(lengths)].tolist()
        self.on_finished(
            rows.tolist(), [ids[:n] for ids, n in zip(token_lists, lengths, strict=True)]
        )

    def _drop_finished(self) -> Tensor:
        """Leave the rows in the decoder that still run.

        Returns:
            Their places among those that were there.
        """
        kept = [row for row, runs in enumerate(self.is_running.tolist()) if runs]
        if len(kept) == len(self.running):
            return torch.tensor(kept, dtype=torch.int64, device=self.device)
        self.running = [self.running[row] for row in kept]
        self.started_at = [self.started_at[row] for row in kept]
        waiting = {self.prompt_of_row[row] for row in range(self.num_started, self.num_rows)}
        self.decoder.keep(kept, waiting & self.is_prefilled)
        self.is_prefilled &= waiting
        places = torch.tensor(kept, dtype=torch.int64, device=self.device)
        self.rows, self.drawn = self.rows[places], self.drawn[places]
        self.is_running, self.recent = self.is_running[places], self.recent[places]
        self.draws_ahead = self.draws_ahead[places]
        self.counts.num_compactions += bool(kept)
        return places

    def _start(self) -> Tensor:
        """Start as many rows as there is room for, and return their first logits."""
        end = min(self.num_started + self.max_rows - len(self.running), self.num_rows)
        added = list(range(self.num_started, end))
        numbers = [self.prompt_of_row[row] for row in added]
        self._prefill([n for n in dict.fromkeys(numbers) if n not in self.is_prefilled])
        logits = self.decoder.start(numbers)
        self.counts.max_kv_bytes = max(self.counts.max_kv_bytes, self.decoder.num_kv_bytes())
        self.running += added
        self.started_at += [self.num_draws] * len(added)
        self.num_started = end
        places = torch.tensor(added, dtype=torch.int64, device=self.device)
        self.rows = torch.cat([self.rows, places])
        self.drawn = torch.cat([self.drawn, torch.zeros_like(places)])
        self.is_running = torch.cat([self.is_running, torch.ones_like(places, dtype=torch.bool)])
        self.draws_ahead = self.logprobs[: len(self.running), :0]
        self.num_draws_used = 0
        shape = (len(added), self.recent.shape[1])
        none_yet = torch.full(shape, NO_TOKEN, device=self.device)
        self.recent = torch.cat([self.recent, none_yet])
        return logits

    def _prefill(self, numbers: list[int]) -> None:
        """Run prompts, as many in one forward as the bound on its tokens allows."""
        batch: list[int] = []
        width = 0
        for number in [*numbers, None]:
            length = 0 if number is None else len(self.unique_prompts[number])
            is_full = max(width, length) * (len(batch) + 1) > _MAX_PREFILL_TOKENS
            if batch and (number is None or is_full):
                self.decoder.prefill(batch, [self.unique_prompts[n] for n in batch])
                self.counts.num_prefills += 1
                self.counts.num_prefill_tokens += width * len(batch)
                batch, width = [], 0
            if number is not None:
                batch.append(number)
                width = max(width, length)
        self.is_prefilled.update(numbers)

    def _completions(self) -> Completions:
        width = max(int(self.lengths.max()), 1) if self.num_rows else 1
        mask = torch.arange(width, device=self.device) < self.lengths.unsqueeze(1)
        logprobs = self.logprobs[:, :width]
        refuse_nonfinite(logprobs, mask)
        return Completions(
            completion_ids=torch.where(mask, self.ids[:, :width], self.ending.pad_token_id),
            completion_mask=mask,
            sampler_logprobs=torch.where(mask, logprobs, 0.0),
            truncated=self.truncated,
        )
