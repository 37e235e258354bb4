"""What a problem is made of.

Invariant: every record is immutable.
"""

from __future__ import annotations

from dataclasses import dataclass

from trace_envs.snapshots.codec import register
from trace_envs.state import Task


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the way.

    Attributes:
        thought: What an agent that knows the way would think; may be empty.
        tool: `calculator` or `python`.
        text: The expression, or the code.
    """

    thought: str
    tool: str
    text: str


@dataclass(frozen=True, slots=True)
class MathTask(Task):
    """A problem.

    Attributes:
        category: Kind of problem.
        level: How hard it is, from 1; 0 where nobody knows.
        answer: The right answer, plain or LaTeX; for a countdown one of them.
        steps: Calls that lead to it; empty where none are known.
        numbers: Of a countdown: the numbers that may be used.
        target: Of a countdown: what must come out.
    """

    category: str = ""
    level: int = 0
    answer: str = ""
    steps: tuple[Step, ...] = ()
    numbers: tuple[int, ...] = ()
    target: int | None = None


@dataclass(frozen=True, slots=True)
class Cells:
    """What the Python tool has been given on the way to this moment.

    Attributes:
        ran: The cells that ended by themselves, oldest first; running them again restores what they made.
    """

    ran: tuple[str, ...] = ()


for _cls in (Step, MathTask, Cells):
    register(_cls, f"math_reasoning.{_cls.__name__}")
