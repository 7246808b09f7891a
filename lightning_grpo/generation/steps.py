"""How the step of a decode loop runs: operation by operation, or captured once and replayed.

A captured step is a list of operations on fixed places in memory. It can be replayed for one
rollout after another as long as everything that differs between them lies in those places: the
tensors that `Steps` gives, the weights, and the keys and values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Runs one token of so many rows.
Step = Callable[[int], None]
# Turns a function into its replay, without running it.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

# Kinds of rollout whose captures are held: those of training and of validation, and two more.
_MAX_KINDS = 4


@dataclass
class _Kept:
    """What one kind of rollout has left behind."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    replays: dict[int, Callable[[], None]] = field(default_factory=dict)
    captured: list[Step] = field(default_factory=list)  # keeps alive what the replays read
    has_run: set[int] = field(default_factory=set)


class Steps:
    """Runs the step of a decode loop, and holds the tensors that it works on.

    Args:
        capture: makes the replays; None runs every step as it is.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = capture
        self.num_captures = 0
        self._kinds: dict[str, _Kept] = {}
        self._kept = _Kept()

    def begin(self, kind: str) -> None:
        """Start a rollout.

        Args:
            kind: everything that the step takes from elsewhere than its tensors. Rollouts of one
                kind share captures.
        """
        self._kept = self._kinds.pop(kind, _Kept())
        if self.capture is not None:
            self._kinds[kind] = self._kept
            if len(self._kinds) > _MAX_KINDS:
                del self._kinds[next(iter(self._kinds))]

    def forget(self) -> None:
        """Drop all captures: something that they read has moved."""
        for kept in self._kinds.values():
            kept.replays.clear()
            kept.captured.clear()

    def full(
        self,
        name: str,
        shape: tuple[int, ...],
        value: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """A tensor of one value, in the place that it had in the last rollout of this kind.

        Args:
            name: of the tensor.
            shape: the same in every rollout of the kind.
            value: fills it.
            dtype: of the tensor.
            device: of the tensor.
        """
        held = self._kept.tensors.get(name)
        if held is None:
            held = torch.full(shape, value, dtype=dtype, device=device)
            self._kept.tensors[name] = held
            return held
        return held.fill_(value)

    def held(self, name: str, values: Tensor) -> Tensor:
        """Values in the place that those of this name had in the last rollout of this kind.

        Args:
            name: of the tensor.
            values: of the same shape in every rollout of the kind.
        """
        shape = tuple(values.shape)
        return self.full(name, shape, 0, values.dtype, values.device).copy_(values)

    def num_places(self, num_rows: int) -> int:
        """Rows that a step of so many is run with.

        Captured are steps of 1, 2, 3, 4, 6, 8, 12, ... rows, so that there are few of them.
        """
        if self.capture is None or num_rows == 0:
            return num_rows
        power = 1 << (num_rows - 1).bit_length()
        return power * 3 // 4 if num_rows <= power * 3 // 4 else power

    def run(self, step: Step, num_rows: int) -> None:
        """Run a step of the first `num_rows` rows, and of some that do not count.

        Args:
            step: works on the tensors alone.
            num_rows: rows that count.
        """
        kept, size = self._kept, self.num_places(num_rows)
        if self.capture is not None and size in kept.has_run and size not in kept.replays:
            self._capture(step, size)
        if size in kept.replays:
            kept.replays[size]()
        else:
            # The first time as it is: kernels are compiled and libraries make their buffers, which
            # cannot be captured.
            step(size)
            kept.has_run.add(size)

    def _capture(self, step: Step, size: int) -> None:
        assert self.capture is not None
        try:
            self._kept.replays[size] = self.capture(lambda: step(size))
        except RuntimeError as error:
            warnings.warn(
                f"rollout.engine native runs its steps one operation at a time, which is slower: "
                f"they cannot be captured ({error})",
                stacklevel=2,
            )
            self.capture = None
            return
        self._kept.captured.append(step)
        self.num_captures += 1


class CudaCapture:
    """Captures functions as CUDA graphs, which share the memory of what they compute in between."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Make the replay of a function; its results have to lie outside of it."""
        graph = torch.cuda.CUDAGraph()
        # A cast that autocast remembers from outside would be gone at the replay.
        remembers = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        try:
            # Other threads, such as those that score rewards, may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                function()
        finally:
            torch.set_autocast_cache_enabled(remembers)
        return graph.replay


class LateReader:
    """Reads numbers from a GPU one call late, so that the host never waits for its last step.

    Args:
        device: of the numbers; on a CPU they are read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_late = device.type == "cuda"
        self.waiting: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, number: Tensor) -> int | None:
        """The number given at the last call, None at the first one."""
        if not self.is_late:
            return int(number)
        before = self.waiting
        pinned = torch.empty((), dtype=number.dtype, pin_memory=True)
        pinned.copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting = (pinned, event)
        if before is None:
            return None
        before[1].synchronize()
        return int(before[0])

    def forget(self) -> None:
        """Answer None at the next call: the number waited for is out of date."""
        self.waiting = None
