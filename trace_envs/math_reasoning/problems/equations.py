"""Modular arithmetic and linear equations.

Invariant: there is exactly one answer, and the way to it is exact.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd

from trace_envs.math_reasoning.calculator import show_number
from trace_envs.math_reasoning.problems.problem import Draw, Problem, calculate
from trace_envs.math_reasoning.records import Step

_PRIMES = (5, 7, 11, 13, 17, 19, 23)


def modular_problem(draw: Draw, level: int) -> Problem:
    """Returns a problem about remainders."""
    m, a, b, c = draw.number(5, 30), draw.number(11, 60), draw.number(11, 60), draw.number(2, 40)
    if level == 1:
        sign = draw.pick("+*")
        expression = f"({a} {sign} {b}) % {m}"
        value = (a + b if sign == "+" else a * b) % m
        prompt = f"What is the remainder of {a} {sign} {b} divided by {m}?"
    elif level == 2:
        expression, value = f"({a} * {b} + {c}) % {m}", (a * b + c) % m
        prompt = f"What is the remainder of {a} * {b} + {c} divided by {m}?"
    elif level == 3:
        expression, value = f"pow({a}, {b}, {m})", pow(a, b, m)
        prompt = f"What is the remainder of {a} to the power of {b} divided by {m}?"
    elif level == 4:
        m = draw.pick(_PRIMES)
        a, b = draw.number(2, m - 1), draw.number(1, m - 1)
        expression, value = f"pow({a}, -1, {m}) * {b} % {m}", pow(a, -1, m) * b % m
        prompt = f"What is the smallest x from 0 on with {a} x = {b} (mod {m})?"
    elif level == 5:
        n = draw.pick([n for n in range(3, 20) if gcd(m, n) == 1])
        a, b = draw.number(0, m - 1), draw.number(0, n - 1)
        expression = f"min(x for x in range({m} * {n}) if x % {m} == {a} and x % {n} == {b})"
        value = min(x for x in range(m * n) if x % m == a and x % n == b)
        prompt = f"What is the smallest x from 0 on with x = {a} (mod {m}) and x = {b} (mod {n})?"
    else:
        m, n = draw.pick(_PRIMES), draw.number(30, 200)
        a = draw.number(0, m - 1)
        expression, value = f"sum(x * x % {m} == {a} for x in range(1, {n} + 1))", 0
        value = sum(x * x % m == a for x in range(1, n + 1))
        prompt = f"How many x from 1 to {n} are there with x * x = {a} (mod {m})?"
    step = calculate(expression) if level <= 4 else Step("", "python", expression)
    return Problem(prompt, str(value), (step,), f"modular {expression}")


def linear_problem(draw: Draw, level: int) -> Problem:
    """Returns an equation, or two for level 6, to be solved for x."""
    x, a, b = draw.number(-12, 30), draw.number(2, 12), draw.number(2, 40)
    if level == 1:
        if draw.number(0, 1):
            equation, steps = f"x + {b} = {x + b}", [f"{x + b} - {b}"]
        else:
            equation, steps = f"{a} x = {a * x}", [f"{a * x} / {a}"]
    elif level == 2:
        right = a * x + b
        equation, steps = f"{a} x + {b} = {right}", [f"{right} - {b}", f"{a * x} / {a}"]
    elif level == 4:
        return _bracketed(draw)
    elif level == 6:
        return _two_unknowns(draw)
    else:
        c = draw.pick([n for n in range(1, 14) if abs(n - a) >= (2 if level == 5 else 1)])
        d = (a - c) * x + b
        if level == 5:  # by less than what it would take to make the answer whole again
            d += draw.number(1, abs(a - c) - 1)
        equation = f"{a} x + {b} = {c} x {_signed(d)}"
        steps = [f"{a} - {c}", f"{d} - {b}", f"{d - b} / {_wrapped(a - c)}"]
        answer = Fraction(d - b, a - c)
        return _solved(equation, steps, answer)
    return _solved(equation, steps, Fraction(x))


def _bracketed(draw: Draw) -> Problem:
    """Returns a (x + b) = c (x + d)."""
    while True:
        a, b, c, d = draw.number(2, 12), draw.number(1, 20), draw.number(2, 12), draw.number(1, 20)
        if a != c and (c * d - a * b) % (a - c) == 0:
            break
    steps = [
        f"{a} * {b}",
        f"{c} * {d}",
        f"{a} - {c}",
        f"{c * d} - {a * b}",
        f"{c * d - a * b} / {_wrapped(a - c)}",
    ]
    return _solved(f"{a} (x + {b}) = {c} (x + {d})", steps, Fraction(c * d - a * b, a - c))


def _two_unknowns(draw: Draw) -> Problem:
    """Returns two equations in x and y, solved by determinants."""
    while True:
        x, y = draw.number(-9, 20), draw.number(-9, 20)
        a, b, d, e = (draw.number(1, 12) for _ in range(4))
        if a * e != b * d:
            break
    c, f = a * x + b * y, d * x + e * y
    below, above = a * e - b * d, c * e - b * f
    steps = [f"{a} * {e} - {b} * {d}", f"{_wrapped(c)} * {e} - {b} * {_wrapped(f)}", f"{above} / {_wrapped(below)}"]
    return _solved(f"{a} x + {b} y = {c} and {d} x + {e} y = {f}", steps, Fraction(x))


def _solved(equation: str, steps: list[str], answer: Fraction) -> Problem:
    return Problem(f"Solve {equation} for x.", show_number(answer), tuple(map(calculate, steps)), f"linear {equation}")


def _signed(value: int) -> str:
    return f"- {-value}" if value < 0 else f"+ {value}"


def _wrapped(value: int) -> str:
    return f"({value})" if value < 0 else str(value)
