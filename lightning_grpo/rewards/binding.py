"""What a reward function is called, says of itself and takes, and the call that gives it that."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def function_names(functions: Sequence[Any]) -> list[str]:
    """Name reward functions, for metrics and messages.

    Args:
        functions: callables.

    Returns:
        Unique names: that of the function, of the function inside a partial, or of the class of
        an object; a second one of the same name ends in `_2`, a third in `_3`.

    Raises:
        ValueError: something in the list is not a reward function.
    """
    names: list[str] = []
    for base in map(_base_name, functions):
        candidates = (base if k == 1 else f"{base}_{k}" for k in range(1, len(functions) + 1))
        names.append(next(name for name in candidates if name not in names))
    return names


def per_row(function: _Function) -> _Function:
    """Say that a reward function scores each row by itself.

    What it gives a completion then depends neither on the completions beside it nor on their
    order, so that it can be called with those that have ended while others are being completed.
    It is called so in several threads at once.

    Args:
        function: a reward function; the class of one can set `is_per_row = True` instead.

    Returns:
        The function itself.
    """
    function.is_per_row = True  # type: ignore[attr-defined]
    return function


def is_per_row(function: Callable[..., Any]) -> bool:
    """Whether a function, or that inside a partial, says that it scores each row by itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return bool(getattr(function, "is_per_row", False))


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without a default."""
    parameters = _parameters(function) or []
    return [p.name for p in parameters if p.kind in _BY_KEYWORD and p.default is p.empty]


def bind(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Make the call of a reward function.

    Args:
        function: takes keywords. Without a `**kwargs` of its own it gets only those it names, and
            never one that a partial has bound.
        arguments: all there is to give. Lists and dicts are copied, so that a function can change
            its own without changing what others get; other objects are shared.

    Returns:
        A function without arguments.
    """
    accepted = _accepted_arguments(function)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    own = {
        name: copied(value)
        for name, value in arguments.items()
        if name not in bound and (accepted is None or name in accepted)
    }
    return functools.partial(function, **own)


def copied(value: Any) -> Any:
    """Copy lists and dicts, and those inside them; other objects stay what they are."""
    if isinstance(value, list):
        # Looking at the types first makes long lists of token ids cheap.
        is_nested = any(issubclass(kind, (list, dict)) for kind in set(map(type, value)))
        return [copied(item) for item in value] if is_nested else list(value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value


def _base_name(function: Any) -> str:
    if not callable(function):
        raise ValueError(f"a reward function must be callable, not {function!r}")
    if inspect.isclass(function):
        raise ValueError(f"reward function {function.__name__} is a class; give an instance of it")
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name.strip("<>") if isinstance(name, str) else type(function).__name__


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C do not tell
        return None


def _accepted_arguments(function: Callable[..., Any]) -> set[str] | None:
    """Return the argument names that a function takes; None if it takes any."""
    parameters = _parameters(function)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in _BY_KEYWORD}
