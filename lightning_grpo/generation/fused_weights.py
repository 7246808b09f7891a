"""The weights of linear layers and norms in the form in which the fused decoders apply them.

A linear layer with LoRA adapters is its base, and the adapters beside it in their own type: they
are never added to weights of fewer bits, in which a small change would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

Apply = Callable[[Tensor], Tensor]


class HeldWeights:
    """The tensors of a fused model, which keep their places when they are taken again.

    A step that was captured reads from these places: with new values in them it needs no other
    capture. Copied are only weights that are joined or cast; the others are the model's own.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}

    def join(self, name: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Several tensors one below the other, in the place that they had before if there is one.

        Args:
            name: of the result.
            parts: (rows, ...) each.
            dtype: of the result.
        """
        parts = [part.detach() for part in parts]
        if len(parts) == 1 and parts[0].dtype == dtype:
            self.tensors[name] = parts[0]
            return parts[0]
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        copy = self.copies.get(name)
        if copy is None or (copy.shape, copy.dtype) != (shape, dtype):
            copy = torch.empty(shape, dtype=dtype, device=parts[0].device)
        for place, part in zip(copy.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        self.tensors[name] = self.copies[name] = copy
        return copy

    def addresses(self) -> dict[str, int]:
        """Where each tensor lies."""
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type that matrix products are made in: that of autocast where it is on."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def fused_linear(
    modules: list[Any], held: HeldWeights, name: str, num_outputs: int | None = None
) -> Apply:
    """Several linear layers of one input as one, their outputs side by side.

    Args:
        modules: at least one; nn.Linear, also with LoRA adapters beside it. Others are called one
            after the other.
        held: takes the weights.
        name: of the weights.
        num_outputs: leave the outputs past these out.

    Returns:
        The function from (..., in) to (..., out).
    """
    bases = [_base(module) for module in modules]
    if any(base is None for base in bases):
        apply = called_as_is(modules, held, name)
        return lambda x: apply(x)[..., :num_outputs]
    # One type for all of the rollout: autocast would cast the weights again at every token.
    dtype = compute_dtype(bases[0].weight)
    weight = held.join(f"{name}.weight", [base.weight for base in bases], dtype)[:num_outputs]
    bias = None
    if any(base.bias is not None for base in bases):
        biases = [weight.new_zeros(len(b.weight)) if b.bias is None else b.bias for b in bases]
        bias = held.join(f"{name}.bias", biases, dtype)[:num_outputs]
    adapters = _adapters(modules, held, name)
    if not adapters:
        return lambda x: F.linear(x, weight, bias)

    def with_adapters(x: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        for columns, add in adapters:
            y[..., columns] += add(x)[..., : len(weight) - columns.start]
        return y

    return with_adapters


def _base(module: Any) -> Any:
    """The nn.Linear that a module is, but for adapters; None for any other module."""
    if type(module) is LoraLinear and not module.lora_variant and not module.merged:
        module = module.base_layer
    return module if type(module) is nn.Linear else None


def _adapters(modules: list[Any], held: HeldWeights, name: str) -> list[tuple[slice, Apply]]:
    """Output columns, and what an adapter that is in use adds to them."""
    found = []
    start = 0
    for index, module in enumerate(modules):
        columns = slice(start, start + module.out_features)
        start = columns.stop
        if type(module) is nn.Linear or module.disable_adapters:
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                place = f"{name}.{index}.{adapter}"
                found.append((columns, _side_adapter(module, adapter, held, place)))
    return found


def _side_adapter(module: Any, adapter: str, held: HeldWeights, name: str) -> Apply:
    dtype = compute_dtype(module.lora_A[adapter].weight)
    down = fused_linear([module.lora_A[adapter]], held, f"{name}.down")
    up = fused_linear([module.lora_B[adapter]], held, f"{name}.up")
    scaling = module.scaling[adapter]
    return lambda x: up(down(x.to(dtype))) * scaling


def called_as_is(modules: list[Any], held: HeldWeights, name: str) -> Apply:
    """Modules called as they are, their outputs side by side."""
    for index, module in enumerate(modules):
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            held.tensors[f"{name}.{index}.{key}"] = tensor.detach()
    if len(modules) == 1:
        return modules[0]  # type: ignore[no-any-return]
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)


def fused_norm(module: Any, held: HeldWeights, name: str) -> Apply:
    """An RMSNorm as one operation."""
    weight = held.join(name, [module.weight], module.weight.dtype)
    eps = module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)
