"""Llama-shaped models decoded with fused operations, one after the other on any device.

The keys and values of a prompt are held and read once for all rows that started from it: the
softmax runs over the scores of the prompt and of the row's own tokens together, so that it is
exact.

The weights are taken from the model whenever a decoder is made, which is once for each rollout:
they cannot be those of an earlier policy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_grpo.generation.decoder import Lengths
from lightning_grpo.generation.fused_model import FusedModel, rope_tables
from lightning_grpo.generation.fused_weights import HeldWeights
from lightning_grpo.generation.steps import Steps


class FusedDecoder:
    """Decodes with a Llama, Mistral, Qwen2 or Qwen3 without a sliding window.

    The keys and values of completions lie in a ring of C columns that all rows share: a row that
    started later uses other columns, and a bias hides those that it has not written.

    Args:
        model: in eval mode; its weights must not change while the decoder is used.
        lengths: of the rollout.

    Raises:
        NotImplementedError: another architecture, or an option of one that is not covered.
    """

    def __init__(self, model: PreTrainedModel, lengths: Lengths) -> None:
        self.model = FusedModel(model, lengths.num_tokens, HeldWeights())
        self.steps = Steps()
        self.device, self.dtype = self.model.device, self.model.dtype
        self.num_kv_heads, self.head_dim = self.model.num_kv_heads, self.model.head_dim
        self.lengths = lengths
        self.cos, self.sin = rope_tables(model, lengths.prompt + lengths.completion)

        # The number of each prompt held, and its tokens: the device is not asked for them.
        self.prompts: dict[int, int] = {}
        self.prompt_lengths = torch.zeros(0, dtype=torch.int64, device=self.device)
        # Explicit: the default may be that of a half precision run.
        self.prompt_logits = torch.zeros(
            0, lengths.num_tokens, dtype=torch.float32, device=self.device
        )
        self.prompt_kv = [self._no_kv(0, 0) for _ in self.model.layers]
        self.row_prompts: list[int] = []  # the number of each row's prompt
        self.kv = [self._no_kv(0, lengths.completion) for _ in self.model.layers]
        self.positions = self.prompt_lengths  # (R,) of the next token
        self.column = 0  # steps since there was no row, so where the next token is written
        self._arrange(None)

    def prefill(self, numbers: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """See `Decoder.prefill`."""

        def keep(index: int, k: Tensor, v: Tensor) -> None:
            added = torch.stack([k, v]).permute(0, 3, 1, 2, 4).to(self.dtype)  # (2, Hkv, n, P, d)
            self.prompt_kv[index] = _join_columns(self.prompt_kv[index], added)

        logits = self.model.run_prompts(prompts, self.cos, self.sin, keep)
        lengths = [len(prompt) for prompt in prompts]
        self.prompts.update(zip(numbers, lengths, strict=True))
        added = torch.tensor(lengths, device=self.device)
        self.prompt_lengths = torch.cat([self.prompt_lengths, added])
        self.prompt_logits = torch.cat([self.prompt_logits, logits])

    def start(self, numbers: Sequence[int]) -> Tensor:
        """See `Decoder.start`."""
        num_before, num_rows = len(self.row_prompts), len(self.row_prompts) + len(numbers)
        bias = self.bias
        if num_before == 0:
            self.column = 0
            bias = None
        elif bias is None:
            bias = self._hidden(num_before).zero_()  # columns to come are not read before a write
        if bias is not None:
            bias = torch.cat([bias, self._hidden(len(numbers))])
        for index, old in enumerate(self.kv):
            self.kv[index] = self._no_kv(num_rows, self.lengths.completion)
            self.kv[index][:, :, :num_before] = old
        where = {number: index for index, number in enumerate(self.prompts)}
        chosen = torch.tensor([where[number] for number in numbers], device=self.device)
        self.positions = torch.cat([self.positions, self.prompt_lengths[chosen]])
        self.row_prompts += numbers
        self._arrange(bias)
        return self.prompt_logits[chosen]

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        num_columns = self.lengths.completion
        column, width = self.column % num_columns, min(self.column + 1, num_columns)
        if self.bias is not None:
            self.bias[:, column] = 0.0
        # Rows that have ended may run on for a while.
        positions = self.positions.clamp(max=len(self.cos) - 1)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x = self.model.embed(tokens)  # (R, hidden)
        for layer, kv, prompt_kv in zip(self.model.layers, self.kv, self.prompt_kv, strict=True):
            q, k, v = self.model.qkv(layer, x, cos, sin)  # (R, heads, d)
            kv[0, :, :, column] = k.transpose(0, 1)
            kv[1, :, :, column] = v.transpose(0, 1)
            # (Hkv, R, heads of a group, d): the rows of a prompt and their heads lie together.
            q = (q * layer.scaling).unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1)
            attended = self._attend(q.contiguous(), kv[..., :width, :], prompt_kv)
            x = layer.mlp(x + layer.attention_out(attended.transpose(0, 1).flatten(1)))
        self.positions = self.positions + 1
        self.column += 1
        return self.model.head(self.model.final_norm(x)).float()

    def keep(self, rows: Sequence[int], prompts: Collection[int]) -> None:
        """See `Decoder.keep`."""
        kept = torch.tensor(rows, dtype=torch.int64, device=self.device)
        width = min(self.column, self.lengths.completion)
        for index, old in enumerate(self.kv):
            self.kv[index] = self._no_kv(len(rows), self.lengths.completion)
            self.kv[index][..., :width, :] = old[..., :width, :].index_select(2, kept)
        self.positions = self.positions[kept]
        self.row_prompts = [self.row_prompts[row] for row in rows]
        self._keep_prompts({*self.row_prompts, *prompts})
        self._arrange(None if self.bias is None else self.bias[kept])

    def num_kv_bytes(self) -> int:
        """See `Decoder.num_kv_bytes`."""
        return sum(kv.numel() * kv.element_size() for kv in (*self.kv, *self.prompt_kv))

    def close(self) -> None:
        """See `Decoder.close`."""
        self.prompt_kv, self.kv = [], []

    def _keep_prompts(self, numbers: set[int]) -> None:
        if numbers == set(self.prompts):
            return
        indices = [i for i, number in enumerate(self.prompts) if number in numbers]
        kept = torch.tensor(indices, dtype=torch.int64, device=self.device)
        self.prompts = {k: length for k, length in self.prompts.items() if k in numbers}
        self.prompt_lengths = self.prompt_lengths[kept]
        self.prompt_logits = self.prompt_logits[kept]
        width = max(self.prompts.values(), default=0)
        self.prompt_kv = [kv[..., :width, :].index_select(2, kept) for kv in self.prompt_kv]

    def _arrange(self, bias: Tensor | None) -> None:
        """Note what hides columns, and how rows lie in the rectangle (prompts, most rows of one).

        Args:
            bias: (R, C), 0 where a row has written, -inf elsewhere; None when all have written
                the columns so far.
        """
        self.bias = bias
        width = self.prompt_kv[0].shape[3]
        columns = torch.arange(width, device=self.device)
        is_padding = columns >= self.prompt_lengths.unsqueeze(1)
        is_ragged = any(length < width for length in self.prompts.values())
        hidden = torch.zeros(is_padding.shape, dtype=torch.float32, device=self.device)
        hidden = hidden.masked_fill(is_padding, -torch.inf)
        self.prompt_bias = hidden[:, None] if is_ragged else None  # (prompts, 1, P)
        where = {number: index for index, number in enumerate(self.prompts)}
        counts = [0] * len(self.prompts)
        cells = []
        for number in self.row_prompts:
            cells.append((where[number], counts[where[number]]))
            counts[where[number]] += 1
        height = max(counts, default=0)
        slots = [prompt * height + place for prompt, place in cells]
        self.row_of_slot: Tensor | None = None
        if slots == list(range(len(counts) * height)):
            return  # the rectangle is full and in order
        self.slot_of_row = torch.tensor(slots, dtype=torch.int64, device=self.device)
        self.row_of_slot = torch.zeros(len(counts) * height, dtype=torch.int64, device=self.device)
        self.row_of_slot[self.slot_of_row] = torch.arange(len(slots), device=self.device)

    def _attend(self, q: Tensor, kv: Tensor, prompt_kv: Tensor) -> Tensor:
        """Attention of one token of each row to its prompt and to its completion.

        Args:
            q: (Hkv, R, H / Hkv, d), scaled.
            kv: (2, Hkv, R, columns, d) of the completions.
            prompt_kv: (2, Hkv, prompts, P, d).

        Returns:
            (Hkv, R, H / Hkv, d).
        """
        num_kv_heads, _, num_queries, _ = q.shape
        _, _, num_prompts, width, _ = prompt_kv.shape
        slots = q if self.row_of_slot is None else q.index_select(1, self.row_of_slot)
        by_prompt = slots.view(num_kv_heads, num_prompts, -1, q.shape[-1])
        scores = by_prompt @ prompt_kv[0].transpose(-1, -2)
        if self.prompt_bias is not None:
            scores = scores + self.prompt_bias
        scores = scores.view(num_kv_heads, -1, num_queries, width)
        if self.row_of_slot is not None:
            scores = scores.index_select(1, self.slot_of_row)
        own_scores = q @ kv[0].transpose(-1, -2)
        if self.bias is not None:
            own_scores = own_scores + self.bias[:, None, : kv.shape[3]]
        weights = torch.cat([scores, own_scores.to(scores.dtype)], dim=-1)
        weights = weights.softmax(-1, dtype=torch.promote_types(kv.dtype, torch.float32)).to(
            kv.dtype
        )
        shared = weights[..., :width]
        if self.row_of_slot is not None:
            shared = shared.index_select(1, self.row_of_slot)
        shared = shared.reshape(num_kv_heads, num_prompts, -1, width) @ prompt_kv[1]
        shared = shared.view(num_kv_heads, -1, num_queries, q.shape[-1])
        if self.row_of_slot is not None:
            shared = shared.index_select(1, self.slot_of_row)
        return shared + weights[..., width:] @ kv[1]

    def _no_kv(self, num_rows: int, width: int) -> Tensor:
        """Zeros (2, Hkv, rows, width, d): a column that is hidden must be finite all the same."""
        shape = (2, self.num_kv_heads, num_rows, width, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _hidden(self, num_rows: int) -> Tensor:
        shape = (num_rows, self.lengths.completion)
        return torch.full(shape, -torch.inf, dtype=torch.float32, device=self.device)


def _join_columns(old: Tensor, new: Tensor) -> Tensor:
    """Put (2, Hkv, n, P, d) of more prompts after those held, padded on the right to one width."""
    width = max(old.shape[3], new.shape[3])
    return torch.cat([F.pad(kv, (0, 0, 0, width - kv.shape[3])) for kv in (old, new)], dim=2)
