"""The states of the random generators of this process: Python, numpy, torch on CPU and GPU.

None of our own draws uses them; dropout, reward functions and callbacks may.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Generators(NamedTuple):
    """States as the libraries give them, which is quick."""

    python: tuple[Any, ...]
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None


def generators_now(device: torch.device) -> Generators:
    """The states of all generators.

    Args:
        device: of this rank; those of other GPUs are left out.
    """
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return Generators(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def encoded(generators: Generators) -> dict[str, Any]:
    """The states as tensors and plain values."""
    version, numbers, gauss = generators.python
    name, keys, position, has_gauss, cached = generators.numpy
    return {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.tensor(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "cpu": generators.cpu,
        "cuda": generators.cuda,
    }


def put_back(state: dict[str, Any], device: torch.device) -> None:
    """Give all generators the states that `encoded` describes.

    Args:
        state: on any device.
        device: of this rank; the state of a GPU is left alone where there is none, or was none.
    """
    python, legacy = state["python"], state["numpy"]
    numbers = tuple(python["numbers"].tolist())
    random.setstate((python["version"], numbers, python["gauss"]))
    keys = np.array(legacy["keys"].tolist(), dtype=np.uint32)
    np.random.set_state(
        (legacy["name"], keys, legacy["position"], legacy["has_gauss"], legacy["cached"])
    )
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
