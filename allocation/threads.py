"""`Worker`: a daemon thread that makes one call after another for an event loop.

Invariant: a call that hangs holds up its own thread and nothing else: neither the loop, nor the interpreter's exit.

A call cannot be interrupted. Whoever gives up waiting leaves the worker behind, call and all, and makes another.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any


@dataclass(slots=True, eq=False)
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[tuple[Any, BaseException | None]]
    finished: bool = False


class Worker:
    """A daemon thread; it begins with the first call and ends with the last one after nobody refers to the worker any more.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str):
        self.name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._last: _Call | None = None

    @property
    def busy(self) -> bool:
        """Whether a call is under way, even one that nobody waits for."""
        return self._last is not None and not self._last.finished

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns `function(*args)`, called in the thread; what it raises is raised here."""
        loop = asyncio.get_running_loop()
        if self._last is None:
            threading.Thread(target=_serve, args=(self._calls,), name=self.name, daemon=True).start()
            weakref.finalize(self, self._calls.put, None)
        self._last = _Call(function, args, loop, loop.create_future())
        self._calls.put(self._last)
        value, error = await self._last.future
        if error is not None:
            raise error
        return value


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = call.function(*call.args), None
        except BaseException as error:  # whatever it is belongs to the caller
            outcome = None, error
        call.finished = True
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            call.loop.call_soon_threadsafe(_answer, call.future, outcome)
        del call, outcome  # an idle thread holds on to nothing


def _answer(future: asyncio.Future[Any], outcome: tuple[Any, BaseException | None]) -> None:
    if not future.done():  # cancelled by whoever gave up
        future.set_result(outcome)
