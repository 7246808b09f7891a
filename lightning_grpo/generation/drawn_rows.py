"""The rows of a rollout on the device: what is drawn for them, where they end, who is told.

All lies in tensors that are changed in place, so that a step can be captured, see steps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import StopStringCriteria

from lightning_grpo.generation.protocol import OnFinished, SamplingKey
from lightning_grpo.generation.sampling import keyed_uniforms, refuse_nonfinite
from lightning_grpo.generation.steps import Steps
from lightning_grpo.generation.token_sampler import NO_TOKEN, TokenSampler
from lightning_grpo.types import Completions


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


class _Places(NamedTuple):
    """Of the row in each of n places."""

    rows: Tensor
    """(n,) its number."""
    drawn: Tensor
    """(n,) tokens drawn."""
    tokens: Tensor
    """(n,) the last of them."""
    is_running: Tensor
    """(n,) whether it has not ended."""
    recent: Tensor
    """(n, W) the last tokens."""


class DrawnRows:
    """Draws the tokens of rows, of which some run at a time, each in a place of its own.

    Args:
        steps: hold the tensors, and begin a rollout here.
        sampler: draws for all rows.
        ending: what ends a completion.
        num_rows: of the rollout.
        max_rows: most that run at a time.
        num_tokens: V, tokens that can be drawn.
        device: of the tensors.
    """

    def __init__(
        self,
        steps: Steps,
        sampler: TokenSampler,
        ending: Ending,
        *,
        num_rows: int,
        max_rows: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self.sampler, self.ending = sampler, ending
        self.num_rows = num_rows
        self.device = device
        num_kept, num_places = steps.num_places(num_rows), steps.num_places(max_rows)
        # What a step does depends on these too, and on nothing else but tensors.
        steps.begin(repr((num_kept, num_places, num_tokens, sampler.kind, ending.eos_token_ids)))

        def full(name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return steps.full(name, shape, value, dtype, device)

        # The last row takes what places without a row draw, the last column what rows draw after
        # their end.
        shape = (num_kept + 1, sampler.max_completion_tokens + 1)
        self.ids = full("ids", shape, ending.pad_token_id, torch.int64)
        # Explicit: the default may be that of a half precision run.
        self.logprobs = full("logprobs", shape, 0.0, torch.float32)
        self.uniforms = full("uniforms", shape, 0.0, torch.float64)
        self.lengths = full("lengths", shape[:1], 0, torch.int64)
        self.truncated = full("truncated", shape[:1], False, torch.bool)
        self.is_eos = full("is_eos", (num_tokens,), False, torch.bool)
        self.is_eos[[i for i in ending.eos_token_ids if i < num_tokens]] = True
        sampler.move(steps.held)
        self.own: dict[str, Tensor] = {}  # settings that rows do not share
        for name, values in sampler.own.items():
            self.own[name] = full(f"own.{name}", shape[:1], 1, values.dtype)
            self.own[name][:num_rows] = values

        stops = ending.stop_strings
        width = max(stops.maximum_token_len if stops is not None else 0, sampler.num_recent)
        self.all_places = _Places(
            rows=full("rows", (num_places,), num_kept, torch.int64),
            drawn=full("drawn", (num_places,), 0, torch.int64),
            tokens=full("tokens", (num_places,), 0, torch.int64),
            is_running=full("is_running", (num_places,), False, torch.bool),
            recent=full("recent", (num_places, width), 0, torch.int64),
        )
        self.views: dict[tuple[int, int], _Places] = {}

        self.is_reported = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.num_reported = 0

    @property
    def is_running(self) -> Tensor:
        """(places,) bool, False where there is no row."""
        return self.all_places.is_running

    def draw_ahead(self, key: SamplingKey, group_ids: Sequence[int], group_size: int) -> None:
        """Make the random numbers of all draws.

        Args:
            key: decides them.
            group_ids: of the prompts.
            group_size: rows of each.
        """
        if not self.num_rows:
            return
        limit = self.sampler.max_completion_tokens
        self.uniforms[: self.num_rows, :limit] = keyed_uniforms(
            key,
            torch.tensor(group_ids, device=self.device).repeat_interleave(group_size).unsqueeze(1),
            torch.arange(self.num_rows, device=self.device).unsqueeze(1) % group_size,
            torch.arange(limit, device=self.device),
        )

    def put(self, rows: Sequence[int], place: int) -> None:
        """Let rows begin, in places from one on."""
        places = self.places(place, place + len(rows))
        places.rows.copy_(torch.tensor(rows, dtype=torch.int64))
        places.drawn.zero_()
        places.is_running.fill_(True)
        places.recent.fill_(NO_TOKEN)

    def places(self, start: int, end: int) -> _Places:
        """What belongs to the rows in some places, as views."""
        views = self.views.get((start, end))
        if views is None:  # to make them takes longer than some operations
            views = self.views[start, end] = _Places(*(x[start:end] for x in self.all_places))
        return views

    def draw(self, logits: Tensor, start: int, end: int) -> None:
        """Draw the next token of the rows in some places, and note which of them end.

        Args:
            logits: (end - start, V).
            start: the first place.
            end: the place after the last.
        """
        rows, drawn, last, is_running, recent = self.places(start, end)
        own = {name: values[rows] for name, values in self.own.items()}
        limit = self.ids.shape[1] - 1
        column = drawn.clamp(max=limit)
        tokens, logprobs = self.sampler.draw(
            logits, self.uniforms[rows, column], drawn=drawn, recent=recent, own=own
        )
        self.ids[rows, column] = tokens
        self.logprobs[rows, column] = logprobs
        last.copy_(tokens)
        drawn += 1
        ended = self.is_eos[tokens]
        if recent.shape[1]:
            recent.copy_(torch.cat([recent[:, 1:], tokens.unsqueeze(1)], dim=1))
        if self.ending.stop_strings is not None:
            is_stop = self.ending.stop_strings(recent, None)
            ended = ended | (is_stop & self.sampler.may_stop(drawn, own))
        is_at_limit = drawn >= own.get("max_completion_tokens", limit)
        stops = is_running & (ended | is_at_limit)
        self.lengths[rows] = torch.where(stops, drawn, self.lengths[rows])
        self.truncated[rows] |= stops & ~ended
        is_running &= ~stops

    def keep(self, places: Sequence[int]) -> None:
        """Drop the rows in all other places, and move these together."""
        count = len(places)
        kept = torch.tensor(places, dtype=torch.int64, device=self.device)
        for x in self.all_places:
            x[:count] = x[kept]
        self.all_places.rows[count:] = len(self.ids) - 1
        self.all_places.is_running[count:] = False

    def report(self, on_finished: OnFinished) -> None:
        """Hand out the rows that have ended since the last report."""
        has_ended = self.lengths[: self.num_rows] > 0
        rows = (has_ended & ~self.is_reported).nonzero().flatten()
        if not len(rows):
            return
        self.is_reported[rows] = True
        self.num_reported += len(rows)
        lengths = self.lengths[rows].tolist()
        token_lists = self.ids[rows, : max(lengths)].tolist()
        on_finished(rows.tolist(), [ids[:n] for ids, n in zip(token_lists, lengths, strict=True)])

    def completions(self) -> Completions:
        """All rows, which have ended."""
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
