"""The loop of the native engine: which rows run, what is drawn for them, and where they end.

What a step reads and writes lies in tensors that are changed in place, and which rows run is known
on the host: a step can be captured, see steps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StopStringCriteria

from lightning_grpo.generation.decoder import Decoder, RolloutCounts
from lightning_grpo.generation.protocol import OnFinished, SamplingKey
from lightning_grpo.generation.sampling import keyed_uniforms, refuse_nonfinite
from lightning_grpo.generation.steps import LateReader
from lightning_grpo.generation.token_sampler import NO_TOKEN, TokenSampler
from lightning_grpo.types import Completions, PromptBatch

# Finished rows are dropped when fewer than this share of the rows still run: to drop them copies
# the keys and values of the others.
_COMPACT_BELOW = 0.75
# Steps between two questions how many rows still run. A GPU answers one question late.
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
        self.max_rows = min(max_rows or self.num_rows, self.num_rows)
        # The same tokens twice are one prompt to run, though two groups.
        numbers: dict[tuple[int, ...], int] = {}
        of_prompt = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts.prompt_ids]
        self.unique_prompts = [list(ids) for ids in numbers]
        self.prompt_of_row = [number for number in of_prompt for _ in range(group_size)]
        self.is_prefilled: set[int] = set()

        self.steps = decoder.steps
        num_kept, limit = self.steps.num_places(self.num_rows), sampler.max_completion_tokens
        num_places = self.steps.num_places(self.max_rows)
        # What the step does depends on these too, and on nothing else but tensors.
        self.steps.begin(
            repr((num_kept, num_places, num_tokens, sampler.kind, ending.eos_token_ids))
        )

        def full(name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return self.steps.full(name, shape, value, dtype, device)

        # The last row takes what places without a row draw, the last column what rows draw after
        # their end.
        shape = (num_kept + 1, limit + 1)
        self.ids = full("ids", shape, ending.pad_token_id, torch.int64)
        # Explicit: the default may be that of a half precision run.
        self.logprobs = full("logprobs", shape, 0.0, torch.float32)
        self.uniforms = full("uniforms", shape, 0.0, torch.float64)
        self.lengths = full("lengths", shape[:1], 0, torch.int64)
        self.truncated = full("truncated", shape[:1], False, torch.bool)
        self.is_eos = full("is_eos", (num_tokens,), False, torch.bool)
        self.is_eos[[i for i in ending.eos_token_ids if i < num_tokens]] = True
        sampler.move(self.steps.held)
        self.own: dict[str, Tensor] = {}  # what rows do not share, (num_kept + 1,) each
        for name, values in sampler.own.items():
            self.own[name] = full(f"own.{name}", shape[:1], 1, values.dtype)
            self.own[name][: self.num_rows] = values
        if self.num_rows:
            group_ids = torch.tensor(prompts.group_ids, device=device)
            self.uniforms[: self.num_rows, :limit] = keyed_uniforms(
                key,
                group_ids.repeat_interleave(group_size).unsqueeze(1),
                torch.arange(self.num_rows, device=device).unsqueeze(1) % group_size,
                torch.arange(limit, device=device),
            )
        self.is_reported = torch.zeros(self.num_rows, dtype=torch.bool, device=device)
        self.num_reported = 0

        # Of the row in each place of the decoder: its number, tokens drawn, and the last of them.
        self.rows = full("rows", (num_places,), num_kept, torch.int64)
        self.drawn = full("drawn", (num_places,), 0, torch.int64)
        self.tokens = full("tokens", (num_places,), 0, torch.int64)
        self.is_running = full("is_running", (num_places,), False, torch.bool)
        stops = ending.stop_strings
        width = stops.maximum_token_len if stops is not None else 0
        # The last tokens of each.
        self.recent = full("recent", (num_places, max(width, sampler.num_recent)), 0, torch.int64)

        self.num_started = 0
        self.num_draws = 0  # tokens drawn of the row that started first
        self.running: list[int] = []  # the rows in the decoder
        self.started_at: list[int] = []  # num_draws when each of them started

    def run(self) -> Completions:
        """Complete all rows."""
        num_running, checked_at = 0, 0
        reader = LateReader(self.device)
        check_every = _CHECK_EVERY.get(self.device.type, _CHECK_EVERY["other"])
        while True:
            # This also holds at the start, and when the last row has ended.
            has_room = num_running < _COMPACT_BELOW * len(self.running) or num_running == 0
            if has_room:
                self._drop_finished(num_running)
                reader.forget()
                num_running = len(self.running)
            if self.running:
                self.counts.num_steps += 1
                self.counts.num_row_steps += len(self.running)
                self.steps.run(self._step, len(self.running))
            if has_room and self.num_started < self.num_rows:
                logits = self._start()
                self._draw(logits, num_running, num_running + len(logits))
                num_running = len(self.running)
            if not self.running:
                # The last answer may have come too late to say that all have ended.
                self._report_finished()
                return self._completions()
            self.num_draws += 1
            is_at_limit = self.num_draws - self.sampler.max_completion_tokens in self.started_at
            if not is_at_limit and self.num_draws - checked_at < check_every:
                continue
            checked_at = self.num_draws
            count = self.is_running.sum()
            number = int(count) if is_at_limit else reader.read(count)
            if number is None:
                continue
            self.counts.num_reads += 1
            num_running = number
            if self.num_started - num_running > self.num_reported:
                self._report_finished()

    def _step(self, num_rows: int) -> None:
        """Run and draw one more token in the first places, those without a row included."""
        self._draw(self.decoder.step(self.tokens[:num_rows]), 0, num_rows)

    def _draw(self, logits: Tensor, start: int, end: int) -> None:
        """Draw the next token of the rows in some places, and note which of them end."""
        rows, drawn = self.rows[start:end], self.drawn[start:end]
        recent, is_running = self.recent[start:end], self.is_running[start:end]
        own = {name: values[rows] for name, values in self.own.items()}
        limit = self.ids.shape[1] - 1
        column = drawn.clamp(max=limit)
        tokens, logprobs = self.sampler.draw(
            logits, self.uniforms[rows, column], drawn=drawn, recent=recent, own=own
        )
        self.ids[rows, column] = tokens
        self.logprobs[rows, column] = logprobs
        self.tokens[start:end] = tokens
        drawn += 1
        ended = self.is_eos[tokens]
        if recent.shape[1]:
            recent[:] = torch.cat([recent[:, 1:], tokens.unsqueeze(1)], dim=1)
        if self.ending.stop_strings is not None:
            is_stop = self.ending.stop_strings(recent, None)
            ended = ended | (is_stop & self.sampler.may_stop(drawn, own))
        is_at_limit = drawn >= own.get("max_completion_tokens", limit)
        stops = is_running & (ended | is_at_limit)
        self.lengths[rows] = torch.where(stops, drawn, self.lengths[rows])
        self.truncated[rows] |= stops & ~ended
        is_running &= ~stops

    def _report_finished(self) -> None:
        """Hand out the rows that have ended since the last report."""
        if self.on_finished is None:
            return
        has_ended = self.lengths[: self.num_rows] > 0
        rows = (has_ended & ~self.is_reported).nonzero().flatten()
        if not len(rows):
            return
        self.is_reported[rows] = True
        self.num_reported += len(rows)
        lengths = self.lengths[rows].tolist()
        token_lists = self.ids[rows, : max(lengths)].tolist()
        self.on_finished(
            rows.tolist(), [ids[:n] for ids, n in zip(token_lists, lengths, strict=True)]
        )

    def _drop_finished(self, most: int) -> None:
        """Leave the rows in the decoder that still run, of which there are `most` at most."""
        kept = []
        if most:
            self.counts.num_reads += 1
            is_running = self.is_running[: len(self.running)].tolist()
            kept = [place for place, runs in enumerate(is_running) if runs]
        if len(kept) == len(self.running):
            return
        self.running = [self.running[place] for place in kept]
        self.started_at = [self.started_at[place] for place in kept]
        waiting = {self.prompt_of_row[row] for row in range(self.num_started, self.num_rows)}
        self.decoder.keep(kept, waiting & self.is_prefilled)
        self.is_prefilled &= waiting
        places = torch.tensor(kept, dtype=torch.int64, device=self.device)
        for x in (self.rows, self.drawn, self.tokens, self.is_running, self.recent):
            x[: len(kept)] = x[places]
        self.rows[len(kept) :] = len(self.ids) - 1
        self.is_running[len(kept) :] = False
        self.counts.num_compactions += bool(kept)

    def _start(self) -> Tensor:
        """Start as many rows as there is room for, and return their first logits."""
        num_before = len(self.running)
        end = min(self.num_started + self.max_rows - num_before, self.num_rows)
        added = list(range(self.num_started, end))
        numbers = [self.prompt_of_row[row] for row in added]
        self._prefill([n for n in dict.fromkeys(numbers) if n not in self.is_prefilled])
        logits = self.decoder.start(numbers)
        self.counts.max_kv_bytes = max(self.counts.max_kv_bytes, self.decoder.num_kv_bytes())
        self.running += added
        self.started_at += [self.num_draws] * len(added)
        self.num_started = end
        places = slice(num_before, len(self.running))
        self.rows[places] = torch.tensor(added, dtype=torch.int64, device=self.device)
        self.drawn[places] = 0
        self.is_running[places] = True
        self.recent[places] = NO_TOKEN
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
        lengths = self.lengths[: self.num_rows]
        width = max(int(lengths.max()), 1) if self.num_rows else 1
        mask = torch.arange(width, device=self.device) < lengths.unsqueeze(1)
        ids, logprobs = (x[: self.num_rows, :width] for x in (self.ids, self.logprobs))
        refuse_nonfinite(logprobs, mask)
        return Completions(
            completion_ids=torch.where(mask, ids, self.ending.pad_token_id),
            completion_mask=mask,
            sampler_logprobs=torch.where(mask, logprobs, 0.0),
            truncated=self.truncated[: self.num_rows].clone(),
        )
