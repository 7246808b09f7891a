"""Signals that ask a run to stop: they wait for a moment at which it can be saved.

A SIGTERM sets a flag. Between two phases the ranks ask each other whether any has got one, and
stop together with `SIGTERMException`; while completions are generated, which changes nothing that
a checkpoint holds, the rank that got it stops at once, and the others when they are done. On one
process a Ctrl-C is Python's own KeyboardInterrupt; on several it is treated as a SIGTERM is, and
only a second one interrupts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor


class HasMax(Protocol):
    """Anything that takes the largest of a tensor over the ranks, such as the LightningModule."""

    def max_over_ranks(self, tensor: Tensor) -> Tensor:
        """The largest of a tensor's values over all ranks, each by itself."""
        ...


class LeftAtOnce(BaseException):
    """A block was left because of a signal, of which the other ranks have to hear."""


class StopRequest:
    """What signals have asked of this process."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that asks to stop; 0 while none does."""
        self.is_agreed = False
        """Whether all ranks have stopped for it."""
        self._can_stop_at_once = False

    def listen(self, trainer: L.Trainer) -> None:
        """Take the place of Lightning's handler of SIGTERM, before it is registered.

        Lightning's own talks to the other ranks from inside the handler, which may deadlock.

        Args:
            trainer: about to fit; it puts the handlers of before back at its end.
        """
        self.forget()

        def receive(number: int, frame: FrameType | None) -> None:
            launcher = trainer.strategy.launcher
            if launcher is not None and not self.signal:
                launcher.kill(number)  # its processes are other ranks of this run
            self.receive(number)

        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = receive

    def listen_for_interrupts(self) -> None:
        """Let a Ctrl-C wait too; for several ranks, which it reaches at different places."""
        signal.signal(signal.SIGINT, self._receive_interrupt)

    def _receive_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        text = "stopping when all processes can be saved; Ctrl-C again stops without that"
        os.write(2, f"{text}\n".encode())  # not print, which a handler may be called inside of
        self.receive(number)

    def receive(self, number: int) -> None:
        """Ask to stop.

        Args:
            number: of the signal.
        """
        self.signal = max(self.signal, number)  # SIGTERM counts more than SIGINT
        if self._can_stop_at_once:
            self._can_stop_at_once = False
            raise LeftAtOnce

    @contextlib.contextmanager
    def at_once(self, *, is_possible: bool = True) -> Iterator[None]:
        """A block that a signal may end between any two instructions; nothing it does is kept.

        Enter it inside of `failing_together`, which tells the other ranks.

        Args:
            is_possible: False where the block exchanges data between the ranks, as generation
                under FSDP2 does.
        """
        if self.signal and is_possible:
            raise LeftAtOnce
        self._can_stop_at_once = is_possible
        try:
            yield
        finally:
            self._can_stop_at_once = False

    def check(self, ranks: HasMax) -> None:
        """Stop here, on all ranks, when any was asked to. Collective.

        Args:
            ranks: of the run.

        Raises:
            SIGTERMException: after a SIGTERM.
            KeyboardInterrupt: after a Ctrl-C on one of several ranks.
        """
        self.stop_together(int(ranks.max_over_ranks(torch.tensor(float(self.signal)))))

    def stop_together(self, number: int) -> None:
        """Stop when a signal came to any rank.

        Args:
            number: the largest of the numbers of all ranks; 0 for none.

        Raises:
            SIGTERMException: after a SIGTERM.
            KeyboardInterrupt: after a Ctrl-C on one of several ranks.
        """
        if number:
            self.signal, self.is_agreed = number, True
            raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException

    def forget(self) -> None:
        """Begin anew: the run has been stopped."""
        self.signal, self.is_agreed = 0, False


STOP = StopRequest()
"""Of this process, since signals are."""
