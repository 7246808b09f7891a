"""Models whose names on the disk are not the module's, such as one tensor for each expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.importing.lazy import LazyTensor, Weights


def loads_as_it_is(folder: Path) -> bool:
    """Let transformers match names and shapes, with tensors that take no memory.

    Args:
        folder: of transformers.

    Returns:
        Whether nothing is missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"device_map": "meta", "output_loading_info": True}
    found: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), trust_remote_code=False, local_files_only=True, **options
    )
    info = found[1]
    return not any(info.get(name) for name in ("missing_keys", "unexpected_keys", "error_msgs"))


def as_on_disk(weights: Weights, model: Any) -> Weights:
    """Give tensors the names and shapes that transformers saves them with.

    Args:
        weights: under the names of the module.
        model: on the meta device.

    Returns:
        The same for most models; where a tensor of the module becomes several on the disk, each of
        them, cut out of it when it is read. A model in which several become one stays as it is,
        which transformers loads too.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
        return found

    empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in weights.items()}
    saved = convert(dict(empty))
    single = {name: convert({name: tensor}) for name, tensor in empty.items()}
    if sorted(saved) != sorted(name for found in single.values() for name in found):
        return weights

    @lru_cache(maxsize=1)  # the pieces of a tensor are read one after the other
    def pieces(name: str) -> dict[str, Tensor]:
        return convert({name: weights[name].read()})

    def reader(name: str, piece: str) -> Callable[[], Tensor]:
        return lambda: pieces(name)[piece]

    named: Weights = {}
    for name, found in single.items():
        if list(found) == [name]:
            named[name] = weights[name]
            continue
        for piece, tensor in found.items():
            named[piece] = LazyTensor(tensor.dtype, tuple(tensor.shape), reader(name, piece))
    return named
