"""The environment: tools, branches, snapshots, data files, and what it refuses."""

from __future__ import annotations

import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trace_envs
from trace_envs.conversation import text_of
from trace_envs.math_reasoning import MathEnv, load_problems
from trace_envs.math_reasoning.env import TOOLS
from trace_envs.records import DataFormatError
from trace_envs.state import FinalAnswer, ToolCall

ENV_ID = "TraceMath-v0"
FORMATS = ("hermes", "react", "tags")


def python(env: MathEnv, code: str) -> str:
    env.step(env.action_format.render("", ToolCall("python", {"code": code})))
    return env.observation()


def calculate(env: MathEnv, expression: str) -> str:
    env.step(env.action_format.render("", ToolCall("calculator", {"expression": expression})))
    return env.observation()


def begin(**arguments) -> MathEnv:
    env = MathEnv(**arguments)
    env.reset(seed=0)
    return env


@pytest.mark.parametrize("action_format", FORMATS)
def test_it_is_an_environment_like_any_other(action_format):
    env = gym.make(ENV_ID, action_format=action_format, disable_env_checker=True)
    check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("category", ["word", "modular"])
def test_snapshots_are_exact(category):
    report = trace_envs.check_snapshot(gym.make(ENV_ID, category=category, disable_env_checker=True))
    assert report.passed


@pytest.mark.parametrize("make", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_vectors(make):
    envs = make([lambda: gym.make(ENV_ID, split="test")] * 2)
    first, _ = envs.reset(seed=3)
    again, _ = envs.reset(seed=3)
    assert first == again
    call = '<tool_call>{"name": "python", "arguments": {"code": "6 * 7"}}</tool_call>'
    observations, *_ = envs.step((call, call))
    assert list(observations) == ["42", "42"]
    envs.close()


def test_cells_stay_from_turn_to_turn_and_branches_share_nothing():
    env = begin()
    python(env, "import math\nseen = [math.comb(5, 2)]")
    trunk = env.snapshot()
    assert python(env, "seen.append('left')\nseen") == "[10, 'left']"
    left = env.snapshot()
    env.restore(trunk)
    assert python(env, "seen.append('right')\nseen") == "[10, 'right']"
    env.restore(left)
    assert python(env, "seen") == "[10, 'left']"
    env.restore(trunk)
    assert python(env, "seen") == "[10]"
    other = trace_envs.fork(env)
    assert python(other.unwrapped, "seen * 2") == "[10, 10]"


def test_a_snapshot_goes_through_bytes_to_another_environment():
    env = begin(split="test")
    python(env, "x = 20")
    data = env.snapshot().to_bytes()
    there = MathEnv(split="test")
    there.reset(seed=9)
    there.restore(trace_envs.EnvSnapshot.from_bytes(data))
    assert python(there, "x + 1") == "21"
    assert pickle.loads(pickle.dumps(there.state)) == there.state


def test_what_fails_is_kept_as_python_keeps_it_and_what_is_ended_is_undone():
    env = begin(python_limits={"cpu_seconds": 1, "wall_seconds": 1})
    assert python(env, "x = 1\n1 / 0") == "line 2: ZeroDivisionError: division by zero"
    assert env.info()["tool_error"]
    assert python(env, "x") == "1", "an exception ends a cell, what came before it stays"
    shown = python(env, "x = 2\nwhile True: pass")
    assert "it took too long (at most 1 seconds" in shown and shown.endswith("Nothing of this cell is kept.")
    assert python(env, "x") == "1"
    assert python(env, "y = 3") == "(no output)"
    assert len(env.state.world.ran) == 4


def test_calculator_is_exact_and_explains():
    env = begin()
    assert calculate(env, "0.1 + 0.2 - 1/3") == "-1/30"
    assert not env.info()["tool_error"]
    assert calculate(env, "x + 1").startswith("Error: 'x' has no value here")
    assert env.info()["tool_error"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["x += 1", "x = x * 2", "del x", "print(x)", "x", "import random; x = random.random()", "1 / 0"]
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 5),
)
def test_a_branch_sees_what_an_unbroken_episode_sees(cells, at):
    """From any turn: restore, go on, and every observation is the one of the episode that was never left."""
    env = begin(max_turns=20)
    python(env, "x = 1")
    snapshots, seen = [env.snapshot()], []
    for cell in cells:
        seen.append(python(env, cell))
        snapshots.append(env.snapshot())
    at = min(at, len(cells))
    other = MathEnv(max_turns=20)
    other.reset(seed=1)
    other.restore(snapshots[at])
    assert [python(other, cell) for cell in cells[at:]] == seen[at:]
    assert other.state == env.state


def test_tools_can_be_left_out():
    env = begin(tool_names=["calculator"])
    assert [tool["function"]["name"] for tool in env.info()["tools"]] == ["calculator"]
    env.step('<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>')
    assert "python" in env.observation() and env.info()["tool_error"]
    bare = begin(tool_names=[])
    bare.step(f"<answer>{bare.state.task.answer}</answer>")
    assert bare.state.outcome.is_correct


def test_the_oracle_without_the_tool_still_answers():
    env = MathEnv(category="modular", levels=[6], tool_names=["calculator"], split="test")
    env.reset(seed=0)
    assert env.oracle(env.state, np.random.default_rng(0)) == ("", FinalAnswer(env.state.task.answer))


def test_installed_modules_can_be_lent():
    env = begin(python_modules=["sympy"])
    assert python(env, "import sympy\nsympy.factorint(360)") == "{2: 3, 3: 2, 5: 1}"
    assert "ModuleNotFoundError" in python(begin(), "import sympy")


