"""The calculator: exact, bounded, and nothing but arithmetic."""

from __future__ import annotations

import ast
import warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_envs.math_reasoning.calculator import MAX_CHARS, CalculatorError, evaluate, show_number


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 ** 10 - 24", 1000),
        ("2^3^2", 512),
        ("-3 ** 2", -9),
        ("7 / 3", Fraction(7, 3)),
        ("0.1 + 0.2", Fraction(3, 10)),
        (".5 * 4", 2),
        ("-7 // 2", -4),
        ("-7 % 3", 2),
        ("7.5 % 2", Fraction(3, 2)),
        ("3 × 4 ÷ 6 − 1", 1),
        ("$12 + $3.50", Fraction(31, 2)),
        ("[2 + 3] * 2", 10),
        ("2 ** -2", Fraction(1, 4)),
        ("sqrt(9/4)", Fraction(3, 2)),
        ("gcd(12, 18) + lcm(4, 6)", 18),
        ("max(1, 2/3, 0) - min(4, 3)", -2),
        ("floor(7/2) + ceil(7/2) + abs(-1)", 8),
        ("round(2.567, 2)", Fraction(257, 100)),
        ("factorial(5) + comb(5, 2) + perm(5, 2)", 150),
        ("pow(7, 222, 11)", pow(7, 222, 11)),
        ("pow(3, -1, 7) * 4 % 7", 6),
        ("12345678901234567890 * 98765432109876543210", 12345678901234567890 * 98765432109876543210),
        ("\n 1\t+\n1 ", 2),
    ],
)
def test_values_are_exact(expression: str, value: Fraction | int) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("1 +", "not a complete expression"),
        ("(1", "not a complete expression"),
        ("1 2", "not a complete expression"),
        ("1 / 0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("x + 1", "'x' has no value"),
        ("print(1)", "unknown function 'print'"),
        ("__import__('os')", "cannot read"),
        ("(1).real", "cannot read"),
        ("1_000", "cannot read"),
        ("0x10", "cannot read"),
        ("1e999", "cannot read"),
        ("1if 1else 2", "cannot read"),
        ("x := 3", "cannot read"),
        ("a = 3", "cannot read"),
        ("'a'", "cannot read"),
        ("1 < 2", "cannot read"),
        ("lambda: 1", "cannot read"),
        ("1 if 1 else 2", "only numbers"),
        ("1 and 2", "only numbers"),
        ("(1, 2)", "only numbers"),
        ("gcd(*(1, 2))", "only numbers"),
        ("2 ** 0.5", "exponent takes whole numbers"),
        ("sqrt(2)", "not rational"),
        ("sqrt(-4)", "not real"),
        ("9 ** 9 ** 9", "too large"),
        ("2 ** 99999", "too large"),
        ("factorial(1001)", "0 to 1000"),
        ("comb(10000, 5000)", "0 to 1000"),
        ("pow(2, 3, 0)", "pow:"),
        ("pow(2, -1, 4)", "pow:"),
        ("gcd(1/2, 3)", "gcd takes whole numbers, got 0.5"),
        ("abs(1, 2)", "abs takes 1 arguments"),
        ("1" * (MAX_CHARS + 1), "use at most 400"),
        ("(" * 200, "not a complete expression"),
        ("-" * 399 + "1", None),
    ],
)
def test_anything_else_is_refused_with_a_reason(expression: str, message: str | None) -> None:
    if message is None:
        assert evaluate(expression) == -1
        return
    with pytest.raises(CalculatorError, match=message.replace("(", r"\(")):
        evaluate(expression)


numbers = st.integers(0, 99).map(str) | st.decimals(0, 99, places=2).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})"
    ),
    max_leaves=8,
)


@given(expressions)
def test_it_agrees_with_python_on_fractions(expression: str) -> None:
    """Against the obvious slow way: Python's own evaluation with every number wrapped in a Fraction."""
    if len(expression) > MAX_CHARS:
        return

    class Wrap(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.AST:
            text = ast.get_source_segment(expression, node)
            return ast.Call(ast.Name("Fraction", ast.Load()), [ast.Constant(text)], [])

        def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
            self.generic_visit(node)
            # Fraction // Fraction is an int, and int / int would be a float.
            return ast.Call(ast.Name("Fraction", ast.Load()), [node], [])

    tree = ast.fix_missing_locations(Wrap().visit(ast.parse(expression, mode="eval")))
    try:
        wanted = eval(compile(tree, "<wanted>", "eval"), {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(CalculatorError, match="division by zero"):
            evaluate(expression)
        return
    assert evaluate(expression) == wanted


@settings(max_examples=500)
@given(st.text(max_size=80) | st.text(alphabet="0123456789+-*/%().,^ abcdefghinmopqrstuvw$[]", max_size=120))
def test_whatever_is_written_it_answers_or_refuses(expression: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            value = evaluate(expression)
        except CalculatorError:
            return
    assert isinstance(value, Fraction)


@given(st.fractions())
def test_a_number_that_is_shown_reads_as_itself(value: Fraction) -> None:
    if len(show_number(value)) < MAX_CHARS:
        assert evaluate(show_number(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(7), "7"),
        (Fraction(1, 2), "0.5"),
        (Fraction(-1, 8), "-0.125"),
        (Fraction(-5, 2), "-2.5"),
        (Fraction(1, 3), "1/3"),
        (Fraction(-22, 7), "-22/7"),
        (Fraction(1, 2**13), f"1/{2**13}"),
        (Fraction(1, 100), "0.01"),
    ],
)
def test_numbers_are_shown_exactly(value: Fraction, text: str) -> None:
    assert show_number(value) == text
