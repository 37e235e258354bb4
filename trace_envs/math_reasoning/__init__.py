"""Mathematics with a calculator and a sandboxed Python: `TraceMath-v0`."""

from trace_envs.math_reasoning.answers import equivalent, makes_target, read_number
from trace_envs.math_reasoning.calculator import CalculatorError, evaluate
from trace_envs.math_reasoning.env import MathEnv
from trace_envs.math_reasoning.problems import generated_problems, make_problem
from trace_envs.math_reasoning.readers import load_problems
from trace_envs.math_reasoning.records import MathTask

__all__ = [
    "CalculatorError",
    "MathEnv",
    "MathTask",
    "equivalent",
    "evaluate",
    "generated_problems",
    "load_problems",
    "make_problem",
    "makes_target",
    "read_number",
]
