"""LoRA adapters of one base model: the policy's own, and a second one of a critic.

peft's own context managers also decide which adapters take gradients: switching an adapter off for
a reference pass would freeze that of the critic. These touch nothing but which one is in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

POLICY_ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters in place of full fine-tuning; the frozen base serves as the reference.

    W' = W + (alpha / rank) * B A

    Source: LoRA (arXiv:2106.09685), eq. 3.

    Args:
        rank: columns of A and B, >= 1.
        alpha: scale of the update before it is divided by the rank.
        target_modules: names of the linear layers that get an adapter, or "all-linear".
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"


def lora_config(lora: Lora) -> LoraConfig:
    """The same in the form that peft takes."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it, a float is fine
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


@contextlib.contextmanager
def adapter_in_use(model: nn.Module, name: str | None) -> Iterator[None]:
    """A peft model with one of its adapters, or (None) with its base alone.

    Args:
        model: a peft model.
        name: the adapter.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = _adapted_layers(model)
    if not layers:
        raise ValueError("only a LoRA policy has adapters")
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter = [POLICY_ADAPTER if name is None else name]
        layer._disable_adapters = name is None
    try:
        yield
    finally:
        for layer, (active, is_off) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, is_off


def same_adapter(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which the adapter that is in use now is so again, to repeat a forward."""
    layers = _adapted_layers(model)
    if not layers:
        return contextlib.nullcontext()
    is_off = layers[0]._disable_adapters
    return adapter_in_use(model, None if is_off else layers[0].active_adapters[0])


def add_adapter(model: PeftModel, name: str, lora: Lora) -> dict[str, nn.Parameter]:
    """Give a peft model another adapter, which stays off until it is asked for.

    Args:
        model: changed in place; which of its parameters take gradients stays as it is.
        name: of the adapter.
        lora: its shape.

    Returns:
        Name -> parameter of the new adapter; they take gradients.
    """
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter(name, lora_config(lora))
    model.base_model.set_adapter(POLICY_ADAPTER)  # type: ignore[operator]
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(parameter_name, True))
    return {n: p for n, p in model.named_parameters() if n not in flags}


def remove_adapter(model: PeftModel, name: str) -> None:
    """Drop an adapter that `add_adapter` made.

    Args:
        model: changed in place; which other parameters take gradients stays as it is.
        name: of the adapter.
    """
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.delete_adapter(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[parameter_name])


def _adapted_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
