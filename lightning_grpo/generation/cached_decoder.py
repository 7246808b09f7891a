"""Any architecture through its own forward and a transformers cache.

Prompts are padded on the left, and the caches of all rows end in the same column: rows that start
later are moved to the right by as much as their prompt is shorter than what the others hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_grpo.generation.decoder import Lengths
from lightning_grpo.generation.steps import Steps


class _Held(NamedTuple):
    """Keys and values of some rows, the last column of each its last token."""

    layers: list[tuple[Tensor, Tensor]]
    """(rows, heads, columns, d) keys and values; a sliding layer has its last columns only."""
    num_padding: list[int]
    """Columns of padding before each row."""
    width: int
    """Columns, those included that a sliding layer has dropped."""

    def select(self, rows: Sequence[int]) -> _Held:
        """Some rows of it, in the order given."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.layers[0][0].device)
        layers = [(keys[chosen], values[chosen]) for keys, values in self.layers]
        return _Held(layers, [self.num_padding[row] for row in rows], self.width)


class CachedDecoder:
    """Decodes with the model's own forward.

    Args:
        model: in eval mode; its weights must not change while the decoder is used.
        lengths: of the rollout.

    Raises:
        NotImplementedError: the model keeps more than keys and values of attention.
    """

    def __init__(self, model: PreTrainedModel, lengths: Lengths) -> None:
        self.model: Any = model
        self.steps = Steps()
        self.lengths = lengths
        self.device = model.device
        self.accepts = frozenset(inspect.signature(model.forward).parameters)
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise NotImplementedError(f"its cache has layers of the kinds {names}")
        self.windows = [
            layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            for layer in DynamicCache(config=model.config).layers
        ]
        self.prompts: dict[int, tuple[_Held, Tensor]] = {}  # number: keys and values, (V,) logits
        self.row_prompts: list[int] = []
        self.cache: Any = None  # of the rows
        self.num_padding: list[int] = []
        self.width = 0
        self.mask = _mask([], 0, self.device)  # (R, columns and room for more)
        self.positions = torch.zeros(0, dtype=torch.int64, device=self.device)

    def prefill(self, numbers: Sequence[int], prompts: Sequence[list[int]]) -> None:
        """See `Decoder.prefill`."""
        width = max(len(prompt) for prompt in prompts)
        num_padding = [width - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = _mask(num_padding, width, self.device)
        cache: Any = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(ids.to(self.device), mask, positions, cache)
        for index, number in enumerate(numbers):
            layers = [
                (x.keys[index : index + 1], x.values[index : index + 1]) for x in cache.layers
            ]
            held = self._without_padding(_Held(layers, num_padding[index : index + 1], width))
            # Of its own memory, so that a prompt can be dropped by itself.
            layers = [(keys.clone(), values.clone()) for keys, values in held.layers]
            self.prompts[number] = (held._replace(layers=layers), logits[index])

    def start(self, numbers: Sequence[int]) -> Tensor:
        """See `Decoder.start`."""
        used = list(dict.fromkeys(numbers))
        parts = [self.prompts[number][0] for number in used]
        rows = [used.index(number) for number in numbers]
        if self.row_prompts:
            parts = [self._rows(), *parts]
            num_before = len(self.row_prompts)
            rows = [*range(num_before), *(num_before + row for row in rows)]
        self._hold(self._joined(parts).select(rows))
        self.row_prompts += numbers
        return torch.stack([self.prompts[number][1] for number in numbers])

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        self.width += 1
        if self.mask.shape[1] < self.width:
            self.mask = F.pad(self.mask, (0, self.lengths.completion), value=1)
        mask = self.mask[:, : self.width]
        # Rows that have ended may run on for a while, past the positions that a model knows.
        last = self.lengths.prompt + self.lengths.completion - 1
        positions = self.positions.clamp(max=last).unsqueeze(1)
        logits = self._forward(tokens.unsqueeze(1), mask, positions, self.cache)
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: Sequence[int], prompts: Collection[int]) -> None:
        """See `Decoder.keep`."""
        held = self._rows().select(rows)
        self._hold(self._without_padding(held) if rows else held)
        self.row_prompts = [self.row_prompts[row] for row in rows]
        needed = {*prompts}
        self.prompts = {k: v for k, v in self.prompts.items() if k in needed}

    def num_kv_bytes(self) -> int:
        """See `Decoder.num_kv_bytes`."""
        layers = [pair for held, _ in self.prompts.values() for pair in held.layers]
        total = sum(x.numel() * x.element_size() for pair in layers for x in pair)
        for layer in self.cache.layers if self.cache is not None else ():
            room = layer.room if isinstance(layer, _RoomyLayer) else (layer.keys, layer.values)
            total += sum(x.numel() * x.element_size() for x in room)
        return total

    def close(self) -> None:
        """See `Decoder.close`."""
        self.prompts, self.cache = {}, None

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits (rows, V) of the last column."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in self.accepts:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self.accepts:
            inputs["logits_to_keep"] = 1
        logits: Tensor = self.model(**inputs).logits
        return logits[:, -1, : self.lengths.num_tokens].float()

    def _rows(self) -> _Held:
        layers = [(layer.keys, layer.values) for layer in self.cache.layers]
        return _Held(layers, self.num_padding, self.width)

    def _hold(self, held: _Held) -> None:
        """Make the cache of the rows."""
        self.num_padding, self.width = held.num_padding, held.width
        lengths = [held.width - count for count in held.num_padding]
        self.positions = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self.mask = _mask(held.num_padding, held.width, self.device)
        layers: list[Any] = []
        for (keys, values), window in zip(held.layers, self.windows, strict=True):
            if window is None:
                layers.append(_RoomyLayer(keys, values, self.lengths.completion))
                continue
            layer = DynamicSlidingWindowLayer(window)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, held.width
            layers.append(layer)
        self.cache = DynamicCache(config=self.model.config)
        self.cache.layers = layers

    def _joined(self, parts: list[_Held]) -> _Held:
        width = max(part.width for part in parts)
        parts = [self._widened(part, width) for part in parts]
        layers = [
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
            for layer in zip(*(part.layers for part in parts), strict=True)
        ]
        return _Held(layers, [count for part in parts for count in part.num_padding], width)

    def _without_padding(self, held: _Held) -> _Held:
        """Leave out the columns that are padding in every row."""
        fewest = min(held.num_padding)
        return self._widened(held, held.width - fewest)

    def _widened(self, held: _Held, width: int) -> _Held:
        """Add columns of padding on the left, or take some off."""
        layers = []
        for (keys, values), window in zip(held.layers, self.windows, strict=True):
            columns = width if window is None else min(width, window - 1)
            layers.append((_last_columns(keys, columns), _last_columns(values, columns)))
        num_padding = [count + width - held.width for count in held.num_padding]
        return _Held(layers, num_padding, width)


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for more columns, so that a token does not copy those before it.

    Args:
        keys: (rows, heads, columns, d) so far.
        values: the same.
        num_more: columns to make room for at a time.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_more: int) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.num_more = num_more
        self.lazy_initialization(keys, values)
        self._make_room(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns, and return all of them."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self.room[0].shape[2]:
            self._make_room(self.keys, self.values)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def _make_room(self, keys: Tensor, values: Tensor) -> None:
        width = keys.shape[2]
        self.room = [F.pad(x, (0, 0, 0, self.num_more)) for x in (keys, values)]
        self.keys, self.values = (room[:, :, :width] for room in self.room)


def _mask(num_padding: list[int], width: int, device: torch.device) -> Tensor:
    """(rows, width) int64, 0 at the padding on the left."""
    counts = torch.tensor(num_padding, dtype=torch.int64, device=device).unsqueeze(1)
    return (torch.arange(width, device=device) >= counts).long()


def _last_columns(x: Tensor, columns: int) -> Tensor:
    """The last columns of (rows, heads, columns, d), zeros before them where there are fewer."""
    missing = columns - x.shape[2]
    return F.pad(x, (0, 0, missing, 0)) if missing > 0 else x[:, :, -missing:]
