"""Measuring one step at a time: time by phase, tokens forwarded, and peak memory."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch


class StepClock:
    """Makes one step for each request it reads, and reports what the step took.

    A contestant calls `arrive` where a step begins. A step goes from there to the next call, so
    that nothing of the loop is left out.

    Args:
        requests: one word a line: step, profile (the phases are synchronised with the device), or
            anything else to stop.
        reports: gets one JSON object a line.
        device: where the model is.
    """

    def __init__(self, requests: TextIO, reports: TextIO, device: torch.device) -> None:
        self.requests = requests
        self.reports = reports
        self.device = device
        self.phase = "other"
        self.tokens: Counter[str] = Counter()
        """Forwarded in each phase of the running step."""
        self.lengths: list[int] = []
        """Of the completions of the running step, in tokens."""
        self._times: dict[str, list[float]] = {}
        self._start: tuple[float, float] | None = None
        self._mark = (0.0, 0.0)
        self._syncs_phases = False

    def arrive(self) -> None:
        """End the running step, report it, and wait for the request to make another.

        Raises:
            SystemExit: there is none.
        """
        self._sync()
        if self._start is not None:
            self.enter("other")
            now = self._mark
            self._report(
                cpu_s=now[0] - self._start[0],
                wall_s=now[1] - self._start[1],
                phases=self._times,
                tokens=self.tokens,
                lengths=self.lengths,
            )
        else:
            self._report()
        word = self.requests.readline().strip()
        if word not in ("step", "profile"):
            raise SystemExit(0)
        self._syncs_phases = word == "profile"
        self._times, self.lengths, self.phase = {}, [], "other"
        self.tokens.clear()
        self._start = self._mark = _times()

    def enter(self, phase: str) -> str:
        """Count the time from here on to a phase.

        Args:
            phase: its name.

        Returns:
            The phase until here.
        """
        if self._syncs_phases:
            self._sync()
        now, before = _times(), self.phase
        spent = self._times.setdefault(before, [0.0, 0.0])
        spent[0] += now[0] - self._mark[0]
        spent[1] += now[1] - self._mark[1]
        self._mark, self.phase = now, phase
        return before

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time counts to a phase.

        Args:
            phase: its name.
            function: any.

        Returns:
            A function that does the same.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return call

    def count_tokens(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Count the tokens that go through an embedding: a forward pre-hook of it."""
        self.tokens[self.phase] += inputs[0].numel()

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _report(self, **measured: Any) -> None:
        line = json.dumps(measured | {"memory": peak_memory(self.device)})
        self.reports.write(line + "\n")
        self.reports.flush()


def _times() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peaks of this process since its start.

    Args:
        device: where the model is.

    Returns:
        Bytes: host (VmHWM; 0 where the system does not say), and on CUDA allocated and reserved.
    """
    found = {"host": 0}
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                found["host"] = int(line.split()[1]) * 1024
    if device.type == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated(device)
        found["reserved"] = torch.cuda.max_memory_reserved(device)
    return found
