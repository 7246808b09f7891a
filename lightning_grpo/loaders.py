"""The loaders that Lightning iterates over, and the endless stream that training prompts come from.

They are sized, so that Lightning never fetches ahead, and show neither `dataset` nor `sampler`,
so that it never replaces one. What they yield is opaque: Lightning casts and copies tensors and
lists inside dicts and dataclasses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from lightning_grpo.prompts import PromptSet
from lightning_grpo.types import Minibatch, PromptBatch


class Slot:
    """One Lightning training batch, empty until the replay callback fills it."""

    def __init__(self) -> None:
        self.minibatch: Minibatch | None = None

    def to(self, *args: Any, **kwargs: Any) -> Slot:
        """Return the slot itself: its rows are on the device when they are put in."""
        return self


class EvalBatch:
    """One Lightning batch of validation, test or predict."""

    def __init__(self, prompts: PromptBatch) -> None:
        self.prompts = prompts

    def to(self, *args: Any, **kwargs: Any) -> EvalBatch:
        """Return the batch itself: it holds no tensors."""
        return self


class SlotLoader:
    """Empty slots for one pass over the training prompts."""

    def __init__(self, num_prompt_batches: int, slots_per_iteration: int) -> None:
        self._num_slots = num_prompt_batches * slots_per_iteration

    def __len__(self) -> int:
        return self._num_slots

    def __iter__(self) -> Iterator[Slot]:
        return (Slot() for _ in range(self._num_slots))

    # One slot is like another: where training stands is kept by Lightning's batch counter and by
    # the prompt stream. The pair of methods says so; without it Lightning warns on every resume.
    def state_dict(self) -> dict[str, Any]:
        """Return the length, which is all there is to know."""
        return {"num_slots": self._num_slots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing: a resumed epoch ends by Lightning's counter."""


class EvalLoader:
    """This rank's part of a data source, in as many batches as every other rank has.

    Row i goes to rank i modulo the number of ranks. A rank whose rows are used up yields empty
    batches, because metrics and sharded forwards are collective.

    Args:
        prompts: all prompts of the source.
        batch_size: prompts per batch and rank, >= 1.
        rank: this data-parallel rank, from 0.
        world_size: number of data-parallel ranks.
    """

    def __init__(self, prompts: PromptSet, batch_size: int, rank: int, world_size: int) -> None:
        self._prompts = prompts
        self._batch_size = batch_size
        self._indices = range(rank, len(prompts), world_size)
        largest_part = -(-len(prompts) // world_size)
        self._num_batches = -(-largest_part // batch_size)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[EvalBatch]:
        for number in range(self._num_batches):
            indices = self._indices[number * self._batch_size : (number + 1) * self._batch_size]
            # A group is named by its row, so that what is sampled does not depend on the ranks.
            group_ids = [self._prompts.row_indices[i] for i in indices]
            yield EvalBatch(self._prompts.select(indices, group_ids))


class PromptStream:
    """Endless global batches of row indices, in an order that its position alone decides.

    Each epoch is a permutation keyed by (seed, epoch), cut into whole batches.

    Args:
        num_rows: number of rows, >= `batch_size`.
        batch_size: rows per batch, over all ranks.
        shuffle: permute the rows; otherwise every epoch starts at the first row.
        seed: of the permutations only; sampling has its own.
    """

    def __init__(self, num_rows: int, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.index = 0
        self._order: list[int] = []
        self._order_key: tuple[int, int, bool] | None = None

    def next_batch(self) -> list[int]:
        """Return the rows of the next batch and move on."""
        if self.index + self.batch_size > self.num_rows:
            self.epoch += 1
            self.index = 0
        key = (self.epoch, self.num_rows, self.shuffle)
        if self._order_key != key:
            self._order, self._order_key = self._permutation(), key
        batch = self._order[self.index : self.index + self.batch_size]
        self.index += self.batch_size
        return batch

    def restrict(self, num_batches: int) -> None:
        """Repeat the first batches in order from now on, for `trainer.overfit_batches`."""
        self.num_rows = num_batches * self.batch_size
        self.shuffle = False

    def _permutation(self) -> list[int]:
        order = list(range(self.num_rows))
        if self.shuffle:
            random.Random(f"prompts/{self.seed}/{self.epoch}").shuffle(order)
        return order
