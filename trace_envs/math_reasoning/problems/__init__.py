"""Generated problems: word problems, countdown, modular arithmetic and linear equations, each in six levels."""

from trace_envs.math_reasoning.problems.generate import (
    CATEGORIES,
    LEVELS,
    SPLITS,
    GeneratedProblems,
    generated_problems,
    make_problem,
)

__all__ = ["CATEGORIES", "LEVELS", "SPLITS", "GeneratedProblems", "generated_problems", "make_problem"]
