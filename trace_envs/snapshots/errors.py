"""What can go wrong with snapshots.

Invariant: each message is one sentence or two that say what was found and what to change.
"""

from __future__ import annotations


class SnapshotUnsupportedError(TypeError):
    """The environment, or a wrapper around it, cannot be snapshotted; the message says what to add."""


class SnapshotFormatError(ValueError):
    """Bytes that are no snapshot, or not a whole one, or one of another release; the message says which."""


class ReplayDivergenceError(RuntimeError):
    """An environment that is restored by repeating its actions did not do the same again.

    Attributes:
        turn: The turn, from 1, whose result differed; 0 is the reset.
    """

    def __init__(self, turn: int, message: str):
        super().__init__(turn, message)
        self.turn = turn
        self.message = message

    def __str__(self) -> str:
        return self.message