def test_a_module_that_is_not_installed_is_named():
    from trace_envs.sandbox import SandboxError

    with pytest.raises(SandboxError, match="no_such_module"):
        python(begin(python_modules=["no_such_module"]), "1")


def test_running_out_of_turns_is_wrong():
    env = begin(max_turns=2)
    calculate(env, "1")
    calculate(env, "1")
    assert env.state.truncated and not env.state.outcome.is_correct


def test_tools_and_prompt_say_what_there_is():
    env = begin(render_mode="ansi")
    system = env.messages()[0]["content"]
    assert all(name in system for name in TOOLS)
    calculate(env, "2 + 3")
    assert ">>> 5" in env.render()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dataset": "aime"}, ValueError, "unknown dataset 'aime'; known: synthetic, gsm8k, deepscaler, math"),
        ({"category": "geometry"}, ValueError, "unknown category 'geometry'.*word, countdown, modular, linear, all"),
        ({"split": "dev"}, ValueError, "unknown split 'dev'.*train, validation, test"),
        ({"levels": [7]}, ValueError, "unknown level 7.*1 to 6"),
        ({"levels": 3}, TypeError, "levels must be a list"),
        ({"levels": ["1"]}, TypeError, "levels"),
        ({"tool_names": "python"}, TypeError, "tool_names must be a list"),
        ({"tool_names": ["sage"]}, ValueError, "unknown tool 'sage'; known: calculator, python"),
        ({"python_limits": {"seconds": 1}}, ValueError, "unknown limit 'seconds'.*cpu_seconds"),
        ({"python_limits": {"cpu_seconds": -1}}, ValueError, "cpu_seconds must be positive"),
        ({"python_limits": 3}, TypeError, "python_limits must be a dictionary"),
        ({"data_path": "x.json"}, ValueError, "takes? no data_path"),
        (
            {"dataset": "gsm8k", "data_path": "nowhere.jsonl"},
            FileNotFoundError,
            "data_path: there is no file 'nowhere.jsonl'",
        ),
        ({"dataset": "gsm8k", "data_path": "x", "category": "word"}, ValueError, "not divided into categories"),
        ({"dataset": "gsm8k", "data_path": 3}, TypeError, "data_path must be a path"),
        ({"top_k": 3}, TypeError, "takes no argument 'top_k'; known: .*python_limits"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, error, message):
    with pytest.raises(error, match=message):
        MathEnv(**arguments)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("dataset", "row", "message"),
    [
        ("gsm8k", {"question": "1+1?"}, "record 1, field 'answer': expected a non-empty string, the field is missing"),
        ("gsm8k", {"question": "1+1?", "answer": "It is 2."}, "expected a solution that ends in '#### answer'"),
        ("gsm8k", {"answer": "#### 2"}, "field 'question'"),
        ("deepscaler", {"problem": "p"}, "field 'answer': expected a non-empty string, the field is missing"),
        ("deepscaler", {"problem": "p", "answer": "1", "difficulty": "hard"}, "field 'difficulty': expected a number"),
        ("math", {"problem": "p", "solution": "so 3"}, r"expected a solution with a \\boxed answer"),
        ("math", {"problem": "p", "answer": "3", "level": "hard"}, "such as 'Level 3'"),
        ("math", {"problem": " ", "answer": "3"}, "field 'problem'"),
        ("deepscaler", {"problem": "p", "answer": None}, "holds no record"),
    ],
)
def test_malformed_records_are_named(dataset, row, message, tmp_path):
    with pytest.raises(DataFormatError, match=message):
        load_problems(dataset, data_path=write(tmp_path / "x.jsonl", [row]))


def test_math_files_in_their_shapes(tmp_path):
    rows = [
        {"problem": "a", "solution": r"so $\boxed{\frac{1}{2}}$.", "level": "Level 3", "type": "Algebra"},
        {"problem": "b", "solution": r"thus \boxed 7.", "level": "Level ?", "type": "Geometry"},
        {
            "problem": "c",
            "solution": "s",
            "answer": "12",
            "level": 5,
            "subject": "Precalculus",
            "unique_id": "t/1.json",
        },
    ]
    tasks = load_problems("math", data_path=write(tmp_path / "m.jsonl", rows)).tasks
    assert [t.answer for t in tasks] == [r"\frac{1}{2}", "7", "12"]
    assert [t.level for t in tasks] == [3, 0, 5]
    assert tasks[2].task_id == "t/1.json"
    with pytest.raises(ValueError, match=r"no problem of math has a level of \[4\]; there are 0, 3, 5"):
        load_problems("math", data_path=str(tmp_path / "m.jsonl"), levels=(4,))
    with pytest.raises(DataFormatError, match="'x' came before"):
        load_problems(
            "deepscaler", data_path=write(tmp_path / "d.jsonl", [{"id": "x", "problem": "p", "answer": 1}] * 2)
        )


def test_a_data_set_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="pass data_path"):
        load_problems("gsm8k", split="nonsense")


@pytest.mark.data
@pytest.mark.parametrize(
    ("dataset", "file", "count"),
    [("gsm8k", "gsm8k/train.jsonl", 7473), ("deepscaler", "deepscaler/math_train.json", 7470)],
)
def test_the_oracle_on_real_data(dataset, file, count, data_dir):
    env = MathEnv(dataset=dataset, data_path=str(data_dir / file))
    ids = env.task_ids()
    assert len(ids) == count
    rng, calls = np.random.default_rng(0), 0
    for task_id in ids[::8]:
        env.reset(seed=0, options={"task_id": task_id})
        while not env.state.done:
            env.step(env.write(*env.oracle(env.state, rng)))
        assert env.state.outcome.is_correct, text_of(env.state)
        calls += env.state.tool_calls
    assert (calls > 1000) is (dataset == "gsm8k")
