"""Calls reward functions, plain and async, and tells what each returned or raised.

Plain functions run one after another in the calling thread (math graders use `signal.alarm`, which
works only in the main thread). Async functions then run concurrently in one event loop that lives
in a thread of its own: it works below a running loop too (a notebook), and a client that a function
keeps between calls stays usable.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Failure:
    """A call that did not give a list."""

    error: BaseException
    """What it raised."""


def run_all(calls: Sequence[Callable[[], Any]]) -> list[list[Any] | Failure]:
    """Run the calls and wait for all of them.

    Args:
        calls: functions without arguments; each returns an iterable, or an awaitable of one.

    Returns:
        For each call the list it returned, or its Failure.

    Raises:
        KeyboardInterrupt: when it is raised, here or in a function.
    """
    outcomes = _call_each(calls)
    waiting = [i for i, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
    if waiting:
        for i, outcome in zip(waiting, _await_all([outcomes[i] for i in waiting])):
            outcomes[i] = outcome
    return [outcome if isinstance(outcome, Failure) else _listed(outcome) for outcome in outcomes]


def _call_each(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    outcomes: list[Any] = []
    try:
        for call in calls:
            outcomes.append(_called(call))
    except BaseException:
        for outcome in outcomes:
            if inspect.iscoroutine(outcome):
                outcome.close()  # it never started; without this Python warns about it
        raise
    return outcomes


def _called(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (Exception, SystemExit) as error:
        return Failure(error)


def _listed(result: Any) -> list[Any] | Failure:
    if isinstance(result, (Tensor, np.ndarray)):
        result = result.tolist()
    unordered = (str, bytes, Mapping, Set)
    if isinstance(result, unordered) or not isinstance(result, Iterable):
        name = type(result).__name__
        return Failure(TypeError(f"returned {name}, not a list with one value per completion"))
    try:
        return list(result)  # a generator runs, and may fail, here
    except (Exception, SystemExit) as error:
        return Failure(error)


def _await_all(awaitables: list[Awaitable[Any]]) -> list[Any]:
    future = asyncio.run_coroutine_threadsafe(_gather(awaitables), _event_loop(os.getpid()))
    try:
        outcomes = future.result()
    except BaseException:  # Ctrl-C while waiting: stop the calls that are under way
        future.cancel()
        raise
    for outcome in outcomes:
        if isinstance(outcome, Failure) and isinstance(outcome.error, KeyboardInterrupt):
            raise outcome.error
    return outcomes


async def _gather(awaitables: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*(_awaited(awaitable) for awaitable in awaitables))


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    # Everything is caught: an exception that ended the loop's thread would hang the caller.
    try:
        return await awaitable
    except BaseException as error:
        return Failure(error)


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    # Keyed by process: a forked child has a copy of the loop, but not the thread that runs it.
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_serve, args=(loop,), name="reward-functions", daemon=True)
    thread.start()
    return loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    while not loop.is_closed():
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue  # raised by a task of a reward function; whoever awaits that task gets it too
