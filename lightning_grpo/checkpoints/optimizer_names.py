"""Optimizer states by the names of parameters, which every strategy and every process agrees on.

`Optimizer.state_dict` numbers the parameters in the order of its groups. The numbers mean nothing
without the module that made them, and change when a parameter comes or goes before another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def parameter_names(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> list[str]:
    """The name of each parameter of an optimizer, in the order of its state_dict's numbers.

    Args:
        optimizer: in use.
        named_parameters: of the module.

    Returns:
        One name for each number.

    Raises:
        ValueError: it has a parameter that the module has not.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if missing := [tuple(p.shape) for p in parameters if id(p) not in names]:
        raise ValueError(
            f"the optimizer has parameters that the module has not, of shape {missing}"
        )
    return [names[id(parameter)] for parameter in parameters]


def with_names(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state_dict with names in the place of numbers.

    Args:
        state: of `Optimizer.state_dict`.
        names: of `parameter_names`.

    Returns:
        The same, its tensors not copied.
    """
    groups = [
        {**group, "params": [names[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    by_name = {names[number]: value for number, value in state["state"].items()}
    return {**state, "state": by_name, "param_groups": groups}


def with_numbers(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Undo `with_names` for an optimizer that may hold its parameters in another order.

    Args:
        state: of `with_names`.
        names: of `parameter_names`, of the optimizer that is to load the state.

    Returns:
        What `Optimizer.load_state_dict` takes.

    Raises:
        ValueError: the optimizer has other parameters, or has them in other groups.
    """
    numbers = {name: number for number, name in enumerate(names)}
    saved = [name for group in state["param_groups"] for name in group["params"]]
    if set(saved) != set(names):
        lacking, unknown = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
        raise ValueError(
            "the checkpoint's optimizer has other parameters than this run's: it lacks "
            f"{_some(lacking)} and has {_some(unknown)} besides; resume with the model, the lora "
            "and the critic that the run had"
        )
    # An optimizer takes the saved numbers for its own parameters in the order of its groups.
    groups = [
        {**group, "params": sorted(numbers[name] for name in group["params"])}
        for group in state["param_groups"]
    ]
    if [number for group in groups for number in group["params"]] != list(range(len(names))):
        raise ValueError("the checkpoint's optimizer has its parameters in other groups")
    by_number = {numbers[name]: value for name, value in state["state"].items()}
    return {**state, "state": by_number, "param_groups": groups}


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
