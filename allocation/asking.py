"""How a policy is asked what to do, and who is named when that or anything else fails.

Invariant: an exception leaves this module with the name of the node that it belongs to, or not at all.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from allocation.collection import Context, Rollout
from allocation.ledger import Ledger
from allocation.threads import Worker


class RolloutError(RuntimeError):
    """A rollout could not go on; what was raised is its `__cause__`.

    Attributes:
        tree: Key of the tree.
        node: Id of the node that it had got to.
        turn: The turn that failed, from 1; 0 is the return to the prompt.
    """

    def __init__(self, message: str, tree: str, node: int, turn: int):
        super().__init__(message, tree, node, turn)
        self.message, self.tree, self.node, self.turn = message, tree, node, turn

    def __str__(self) -> str:
        return f"tree {self.tree!r}, node {self.node}, turn {self.turn}: {self.message}"


def error_at(rollout: Rollout, turn: int, message: str) -> RolloutError:
    """Returns an error that names the node that a rollout has got to."""
    return RolloutError(message, rollout.job.tree.key, rollout.node.id, turn)


@contextmanager
def blamed(rollout: Rollout, ahead: int, what: str) -> Iterator[None]:
    """Turns what is raised inside into a `RolloutError` that names the node.

    Args:
        rollout: Where it happens.
        ahead: 1 while the turn after the node is under way, else 0.
        what: Who is to blame.
    """
    try:
        yield
    except RolloutError:
        raise
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # by whoever runs this; one that comes from inside would otherwise end the task without a word
        message = f"{what} failed with {type(error).__name__}: {error}"
        raise error_at(rollout, rollout.node.depth + ahead, message) from error


class BatchPolicy(Protocol):
    """Acts on all the branches that wait."""

    def act(self, contexts: Sequence[Context]) -> Sequence[Any]:
        """Returns one `Sample` (or action) for each context, in order."""
        ...


class AsyncPolicy(Protocol):
    """Acts on one branch; awaited for as many of them at once as there are slots in use."""

    async def act(self, context: Context) -> Any:
        """Returns a `Sample` (or action)."""
        ...


AsyncFunction = Callable[[Context], Coroutine[Any, Any, Any]]


def act_of(policy: Any) -> Callable[..., Any]:
    """Returns what is to be called, a coroutine function where the policy is asked branch by branch.

    Raises:
        TypeError: The policy is none.
    """
    act = policy if inspect.iscoroutinefunction(policy) else getattr(policy, "act", None)
    if not callable(act):
        raise TypeError(
            f"expected a policy with act(contexts), one with `async def act(context)`, or a coroutine function, "
            f"got {type(policy).__name__}"
        )
    return act


class Batches:
    """Gathers the branches that wait into calls of a batch policy, one call at a time.

    Args:
        act: The policy.
        worker: Where it is called.
        most: Most contexts in one call; `None` for all that wait.
        ledger: Counts the calls.
    """

    def __init__(self, act: Callable[..., Any], worker: Worker, most: int | None, ledger: Ledger):
        self._act, self._worker, self._most, self._ledger = act, worker, most, ledger
        self._waiting: list[tuple[Rollout, asyncio.Future[Any]]] = []
        self._some = asyncio.Event()

    async def ask(self, rollout: Rollout) -> Any:
        """Returns the policy's answer for one branch."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((rollout, future))
        self._some.set()
        return await future

    async def serve(self) -> None:
        """Makes the calls, until it is cancelled."""
        while True:
            await self._some.wait()
            await asyncio.sleep(0)  # lets those join whose step has come back as well
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most or len(self._waiting) :]
            if not self._waiting:
                self._some.clear()
            what = f"the policy (on {len(batch)} prefixes, this being the first)"
            with blamed(batch[0][0], 1, what), self._ledger.timed("generate"):
                answers = list(await self._worker.call(self._act, [rollout.context for rollout, _ in batch]))
                if len(answers) != len(batch):
                    raise ValueError(f"act() was given {len(batch)} contexts and returned {len(answers)} actions")
            self._ledger.model_calls += 1
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)
