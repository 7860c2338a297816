"""Calls of users' functions that may take long, fail or be asynchronous: retried, limited, at one time."""

import asyncio
import functools
import inspect
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
# Seconds before the first retry; each further one waits twice as long.
FIRST_WAIT = 0.5
_THREAD = "react_fast calls"

# By name or by place.
Arguments = dict[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Calls:
    """How a function is called.

    Args:
        timeout: seconds for one attempt; None: as long as it takes. A plain function is then called in a thread,
            which nobody can stop: after a timeout it goes on unheard. An `async def` that blocks its event loop
            is not stopped either.
        retries: further attempts after one that raised or ran out of time, after 0.5, 1, 2, ... seconds.
        concurrency: calls at one time, of functions that are asynchronous or have a timeout. Others run one
            after the other in the caller's own thread.
    Raises: ValueError or TypeError for numbers out of range or of another kind.
    """

    timeout: float | None = None
    retries: int = 0
    concurrency: int = 16

    def __post_init__(self) -> None:
        if self.timeout is not None:
            _number("timeout", self.timeout, (int, float))
            if not 0 < self.timeout < float("inf"):
                raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")
        for name, least in (("retries", 0), ("concurrency", 1)):
            value = getattr(self, name)
            _number(name, value, (int,))
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def many(self, function: Callable[..., Any], calls: Sequence[Arguments]) -> list[Any]:
        """The result of every call, or the exception of its last attempt."""
        return run([(self, function, calls)])[0]

    def _plain(self, call: Callable[[], Any]) -> Any:
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                return call()
            except SystemExit as caught:
                error: Exception = _ordinary(caught)
            except Exception as caught:
                error = caught
        return error

    async def _together(self, calls: Sequence[Callable[[], Any]], asynchronous: bool) -> list[Any]:
        limit = asyncio.Semaphore(self.concurrency)

        async def one(call: Callable[[], Any]) -> Any:
            async with limit:
                return await self._awaited(call if asynchronous else functools.partial(_in_thread, call))

        found = await asyncio.gather(*map(one, calls), return_exceptions=True)
        return [_ordinary(r) if isinstance(r, asyncio.CancelledError) else r for r in found]

    async def _awaited(self, call: Callable[[], Awaitable[Any]]) -> Any:
        error: Exception
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                return await asyncio.wait_for(_guarded(call), self.timeout)
            except (asyncio.TimeoutError, TimeoutError) as caught:
                own = self.timeout is None or str(caught)
                error = caught if own else TimeoutError(f"no answer within {self.timeout:g} s")
            except Exception as caught:
                error = caught
        return error


def run(jobs: Sequence[tuple[Calls, Callable[..., Any], Sequence[Arguments]]]) -> list[list[Any]]:
    """For every (how, function, calls): the result of every call, or the exception of its last attempt.

    Functions that are asynchronous or have a timeout run at one time, beside the others, which run in the caller's
    thread; the loop is the process's own, so that this works inside a notebook's. An exit that a function asks for
    is an exception of its call.

    Raises: RuntimeError from within an asynchronous function of another call, which would wait for itself.
    """
    waiting: dict[int, Future[list[Any]]] = {}
    plain: dict[int, list[Any]] = {}
    bound = [[_bound(function, call) for call in calls] for _, function, calls in jobs]
    try:
        for i, (how, function, _) in enumerate(jobs):
            if how.timeout is not None or is_async(function):
                if threading.current_thread().name == _THREAD:
                    raise RuntimeError("an asynchronous function must not wait for calls of another one")
                work = how._together(bound[i], is_async(function))
                waiting[i] = asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))
        for i, (how, _, _) in enumerate(jobs):
            if i not in waiting:
                plain[i] = [how._plain(call) for call in bound[i]]
        return [waiting[i].result() if i in waiting else plain[i] for i in range(len(jobs))]
    except BaseException:  # Ctrl-C: nothing goes on behind the caller's back
        for future in waiting.values():
            future.cancel()
        raise


def _bound(function: Callable[..., Any], call: Arguments) -> Callable[[], Any]:
    return (
        functools.partial(function, **call) if isinstance(call, dict) else functools.partial(function, *call)
    )


def is_async(function: Any) -> bool:
    """Whether a call of it must be awaited: `async def`, or an object whose `__call__` is."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def cause(error: BaseException) -> str:
    """An exception in one line: its kind and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _number(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = "an integer" if kinds == (int,) else "a number"
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


@functools.lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """One loop in a thread for a process: clients that an asynchronous function keeps stay bound to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=_THREAD, daemon=True).start()
    return loop


def _ordinary(error: BaseException) -> RuntimeError:
    """What ends a program or a loop, as an exception that may be kept."""
    return RuntimeError(repr(error))


async def _guarded(call: Callable[[], Awaitable[Any]]) -> Any:
    """What a call gives. Anything but an Exception would end the loop and leave everybody waiting."""
    try:
        return await call()
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise _ordinary(error) from error


async def _in_thread(call: Callable[[], T]) -> T:
    """The result of a blocking call. Its thread is a daemon, so that one that hangs does not hold up the exit."""
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call())
        except BaseException as error:
            plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            future.set_exception(error if plain else _ordinary(error))  # what a future of asyncio takes

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)
