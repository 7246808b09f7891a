"""The memory of a device: all that a process can use, and what a run may plan with."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Share of a device's memory that an estimate may fill. The rest is for what is not estimated; a
# CPU's memory is also that of everything else on the machine.
_PLANNED_SHARE = {"cuda": 0.8, "cpu": 0.5}


def device_limit(device: torch.device, num_sharing: int = 1) -> int:
    """Bytes that a process can use on a device.

    Args:
        device: a CUDA GPU, whose whole memory counts, or the CPU, whose memory is that of the
            machine or the limit of its control group, whichever is less.
        num_sharing: processes that share the memory of a CPU.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_cgroup_limits()]) // num_sharing


def memory_at_hand(device: torch.device, num_sharing: int = 1) -> int:
    """Bytes that a run may plan to use on a device, with some left for what no estimate counts.

    Args:
        device: a CUDA GPU, of which counts what is free, or the CPU, of which counts all: what
            other programs hold at the moment would make equal machines choose differently.
        num_sharing: processes that share the memory of a CPU.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return planned(free, is_cuda=True)
    return planned(device_limit(device, num_sharing), is_cuda=False)


def planned(num_bytes: int, *, is_cuda: bool) -> int:
    """The part of a device's memory that a run may plan to use.

    Args:
        num_bytes: of the device, or what is free of it.
        is_cuda: whether it is a GPU.

    Returns:
        Bytes.
    """
    return int(num_bytes * _PLANNED_SHARE["cuda" if is_cuda else "cpu"])


def _cgroup_limits() -> list[int]:
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        root = Path("/sys/fs/cgroup") / ("memory" if "memory" in controllers else "")
        name = "memory.limit_in_bytes" if "memory" in controllers else "memory.max"
        inner = root / group.lstrip("/")
        for folder in [inner, *inner.parents]:
            file = folder / name
            if folder.is_relative_to(root) and file.is_file():
                text = file.read_text(encoding="ascii").strip()
                limits += [int(text)] if text.isdigit() else []
    return limits
