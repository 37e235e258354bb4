"""An event loop in a thread of its own, for clients that are bound to one loop while their callers come from any.

Invariant: every coroutine runs on that one loop; whoever waits may be in no loop, in another one, or in another thread.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """A daemon thread that runs an event loop until it is closed, or until nobody refers to this object any more.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_serve, args=(self._loop,), name=name, daemon=True).start()
        self._stop = weakref.finalize(self, _stop, self._loop)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and blocks the calling thread until it is finished; an interrupt (Ctrl-C) cancels it.

        Raises:
            RuntimeError: The thread was closed.
        """
        future = asyncio.run_coroutine_threadsafe(self._open(coroutine), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine while the caller's loop goes on; cancelling the caller cancels it.

        Raises:
            RuntimeError: The thread was closed.
        """
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._open(coroutine), self._loop))

    def close(self) -> None:
        """Cancels what is under way and ends the thread."""
        self._stop()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._stop.alive

    def _open(self, coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        if not self.closed:
            return coroutine
        coroutine.close()
        raise RuntimeError("this policy was closed; make another one")


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with suppress(RuntimeError):  # closed already: the interpreter is ending
        loop.call_soon_threadsafe(loop.stop)
