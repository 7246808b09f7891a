"""A stand-in for CUDA graphs on any device, and a count of what a graph could not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They bring a value, or a size that depends on values, from the device to the host, or a tensor
# from the host to the device.
HOST_OPERATIONS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "repeat_interleave.Tensor",
    "is_nonzero",
    "equal",
    "lift_fresh",
    "lift",
}


class HostOperations(TorchDispatchMode):
    """Counts operations that make the host and the device wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func.__name__.split(".", 1)
        is_listed = name in HOST_OPERATIONS or f"{name}.{overload}" in HOST_OPERATIONS
        # A number that is assigned to a part of a tensor goes as an argument, not as a tensor.
        is_listed &= not (name == "lift_fresh" and args[0].dim() == 0)
        has_mask = name.startswith(("index", "_index")) and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if is_listed or has_mask:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was written to, as it was
        self.made: set[int] = set()  # storages of results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value, argument in zip(args, func._schema.arguments):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor):
                self._remember(value)
        result = func(*args, **kwargs)
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if _is_tensor(x)}
        for x in filter(_is_tensor, tree_leaves(result)):
            if x.untyped_storage().data_ptr() not in inputs:
                self.made.add(x.untyped_storage().data_ptr())
        assert not any(map(_is_tensor, tree_leaves(kwargs))), f"{func}: they are not replaced"
        self.calls.append((func, args, kwargs, result))
        return result

    def _remember(self, x: Tensor) -> None:
        place = x.untyped_storage().data_ptr()
        if place not in self.made and place not in self.before:
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            self.before[place] = (whole, whole.clone())


def record(function: Callable[[], None]) -> Callable[[], None]:
    """Make the replay of a function, without running it, as a CUDA graph would be.

    The replay makes the same calls of operations. A tensor that the function found is the same
    one, at its place; numbers are those of the recording; no Python runs again.
    """
    recorder = _Recorder()
    with recorder:
        function()
    for whole, values in recorder.before.values():
        whole.copy_(values)

    def replay() -> None:
        results: dict[int, Tensor] = {}
        for func, args, kwargs, old in recorder.calls:
            new = func(*_as_of_now(args, results), **kwargs)
            pairs = zip(tree_leaves(old), tree_leaves(new))
            results.update((id(before), after) for before, after in pairs if _is_tensor(before))

    return replay


def _as_of_now(x: Any, results: dict[int, Tensor]) -> Any:
    """Arguments with what was made in the recording replaced by what is made in the replay."""
    if isinstance(x, Tensor):
        return results.get(id(x), x)
    return type(x)(_as_of_now(y, results) for y in x) if isinstance(x, (list, tuple)) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
