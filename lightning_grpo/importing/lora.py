"""Low-rank adapters: what a configuration of peft says, and the weights with them merged in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.importing.lazy import LazyTensor, Weights
from lightning_grpo.importing.names import Pair, WantedModel


@dataclass(frozen=True)
class LoraSettings:
    """How strongly an adapter changes the weights; its ranks are the shapes of its tensors.

    Args:
        alpha: scale of the change before it is divided by the rank.
        divides_by_root: by the square root of the rank in place of the rank.
        alpha_pattern: other scales for modules whose names end so.
        target_modules: as the adapter was asked for, if that is known.
    """

    alpha: float
    divides_by_root: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def scale(self, name: str, rank: int) -> float:
        """Factor of B A.

        Args:
            name: of the weight that is changed.
            rank: of its adapter.

        Returns:
            alpha / rank, or alpha / sqrt(rank).
        """
        module = name.removesuffix(".weight")
        alpha = self.alpha
        for pattern, other in self.alpha_pattern.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = other
                break
        return alpha / (math.sqrt(rank) if self.divides_by_root else rank)


def lora_of_config(config: dict[str, Any]) -> LoraSettings:
    """Read a configuration of peft.

    Args:
        config: content of adapter_config.json.

    Returns:
        What merging needs of it.

    Raises:
        ValueError: it is of a kind that is not merged here.
    """
    kind = config.get("peft_type")
    others = [
        name
        for name in (
            *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices"),
            *("target_parameters", "alora_invocation_tokens", "arrow_config"),
        )
        if config.get(name)
    ]
    if config.get("bias", "none") != "none":
        others.append("bias")
    if kind != "LORA" or others:
        raise ValueError(
            f"an adapter of type {kind} with {others or 'no such options'} is not read: merge it "
            "with merge_and_unload of peft, and convert the merged folder"
        )
    return LoraSettings(
        alpha=float(config["lora_alpha"]),
        divides_by_root=bool(config.get("use_rslora")),
        alpha_pattern={str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
    )


def merge_lora(
    base: Weights,
    pairs: dict[str, Pair],
    settings: LoraSettings,
    wanted: WantedModel,
    dtype: torch.dtype | None = None,
) -> Weights:
    """Weights with adapters merged in, computed in float32.

    W' = W + scale * B A

    Source: LoRA (arXiv:2106.09685), eq. 3.

    Args:
        base: all weights of the model.
        pairs: name of a weight -> its adapter.
        settings: of the adapter.
        wanted: the model, which says which weights are stored transposed.
        dtype: of the changed weights; the base's when None.

    Returns:
        All weights.

    Raises:
        ValueError: an adapter does not fit its weight.
    """
    merged = dict(base)
    for name, pair in pairs.items():
        weight = base[name]
        rank = pair.a.shape[0]
        is_transposed = name in wanted.transposed
        shape = (pair.b.shape[0], pair.a.shape[1])
        if pair.b.shape[1] != rank or weight.shape != (shape[::-1] if is_transposed else shape):
            raise ValueError(f"the adapter of {name} does not fit a weight of {weight.shape}")
        scale = settings.scale(name, rank)
        merged[name] = _merged(weight, pair, scale, dtype or weight.dtype, is_transposed)
    return merged


def _merged(
    weight: LazyTensor, pair: Pair, scale: float, dtype: torch.dtype, is_transposed: bool
) -> LazyTensor:
    def read() -> Tensor:
        change = pair.b.read().float() @ pair.a.read().float()
        change = (change.T if is_transposed else change) * scale
        return (weight.read().float() + change).to(dtype)

    return LazyTensor(dtype, weight.shape, read)
