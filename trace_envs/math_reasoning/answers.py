"""Whether an answer is right: exact rational numbers first, then the mathematics behind LaTeX, then nothing.

Invariant: no verdict depends on rounding, and an answer that cannot be read is wrong, never an error. What a model wrote goes
to a computer-algebra system in the sandbox only.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from trace_envs.math_reasoning.calculator import CalculatorError, parse, value_of
from trace_envs.sandbox import Limits, Sandbox, SandboxError, shared

MAX_ANSWER_CHARS = 1000
MAX_DIGITS = 1000
LATEX_LIMITS = Limits(cpu_seconds=2.0, wall_seconds=6.0, memory_mib=512)
_CHECKER = Path(__file__).parent / "checker"

_SPACING = re.compile(r"\\(?:left|right|big|Big|displaystyle|[!,;: ])")
_COMMAS = re.compile(r"(?<=\d)(?:\{,\}|,)(?=\d{3}(?!\d))")
_UNITS = re.compile(r"(?:\\?\s*(?:\\text|\\mbox|\\mathrm)\s*\{[^{}]*\}|\^\s*\\circ|\^\{\\circ\}|\\circ)\s*$")
_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_PLAIN = re.compile(rf"([-+]?)\s*({_NUMBER})(?:\s*/\s*([-+]?)\s*({_NUMBER}))?")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
_FRACTION = re.compile(
    r"([-+]?)\s*(\d*)\s*\\[dtc]?frac\s*(?:\{\s*([-+]?\s*\d+)\s*\}|(\d))\s*(?:\{\s*([-+]?\s*\d+)\s*\}|(\d))"
)
_NAMED = re.compile(r"^\s*[A-Za-z]\s*=\s*")


def final_of(text: str) -> str:
    r"""Returns what is in the last `\boxed{...}` of an answer, or the answer itself, without dollar signs around it."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for i in range(start + 6, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                text = text[start + 7 : i]
                break
    text = text.strip().rstrip(".").strip()
    for fence in ("$$", "$"):
        if len(text) > 2 * len(fence) and text.startswith(fence) and text.endswith(fence):
            text = text[len(fence) : -len(fence)].strip()
    return text


def read_number(text: str) -> Fraction | None:
    r"""Returns the rational number that a text is, in plain or LaTeX spelling; `None` if it is none.

    Understood are integers with or without thousands separators, decimals, `a/b`, `\frac{a}{b}` and mixed numbers, a name
    before them (`x = 5`), a dollar sign, and units in `\text{...}`, which are left out.
    """
    if len(text) > MAX_DIGITS:
        return None
    text = _SPACING.sub("", text).replace("−", "-").replace("\\$", "").replace("$", "")
    text = _COMMAS.sub("", _NAMED.sub("", _UNITS.sub("", text))).strip()
    if (found := _PLAIN.fullmatch(text)) is not None:
        sign, above, other, below = found.groups()
        value = Fraction(above)
        if below is not None:
            if Fraction(below) == 0:
                return None
            value = value / Fraction(below) * (-1 if other == "-" else 1)
        return -value if sign == "-" else value
    if (found := _MIXED.fullmatch(text)) is not None and int(found[4]):
        value = int(found[2]) + Fraction(int(found[3]), int(found[4]))
        return -value if found[1] == "-" else value
    if (found := _FRACTION.fullmatch(text)) is not None:
        sign, whole, a, a_digit, b, b_digit = found.groups()
        above, below = int((a or a_digit).replace(" ", "")), int((b or b_digit).replace(" ", ""))
        if below == 0 or (whole and (above < 0 or below < 0)):
            return None
        value = Fraction(above, below) + (int(whole) if whole else 0)
        return -value if sign == "-" else value
    return None


def equivalent(answer: str, gold: str) -> bool:
    r"""Says whether an answer is the gold answer in another spelling.

    Args:
        answer: What the agent answered; what is in its last `\boxed{...}` counts, if there is one.
        gold: The right answer, plain or LaTeX.

    Rational numbers are compared exactly. What is not rational is compared by `math-verify` where it is installed (the extra
    `math`), in a sandbox and within its limits, and by its wording otherwise.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    mine, right = final_of(answer), final_of(gold)
    if mine == right:
        return True
    a, b = read_number(mine), read_number(right)
    if a is not None and b is not None:
        return a == b
    if not mine or not can_read_latex():
        return False
    return _same_mathematics(mine, right)


def can_read_latex() -> bool:
    """Says whether `math-verify` is installed."""
    return importlib.util.find_spec("math_verify") is not None


def _checker() -> Sandbox:
    return shared(LATEX_LIMITS, ("latex_equality",), (str(_CHECKER),))


@lru_cache(maxsize=4096)
def _same_mathematics(answer: str, gold: str) -> bool:
    try:
        return _checker().call("latex_equality:equal", gold, answer) is True
    except SandboxError as error:
        if error.reason == "process" and "did not start" in str(error):
            raise  # not the answer's fault
        return False


def makes_target(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Says whether an answer is an expression that makes a number from some of the numbers, each used once at most.

    Args:
        answer: Whole numbers, `+ - * /` and parentheses, with or without `= target` after them.
        numbers: What may be used.
        target: What must come out.
    """
    text = final_of(answer).replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/")
    left, equals, right = text.partition("=")
    if equals and read_number(right) != target:
        return False
    try:
        tree = parse(left)
        used = Counter(_operands(tree))
        return not used - Counter(numbers) and value_of(tree) == target
    except CalculatorError:
        return False


def _operands(node: ast.expr) -> list[int]:
    """Returns the numbers in a tree; raises `CalculatorError` for anything but whole numbers and the four operations."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [node.value]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        return _operands(node.left) + _operands(node.right)
    raise CalculatorError("only whole numbers, + - * / and parentheses may be used")
