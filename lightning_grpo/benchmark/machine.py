"""What this machine does at its best, and what it is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_grpo.benchmark.rooflines import Machine

_COPY_BYTES = 1 << 28
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 5


def measure_machine(device: torch.device) -> Machine:
    """Time a copy and a matrix product, in float32 on a CPU and in bfloat16 on a GPU.

    On a CPU a second is one of process CPU time, as for the steps: of one core, whatever the number
    of threads, and neighbours disturb it less.

    Args:
        device: where.

    Returns:
        The best of a few.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    size = _MATRIX_SIZE[device.type]
    left = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.empty_like(left)
    matmul = _best_seconds(lambda: torch.mm(left, left, out=product), device)
    return Machine(2 * _COPY_BYTES / copy, 2 * size**3 / matmul)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    is_cuda = device.type == "cuda"
    clock = time.perf_counter if is_cuda else time.process_time
    best = float("inf")
    for _ in range(_REPEATS + 1):
        if is_cuda:
            torch.cuda.synchronize(device)
        start = clock()
        work()
        if is_cuda:
            torch.cuda.synchronize(device)
        best = min(best, clock() - start)
    return best


def machine_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
