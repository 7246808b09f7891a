"""Calls reward functions, plain and async, and tells what each returned or raised.

Plain functions run one after another in the calling thread (math graders use `signal.alarm`, which
works only in the main thread). Async functions then run concurrently in one event loop that lives
in a thread of its own: it works below a running loop too (a notebook), and a client that a function
keeps between calls stays usable.

`Workers` runs calls in threads, for functions that may be called so.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

_event_loop_lock = threading.Lock()


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


class Workers:
    """Threads that run calls while the calling thread does something else.

    A thread starts when a call finds none idle. They are daemons, unlike those of
    concurrent.futures: a reward function that hangs must not keep the process from ending.

    Args:
        num_threads: calls that run at a time, at least 1; what async ones await runs besides.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._waiting = queue.SimpleQueue()
        self._num_idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._futures: list[Future[Any]] = []

    def start(self, call: Callable[[], Any]) -> Future[Any]:
        """Run a call as soon as a thread is free.

        Args:
            call: as in `run_all`.

        Returns:
            What `outcome_of` takes.
        """
        future: Future[Any] = Future()
        self._futures.append(future)
        self._waiting.put((future, call))
        is_served = self._num_idle.acquire(blocking=False)
        if not is_served and len(self._threads) < self.num_threads:
            name = f"rewards-{len(self._threads)}"
            thread = threading.Thread(target=self._serve_calls, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Let the threads end when they have run what waits; nothing can start after it."""
        self._waiting.put(None)

    def cancel(self) -> None:
        """Drop the calls that wait, and stop the async ones; a plain one that runs goes on."""
        for future in self._futures:
            if not future.cancel() and future.done() and isinstance(future.result(), Future):
                future.result().cancel()
        self.close()

    def _serve_calls(self) -> None:
        while True:
            try:
                work = self._waiting.get_nowait()
            except queue.Empty:
                self._num_idle.release()
                work = self._waiting.get()
            if work is None:
                self._waiting.put(None)  # for the next thread
                return
            future, call = work
            if future.set_running_or_notify_cancel():
                future.set_result(_started(call))


def outcome_of(future: Future[Any]) -> list[Any] | Failure:
    """Wait for a call that `Workers` runs.

    Args:
        future: as `Workers.start` returned it.

    Returns:
        The list that the call returned, or its Failure.

    Raises:
        KeyboardInterrupt: when it is raised, here or in the function.
    """
    outcome = future.result()
    if isinstance(outcome, Future):
        outcome = outcome.result()
    if isinstance(outcome, Failure) and isinstance(outcome.error, KeyboardInterrupt):
        raise outcome.error
    return outcome if isinstance(outcome, Failure) else _listed(outcome)


def _started(call: Callable[[], Any]) -> Any:
    """The list of a plain function, or its Failure; of an async one the future of its result."""
    try:
        result = call()
        if inspect.isawaitable(result):
            return asyncio.run_coroutine_threadsafe(_awaited(result), _shared_event_loop())
        return _listed(result)
    except BaseException as error:  # it is for whoever waits for the outcome
        return Failure(error)


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
    future = asyncio.run_coroutine_threadsafe(_gather(awaitables), _shared_event_loop())
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


def _shared_event_loop() -> asyncio.AbstractEventLoop:
    with _event_loop_lock:
        return _event_loop(os.getpid())


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
