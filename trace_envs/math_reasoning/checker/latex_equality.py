"""Run in the sandbox: whether two pieces of LaTeX mean the same, by `math-verify`.

Invariant: nothing of the package is imported here. The limits are the sandbox's: the library's own use signals, which only a
main thread gets.
"""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.disable(logging.CRITICAL)


def _same(right: list[object], text: str) -> bool:
    mine = parse(text, parsing_timeout=None)
    return bool(mine) and bool(verify(right, mine, timeout_seconds=None))


def equal(gold: str, answer: str) -> bool:
    """Says whether an answer, all of it or what words around it leave, means what the gold answer means."""
    right = parse(gold if "$" in gold else f"\\boxed{{{gold}}}", parsing_timeout=None)
    fenced = "\\boxed" in answer or "$" in answer
    return bool(right) and ((not fenced and _same(right, f"\\boxed{{{answer}}}")) or _same(right, answer))


equal("\\frac{1}{2}", "0.5")  # what is slow once is done before the first call
