"""Frozen copies of the policy's weights: the reference, and the old policy as weights."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_grpo.policy import Policy, gather_no_more


def local_weights(policy: Policy) -> dict[str, Tensor]:
    """Name -> the part of each trainable parameter that lives on this rank, sharing its memory."""
    gather_no_more(policy)
    weights = {}
    for name, parameter in policy.trainable().items():
        data = parameter.data
        weights[name] = data.to_local() if isinstance(data, DTensor) else data
    return weights


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let a Ctrl-C wait until the block is done, so that it leaves no half-written weights."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received and callable(handler):
        handler(*received[0])


class WeightSnapshot:
    """A frozen copy of a policy's trainable weights that can stand in for them for a while.

    Each rank copies the part it holds, so that taking, using and restoring a snapshot needs no
    communication; under LoRA it holds the adapter only.

    Args:
        policy: whose weights are copied now.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.copies = {name: w.detach().clone() for name, w in local_weights(policy).items()}
        self._exchanged: set[str] = set()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the policy's weights again."""
        for name, weight in local_weights(self.policy).items():
            self._copy_of(name, weight).copy_(weight)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copied weights back into the policy."""
        with interrupts_deferred():
            for name, weight in local_weights(self.policy).items():
                weight.copy_(self._copy_of(name, weight))

    def whole(self, *, is_kept: bool = True) -> dict[str, Tensor]:
        """The copied weights on the CPU, gathered from all ranks. Collective.

        Args:
            is_kept: whether this rank wants them; it gets nothing otherwise.
        """
        parameters: dict[str, Any] = dict(self.policy.named_parameters())
        found = {}
        for name, copy in self.copies.items():
            parameter = parameters[name]
            if isinstance(parameter, DTensor):
                sharded = DTensor.from_local(
                    copy.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                copy = sharded.full_tensor()
            if is_kept:
                found[name] = copy.detach().cpu().clone()
        return found

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights, each rank its part. Collective.

        Args:
            weights: name -> whole tensor.
        """
        parameters: dict[str, Any] = dict(self.policy.named_parameters())
        for name, weight in local_weights(self.policy).items():
            full, parameter = weights[name], parameters[name]
            if isinstance(parameter, DTensor):
                full = full.to(parameter.device)
                part = distribute_tensor(full, parameter.device_mesh, parameter.placements)
                full = part.to_local()
            self._copy_of(name, weight).copy_(full)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The policy with the copied weights; its own come back at the end, whatever happens.

        Enter it outside of autocast, which keeps casts of the weights it has seen.
        """
        try:
            self._exchange(are_copies_in_place=True)
            yield
        finally:
            self._exchange(are_copies_in_place=False)

    @torch.no_grad()
    def _exchange(self, *, are_copies_in_place: bool) -> None:
        # One parameter at a time: no moment at which three copies of the model exist.
        with interrupts_deferred():
            for name, weight in local_weights(self.policy).items():
                if (name in self._exchanged) != are_copies_in_place:
                    copy = self._copy_of(name, weight)
                    held = weight.clone()
                    weight.copy_(copy)
                    copy.copy_(held)
                    self._exchanged ^= {name}

    def _copy_of(self, name: str, weight: Tensor) -> Tensor:
        # The trainer moves and casts the policy after the snapshot was taken.
        copy = self.copies[name]
        if copy.device != weight.device or copy.dtype != weight.dtype:
            copy = self.copies[name] = copy.to(device=weight.device, dtype=weight.dtype)
        return copy
