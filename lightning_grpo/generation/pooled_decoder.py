"""Llama-shaped models decoded in steps that can be captured: what a GPU runs.

All keys and values of a layer lie in one pool of cells. A prompt takes some cells in a row, which
every row that starts from it reads, and each row takes some for its own tokens. To drop rows, or
to start others, moves no keys and no values: only the numbers that say where they lie.

Weights, pool and numbers keep their places from one rollout to the next. Copied are the weights
that are joined (query, key and value; gate and up) and, under autocast, all matrices in its type:
2 bytes for each parameter, refreshed once for each rollout.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_grpo.generation.decoder import Lengths
from lightning_grpo.generation.fused_model import FusedModel, rope_tables
from lightning_grpo.generation.fused_weights import HeldWeights
from lightning_grpo.generation.steps import Capture, Steps
from lightning_grpo.kernels.pooled_attention import Attend, Places, Widths, pooled_attention

# Prompts get this many cells or a multiple, so that a somewhat longer one moves nothing.
_PROMPT_CELLS = 64
# Where the pool has to grow, it grows by this share more.
_SPARE = 1 / 8


class _Prompt(NamedTuple):
    start: int
    length: int
    logits: Tensor


class PooledDecoder:
    """Decodes a Llama, Mistral, Qwen2 or Qwen3 without a sliding window, one rollout after another.

    Args:
        capture: makes the replays of steps; None runs them operation by operation.
        attend: the attention of a step.
        max_kept_bytes: a pool that is larger is given back after each rollout, and steps are
            captured again in the next: the update needs the memory more.
    """

    def __init__(
        self,
        capture: Capture | None = None,
        attend: Attend = pooled_attention,
        max_kept_bytes: float = float("inf"),
    ) -> None:
        self.steps = Steps(capture)
        self.attend = attend
        self.max_kept_bytes = max_kept_bytes
        self.held = HeldWeights()
        self.kv: list[Tensor] = []  # of each layer (2, cells, Hkv, d)
        # prompt_start, prompt_length, start, length, and the most that length can be; all 0 where
        # there is no row, whose keys and values then lie in cell 0.
        self.rows = torch.zeros(5, 0, dtype=torch.int64)
        self.num_positions = 0
        self.widths = Widths(0, 0)
        self.addresses: tuple[dict[str, int], int] = {}, 0  # of what the last rollout read

    def begin(self, model: PreTrainedModel, lengths: Lengths) -> PooledDecoder:
        """Take the weights as they are now, and hold no prompt and no row.

        Args:
            model: in eval mode; its weights must not change while the decoder is used.
            lengths: of the rollout.

        Raises:
            NotImplementedError: another architecture, or an option of one that is not covered.
        """
        self.model = FusedModel(model, lengths.num_tokens, self.held)
        self.dtype, self.device = self.model.dtype, self.model.device
        prompt_width = -(-lengths.prompt // _PROMPT_CELLS) * _PROMPT_CELLS
        # The last token of a completion is drawn and never run.
        row_width = max(lengths.completion - 1, 1)
        self.widths = Widths(max(prompt_width, self.widths.prompt), row_width)
        self.num_positions = max(self.widths.prompt + row_width, self.num_positions)
        tables = rope_tables(model, self.num_positions)
        self.cos, self.sin = self.held.join("rope", tables, tables[0].dtype).chunk(2)
        self.rows = self.rows.to(self.device).zero_()

        self.prompts: dict[int, _Prompt] = {}
        self.row_prompts: list[int] = []
        self.row_starts: list[int] = []
        self.free_prompts: list[int] = []
        self.free_rows: list[int] = []
        self.num_cells = 1
        if self.kv and (self.kv[0].dtype, self.kv[0].device) != (self.dtype, self.device):
            self.kv = []
        addresses = self.held.addresses(), self.widths.prompt
        if addresses != self.addresses:
            self.steps.forget()
        self.addresses = addresses
        return self

    def prefill(self, numbers: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """See `Decoder.prefill`."""
        starts = [self._take(self.free_prompts, self.widths.prompt) for _ in prompts]
        self._make_room()
        width = max(len(prompt) for prompt in prompts)
        lengths = [len(prompt) for prompt in prompts]
        tokens = self._indices([i * width + j for i, n in enumerate(lengths) for j in range(n)])
        cells = self._indices([s + j for s, n in zip(starts, lengths) for j in range(n)])

        def keep(index: int, k: Tensor, v: Tensor) -> None:
            added = torch.stack([k, v]).flatten(1, 2)[:, tokens]
            self.kv[index][:, cells] = added.to(self.dtype)

        logits = self.model.run_prompts(prompts, self.cos, self.sin, keep)
        for number, *prompt in zip(numbers, starts, lengths, logits, strict=True):
            self.prompts[number] = _Prompt(*prompt)

    def start(self, numbers: Sequence[int]) -> Tensor:
        """See `Decoder.start`."""
        starts = [self._take(self.free_rows, self.widths.completion) for _ in numbers]
        self._make_room()
        prompts = [self.prompts[number] for number in numbers]
        num_before = len(self.row_prompts)
        self.row_prompts += numbers
        self.row_starts += starts
        missing = self.steps.num_places(len(self.row_prompts)) - self.rows.shape[1]
        if missing > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(5, missing)], dim=1)
            self.steps.forget()
        most = self.widths.completion - 1
        added = [[p.start, p.length, start, 0, most] for p, start in zip(prompts, starts)]
        self.rows[:, num_before : len(self.row_prompts)] = self._indices(added).T
        return torch.stack([prompt.logits for prompt in prompts])

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`; what is run past the rows is of no use to anyone."""
        model = self.model
        prompt_start, prompt_length, start, length, most = self.rows[:, : len(tokens)].unbind()
        places = Places(prompt_start, prompt_length, start, length + 1)
        cells, positions = start + length, prompt_length + length
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x = model.embed(tokens)  # (R, hidden)
        for layer, kv in zip(model.layers, self.kv, strict=True):
            q, k, v = model.qkv(layer, x, cos, sin)  # (R, heads, d)
            kv[0].index_copy_(0, cells, k.to(kv.dtype))
            kv[1].index_copy_(0, cells, v.to(kv.dtype))
            attended = self.attend(q, kv, places, self.widths, layer.scaling)
            x = layer.mlp(x + layer.attention_out(attended.flatten(1)))
        # Rows that have ended may run on for a while, in their last cell.
        length.copy_(torch.minimum(length + 1, most))
        return model.head(model.final_norm(x)).float()

    def keep(self, rows: Sequence[int], prompts: Collection[int]) -> None:
        """See `Decoder.keep`."""
        is_kept = set(rows)
        self.free_rows += [s for row, s in enumerate(self.row_starts) if row not in is_kept]
        self.row_starts = [self.row_starts[row] for row in rows]
        self.row_prompts = [self.row_prompts[row] for row in rows]
        for number in self.prompts.keys() - {*self.row_prompts, *prompts}:
            self.free_prompts.append(self.prompts.pop(number).start)
        self.rows[:, : len(rows)] = self.rows[:, self._indices(rows)]
        self.rows[:, len(rows) :] = 0

    def num_kv_bytes(self) -> int:
        """See `Decoder.num_kv_bytes`; the whole pool."""
        return sum(kv.numel() * kv.element_size() for kv in self.kv)

    def close(self) -> None:
        """See `Decoder.close`."""
        self.prompts.clear()
        if self.num_kv_bytes() > self.max_kept_bytes:
            self.kv = []
            self.steps.forget()

    def _take(self, free: list[int], width: int) -> int:
        """The first of `width` cells, of those that are free or else past those in use."""
        if free:
            return free.pop()
        start = self.num_cells
        self.num_cells += width
        return start

    def _make_room(self) -> None:
        """Enlarge the pool if it has fewer cells than are taken."""
        shape = (2, 0, self.model.num_kv_heads, self.model.head_dim)
        none = torch.zeros(shape, dtype=self.dtype, device=self.device)
        held = self.kv or [none] * len(self.model.layers)
        if held[0].shape[1] >= self.num_cells:
            return
        missing = self.num_cells + int(self.num_cells * _SPARE) - held[0].shape[1]
        # Zeros, since what is hidden must be finite all the same.
        self.kv = [F.pad(old, (0, 0, 0, 0, 0, missing)) for old in held]
        self.steps.forget()

    def _indices(self, values: Sequence[int] | Sequence[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
