"""Generated problems: solvable by their own way, apart by split, and harder by level."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from trace_envs.math_reasoning import MathEnv, evaluate, make_problem
from trace_envs.math_reasoning.answers import makes_target
from trace_envs.math_reasoning.problems import CATEGORIES, LEVELS, SPLITS


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("action_format", ["hermes", "react", "tags"])
def test_the_oracle_solves_every_problem(split: str, action_format: str) -> None:
    env = MathEnv(split=split, action_format=action_format)
    rng = np.random.default_rng(0)
    for i, task_id in enumerate(env.task_ids()[:600]):
        env.reset(seed=0, options={"task_id": task_id})
        while not env.state.done:
            env.step(env.write(*env.oracle(env.state, rng, noise=0.2 * (i % 2))))
        assert env.state.outcome is not None and env.state.outcome.is_correct, task_id


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_problem_is_in_two_splits(category: str) -> None:
    def essence(task) -> object:
        return (sorted(task.numbers), task.target) if task.target is not None else task.prompt

    seen = {
        split: {str(essence(make_problem(0, split, category, level, i))) for level in LEVELS for i in range(100)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]
    # At level 1 there are not many; from level 2 on hardly any comes twice.
    assert all(len(found) > 400 for found in seen.values()), {s: len(f) for s, f in seen.items()}


def test_problems_are_functions_of_their_names() -> None:
    assert make_problem(0, "train", "word", 3, 7) == make_problem(0, "train", "word", 3, 7)
    assert make_problem(1, "train", "word", 3, 7) != make_problem(0, "train", "word", 3, 7)


@pytest.mark.parametrize("level", LEVELS)
def test_word_problems_need_as_many_steps_as_their_level(level: int) -> None:
    for i in range(50):
        task = make_problem(0, "train", "word", level, i)
        assert len(task.steps) == level
        assert evaluate(task.steps[-1].text) == Fraction(task.answer)
        for step in task.steps:
            value = evaluate(step.text)
            assert value.denominator == 1 and value >= 1


@pytest.mark.parametrize("level", LEVELS[:3])
def test_small_countdowns_are_solvable_as_an_exhaustive_search_says(level: int) -> None:
    for i in range(25):
        task = make_problem(0, "test", "countdown", level, i)
        assert makes_target(task.answer, task.numbers, task.target)
        assert Fraction(task.target) in _reachable(tuple(Fraction(n) for n in task.numbers))


def _reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Returns all that can be made of some of the numbers."""
    found = set(numbers)
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        a, b = numbers[i], numbers[j]
        for value in (a + b, a - b, a * b, *((a / b,) if b else ())):
            found |= _reachable((value, *rest))
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_equations_hold_for_their_answers_only(level: int) -> None:
    for i in range(40):
        task = make_problem(0, "validation", "linear", level, i)
        text = task.prompt.removeprefix("Solve ").removesuffix(" for x.")
        if level == 6:
            continue
        left, right = text.split(" = ")
        for shift in (0, 1):
            value = Fraction(task.answer) + shift
            sides = [
                side.replace(" x", f" * ({value})").replace(" (", " * (").replace("* * (", "* (")
                for side in (left, right)
            ]
            sides = [side.replace("x", f"({value})") for side in sides]
            assert (evaluate(sides[0]) == evaluate(sides[1])) is (shift == 0), (text, sides)
        if level == 5:
            assert Fraction(task.answer).denominator > 1


def test_remainders_by_brute_force() -> None:
    for i in range(40):
        task = make_problem(0, "train", "modular", 4, i)
        words = task.prompt.replace("(", " ").replace(")", " ").replace("?", "").split()
        a, b, m = int(words[words.index("with") + 1]), int(words[words.index("=") + 1]), int(words[-1])
        assert [x for x in range(m) if a * x % m == b] == [int(task.answer)]


def test_levels_and_categories_can_be_chosen() -> None:
    env = MathEnv(category="linear", levels=[2, 5], split="test")
    assert Counter(task_id.rsplit("-", 1)[0] for task_id in env.task_ids()) == {"linear-2": 25, "linear-5": 25}
    assert {env.level_of(env.pick_task(np.random.default_rng(0), i)) for i in env.task_ids()} == {2, 5}
