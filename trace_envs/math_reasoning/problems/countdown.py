"""Countdown: make a number from others with the four operations.

Invariant: the solution that comes with a problem uses each number once at most, and every number on its way is whole.
"""

from __future__ import annotations

from trace_envs.math_reasoning.problems.problem import Draw, Problem, calculate

_LARGE = (25, 50, 75, 100)
_SIZES = {1: (2, 20, 0), 2: (3, 10, 0), 3: (3, 25, 0), 4: (4, 12, 1), 5: (5, 12, 1), 6: (6, 10, 2)}
"""Of each level: how many numbers, the largest of the small ones, and how many large ones."""
_MOST = 999


def countdown_problem(draw: Draw, level: int) -> Problem:
    """Returns a problem whose solution uses all numbers up to level 3, and from then on perhaps not all."""
    count, most, large = _SIZES[level]
    while True:
        numbers = [draw.number(2, most) for _ in range(count - large)]
        numbers += [draw.pick(_LARGE) for _ in range(large)]
        used = numbers if level <= 3 else draw.shuffled(numbers)[: draw.number(count - 1, count)]
        solved = _solution(draw, used)
        if solved is not None and solved[1] not in numbers:
            break
    expression, target = solved
    shown = draw.shuffled(numbers)
    prompt = (
        f"Make {target} from {', '.join(map(str, shown))} with + - * / and parentheses. Use each number once at most. "
        "Answer with the expression."
    )
    essence = f"countdown {sorted(numbers)} {target}"
    return Problem(prompt, expression, (calculate(expression),), essence, tuple(shown), target)


def _solution(draw: Draw, numbers: list[int]) -> tuple[str, int] | None:
    """Joins numbers two by two at random; `None` if that comes to nothing one would ask for."""
    parts: list[tuple[str, int, bool]] = [(str(n), n, True) for n in numbers]  # text, value, needs no parentheses
    while len(parts) > 1:
        left, right, *rest = draw.shuffled(parts)
        sign = draw.pick("+-**/" if len(parts) > 2 else "+-*/")
        if sign == "-" and left[1] <= right[1]:
            left, right = right, left
        value = {"+": left[1] + right[1], "-": left[1] - right[1], "*": left[1] * right[1]}.get(sign, 0)
        if sign == "/":
            if left[1] % right[1] or right[1] == 1:
                return None
            value = left[1] // right[1]
        if not 1 <= value <= _MOST:
            return None
        texts = [text if alone else f"({text})" for text, _, alone in (left, right)]
        parts = [(f"{texts[0]} {sign} {texts[1]}", value, False), *rest]
    return parts[0][0], parts[0][1]
