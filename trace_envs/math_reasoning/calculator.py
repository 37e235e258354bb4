"""Exact arithmetic on expressions that a model wrote.

Invariant: values are rational numbers, never rounded; nothing is evaluated but what this file lists; a call ends at once
whatever is written, because lengths, exponents and sizes of numbers are bounded.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 400
MAX_BITS = 16_384
_TOKENS = re.compile(r"(?:\d+(?:\.\d+)?(?![\w.])|\.\d+(?![\w.])|[-+*/%(),\s]|[a-z]+(?![\w.]))*")
_SPELLINGS = str.maketrans(
    {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "$": ""} | {"[": "(", "]": ")"}
)


class CalculatorError(ValueError):
    """An expression has no exact value here; the message says why."""


def _whole(value: Fraction, where: str) -> int:
    if value.denominator != 1:
        raise CalculatorError(f"{where} takes whole numbers, got {show_number(value)}")
    return value.numerator


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError("the numbers get too large; use python, or simplify first")
    return value


def _power(base: Fraction, exponent: Fraction, modulus: Fraction | None = None) -> Fraction:
    power = _whole(exponent, "an exponent")
    if modulus is not None:
        try:
            return Fraction(pow(_whole(base, "pow"), power, _whole(modulus, "pow")))
        except ValueError as error:
            raise CalculatorError(f"pow: {error}") from None
    if base == 0 and power < 0:
        raise CalculatorError("division by zero")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size > 1 and abs(power) * size > MAX_BITS:
        raise CalculatorError("the numbers get too large; use python, or pow(base, exponent, modulus)")
    return base**power


def _sqrt(value: Fraction) -> Fraction:
    if value < 0:
        raise CalculatorError(f"sqrt({show_number(value)}) is not real")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise CalculatorError(f"sqrt({show_number(value)}) is not rational; leave it as it is, or use python")
    return root


def _choose(name: str, function: Callable[[int, int], int]) -> Callable[[Fraction, Fraction], Fraction]:
    def call(n: Fraction, k: Fraction) -> Fraction:
        a, b = _whole(n, name), _whole(k, name)
        if not 0 <= a <= 1000 or not 0 <= b <= 1000:
            raise CalculatorError(f"{name} takes whole numbers from 0 to 1000")
        return Fraction(function(a, b))

    return call


def _factorial(n: Fraction) -> Fraction:
    whole = _whole(n, "factorial")
    if not 0 <= whole <= 1000:
        raise CalculatorError("factorial takes a whole number from 0 to 1000")
    return Fraction(math.factorial(whole))


FUNCTIONS: dict[str, tuple[int, int, Callable[..., Fraction]]] = {
    "abs": (1, 1, abs),
    "min": (1, 64, lambda *v: min(v)),
    "max": (1, 64, lambda *v: max(v)),
    "gcd": (1, 64, lambda *v: Fraction(math.gcd(*(_whole(x, "gcd") for x in v)))),
    "lcm": (1, 64, lambda *v: Fraction(math.lcm(*(_whole(x, "lcm") for x in v)))),
    "floor": (1, 1, lambda v: Fraction(math.floor(v))),
    "ceil": (1, 1, lambda v: Fraction(math.ceil(v))),
    "round": (1, 2, lambda v, n=Fraction(0): Fraction(round(v, max(min(_whole(n, "round"), 50), -50)))),
    "sqrt": (1, 1, _sqrt),
    "factorial": (1, 1, _factorial),
    "comb": (2, 2, _choose("comb", math.comb)),
    "perm": (2, 2, _choose("perm", math.perm)),
    "pow": (2, 3, _power),
}
"""Least and most arguments of each function, and what it does."""


def _divide(a: Fraction, b: Fraction) -> Fraction:
    return a / b


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: _divide,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
}


def parse(expression: str) -> ast.expr:
    """Returns the tree of an expression.

    Raises:
        CalculatorError: It is none, or too long.
    """
    if len(expression) > MAX_CHARS:
        raise CalculatorError(f"the expression has {len(expression)} characters; use at most {MAX_CHARS}")
    text = " ".join(expression.translate(_SPELLINGS).split())
    if not text:
        raise CalculatorError("the expression is empty")
    # Before Python's own parser, which would warn of some texts and read others as more than arithmetic.
    matched = _TOKENS.match(text)
    end = matched.end() if matched else 0
    if end < len(text):
        raise CalculatorError(f"cannot read {text[end : end + 12]!r}; write numbers and + - * / // % ** ( )")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculatorError(f"{text[:60]!r} is not a complete expression") from None


def evaluate(expression: str) -> Fraction:
    """Returns the exact value of an expression.

    Args:
        expression: Numbers, `+ - * / // % **`, parentheses and `FUNCTIONS`; `×`, `÷`, `^` and `$` are understood.

    Raises:
        CalculatorError: It has no exact value; the message says why.
    """
    return value_of(parse(expression))


def value_of(node: ast.expr) -> Fraction:
    """Returns the value of a tree of `parse`; raises as `evaluate` does."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, int) and not isinstance(node.value, bool):
            return Fraction(node.value)
        # Through the shortest text that reads as this float, which is what was written, up to 15 digits.
        if isinstance(node.value, float) and math.isfinite(node.value):
            return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = value_of(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = value_of(node.left), value_of(node.right)
        try:
            return _bounded(_OPERATORS[type(node.op)](left, right))
        except ZeroDivisionError:
            raise CalculatorError("division by zero") from None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _bounded(_called(node.func.id, [value_of(argument) for argument in node.args]))
    if isinstance(node, ast.Name):
        raise CalculatorError(f"{node.id!r} has no value here; known functions: {', '.join(FUNCTIONS)}")
    raise CalculatorError("only numbers, + - * / // % **, parentheses and functions are understood")


def _called(name: str, arguments: list[Fraction]) -> Fraction:
    if name not in FUNCTIONS:
        raise CalculatorError(f"unknown function {name!r}; known: {', '.join(FUNCTIONS)}")
    least, most, function = FUNCTIONS[name]
    if not least <= len(arguments) <= most:
        raise CalculatorError(f"{name} takes {least if least == most else f'{least} to {most}'} arguments")
    try:
        return function(*arguments)
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None


def show_number(value: Fraction) -> str:
    """Returns a number as text: whole, as a decimal if it ends within 12 places, otherwise as a fraction; all exact."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1 or places > 12:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"
