"""The loop of the native engine: which rows run, and when others take their places."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_grpo.generation.decoder import Decoder, RolloutCounts
from lightning_grpo.generation.drawn_rows import DrawnRows, Ending
from lightning_grpo.generation.protocol import OnFinished, SamplingKey
from lightning_grpo.generation.steps import LateReader
from lightning_grpo.generation.token_sampler import TokenSampler
from lightning_grpo.types import Completions, PromptBatch

# Finished rows are dropped when fewer than this share of the rows still run: to drop them copies
# the keys and values of the others.
_COMPACT_BELOW = 0.75
# Steps between two questions how many rows still run. A GPU answers one question late.
_CHECK_EVERY = {"cpu": 1, "other": 16}
# Bounds the activations of one forward of prompts.
_MAX_PREFILL_TOKENS = 16384


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
        self.device = device
        self.counts = counts
        self.on_finished = on_finished
        self.limit = sampler.max_completion_tokens
        self.num_rows = len(prompts) * group_size
        self.max_rows = min(max_rows or self.num_rows, self.num_rows)
        # The same tokens twice are one prompt to run, though two groups.
        numbers: dict[tuple[int, ...], int] = {}
        of_prompt = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts.prompt_ids]
        self.unique_prompts = [list(ids) for ids in numbers]
        self.prompt_of_row = [number for number in of_prompt for _ in range(group_size)]
        self.is_prefilled: set[int] = set()

        self.drawn = DrawnRows(
            decoder.steps,
            sampler,
            ending,
            num_rows=self.num_rows,
            max_rows=self.max_rows,
            num_tokens=num_tokens,
            device=device,
        )
        self.drawn.draw_ahead(key, prompts.group_ids, group_size)
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
                self.decoder.steps.run(self._step, len(self.running))
            if has_room and self.num_started < self.num_rows:
                logits = self._start()
                self.drawn.draw(logits, num_running, num_running + len(logits))
                del logits  # as large as those of a step
                num_running = len(self.running)
            if not self.running:
                # The last answer may have come too late to say that all have ended.
                self._report(self.num_rows)
                return self.drawn.completions()
            self.num_draws += 1
            is_at_limit = self.num_draws - self.limit in self.started_at
            if not is_at_limit and self.num_draws - checked_at < check_every:
                continue
            checked_at = self.num_draws
            count = self.drawn.is_running.sum()
            number = int(count) if is_at_limit else reader.read(count)
            if number is None:
                continue
            self.counts.num_reads += 1
            num_running = number
            self._report(self.num_started - num_running)

    def _step(self, num_rows: int) -> None:
        """Run and draw one more token in the first places, those without a row included."""
        tokens = self.drawn.places(0, num_rows).tokens
        self.drawn.draw(self.decoder.step(tokens), 0, num_rows)

    def _report(self, num_ended: int) -> None:
        """Hand out the rows that have ended, where there are more than have been handed out."""
        if self.on_finished is not None and num_ended > self.drawn.num_reported:
            self.drawn.report(self.on_finished)

    def _drop_finished(self, most: int) -> None:
        """Leave the rows in the decoder that still run, of which there are `most` at most."""
        kept = []
        if most:
            self.counts.num_reads += 1
            is_running = self.drawn.is_running[: len(self.running)].tolist()
            kept = [place for place, runs in enumerate(is_running) if runs]
        if len(kept) == len(self.running):
            return
        self.running = [self.running[place] for place in kept]
        self.started_at = [self.started_at[place] for place in kept]
        waiting = {self.prompt_of_row[row] for row in range(self.num_started, self.num_rows)}
        self.decoder.keep(kept, waiting & self.is_prefilled)
        self.is_prefilled &= waiting
        self.drawn.keep(kept)
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
        self.drawn.put(added, num_before)
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
