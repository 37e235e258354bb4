"""Ctrl-C in a training run.

Invariant: the first one never loses what is in progress; the second one stops at once.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from agents.display import TrainingDisplay


class Interrupt:
    """Turns the first Ctrl-C into a wish, so that what is in progress is not lost; the second one stops at once.

    Attributes:
        asked: Whether there was a Ctrl-C.
        phase: What is in progress, for the message.
    """

    def __init__(self, display: TrainingDisplay):
        self.asked = False
        self.phase = "update"
        self._display = display
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        then = " and writing a checkpoint" if self.phase == "update" else "; its checkpoint is written"
        self._display.message(f"interrupted: finishing this {self.phase}{then}; again to stop at once")
