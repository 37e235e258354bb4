import datetime
import decimal
import json
import pickle
import random
import subprocess
import sys

import gymnasium as gym
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trace_envs
from agents.cli import main
from trace_envs.state import ToolCall
from trace_envs.tool_use import ToolUseEnv
from trace_envs.tool_use.bfcl import data
from trace_envs.tool_use.bfcl.graph import freeze, thaw

pytest.importorskip("bfcl_eval", reason=f"bfcl-eval is not installed: {data.INSTALL}")
CATEGORIES = data.CATEGORIES


def make(category="multi_turn_base", split="all", **kwargs):
    return ToolUseEnv(suite="bfcl-v4", category=category, split=split, system_prompt="", **kwargs)


def follow(env, rng, noise=0.0):
    while not env.state.done:
        env.step(env.write(*env.oracle(env.state, rng, noise)))
    return env.state.outcome


@pytest.mark.parametrize("action_format", ["hermes", "react", "tags"])
@pytest.mark.parametrize("category", CATEGORIES)
def test_the_oracle_solves_every_task(category, action_format):
    env = make(category, action_format=action_format)
    rng = np.random.default_rng(0)
    assert len(env.task_ids()) == 200
    for i, task_id in enumerate(env.task_ids()):
        env.reset(seed=0, options={"task_id": task_id})
        assert follow(env, rng, noise=0.2 * (i % 2)).is_correct, task_id


def test_the_agreement_benchmark(tmp_path):
    from benchmarks import bfcl_agreement

    assert bfcl_agreement.main(bfcl_agreement.Args(quick=True, seed=1, output=tmp_path))


def test_the_agreement_benchmark_notices_a_wrong_verdict(tmp_path, monkeypatch):
    from benchmarks import bfcl_agreement

    monkeypatch.setattr(bfcl_agreement, "ours", lambda env, task, turns: True)
    assert not bfcl_agreement.main(bfcl_agreement.Args(quick=True, output=tmp_path))


@pytest.mark.parametrize("category", CATEGORIES)
def test_snapshots_are_exact(category):
    env = gym.make("TraceToolUse-v0", suite="bfcl-v4", category=category, disable_env_checker=True)
    assert trace_envs.check_snapshot(env, turns=6, episodes=2).passed


def test_splits_do_not_share_a_conversation():
    index = {s: {int(i.rsplit("_", 1)[1]) for c in CATEGORIES for i in make(c, s).task_ids()} for s in data.SPLITS}
    assert index["train"] | index["validation"] == set(range(160)) and index["test"] == set(range(160, 200))
    assert not index["train"] & index["validation"] and index["all"] == set(range(200))


def test_a_mid_task_snapshot_goes_on_in_another_environment():
    env, other = make("multi_turn_long_context"), make("multi_turn_long_context")
    rng = np.random.default_rng(0)
    for task_id in env.task_ids()[::23]:
        env.reset(seed=0, options={"task_id": task_id})
        for _ in range(3):
            env.step(env.write(*env.oracle(env.state, rng)))
        snap = env.snapshot()
        end = follow(env, rng)
        for copy in (snap, pickle.loads(pickle.dumps(snap)), trace_envs.EnvSnapshot.from_bytes(snap.to_bytes())):
            assert copy.digest == snap.digest
            other.restore(copy)
            assert other.state == snap.payload
            assert follow(other, rng) == end and other.state == env.state


def test_branches_do_not_touch_each_other():
    env = make()
    env.reset(seed=0, options={"task_id": "multi_turn_base_0"})
    start = env.state
    one = env.advance(start, env.action_format.render("", ToolCall("mkdir", {"dir_name": "zz9"})))
    two = env.advance(start, env.action_format.render("", ToolCall("ls", {})))
    assert "zz9" not in two.history.turn.observation and start == env.state
    assert one.world.simulators["TwitterAPI"] is start.world.simulators["TwitterAPI"]
    assert one.world.simulators["GorillaFileSystem"] != start.world.simulators["GorillaFileSystem"]
    assert two.world.simulators is start.world.simulators


def test_held_back_functions_are_offered_in_time():
    env = make("multi_turn_miss_func")
    env.reset(seed=0, options={"task_id": "multi_turn_miss_func_0"})
    rng = np.random.default_rng(0)
    offered = []
    while not env.state.done:
        offered.append("sort" in {t["function"]["name"] for t in env.info()["tools"]})
        env.step(env.write(*env.oracle(env.state, rng)))
    assert offered == sorted(offered) and not offered[0] and offered[-1]
    given = next(m["content"] for m in env.messages() if "I have updated some more functions" in m["content"])
    assert json.loads(given.split("\n")[0])["name"] == "sort"
    full = ToolUseEnv(suite="bfcl-v4", category="multi_turn_miss_func", split="all")
    _, info = full.reset(seed=0, options={"task_id": "multi_turn_miss_func_0"})
    assert '"sort"' not in info["messages"][0]["content"] and '"mkdir"' in info["messages"][0]["content"]


def test_too_many_steps_in_one_user_turn_end_the_episode():
    env = make(max_turns=100)
    env.reset(seed=0, options={"task_id": "multi_turn_base_0"})
    for _ in range(20):
        _, _, terminated, truncated, _ = env.step(env.action_format.render("", ToolCall("pwd", {})))
        assert not terminated and not truncated
    _, reward, terminated, truncated, info = env.step(env.action_format.render("", ToolCall("pwd", {})))
    assert truncated and not terminated and reward == 0.0 and not info["is_correct"]


def test_what_a_model_writes_is_never_evaluated():
    env = make()
    env.reset(seed=0, options={"task_id": "multi_turn_base_0"})
    for name in ("__init__", "_load_scenario", "eval", "kill", "__class__"):
        env.step(env.action_format.render("", ToolCall(name, {})))
        assert "Unknown tool" in env.observation()
    env.step(env.action_format.render("", ToolCall("cd", {"folder": "__import__('os').system('true')"})))
    assert "No such file or directory" in env.observation()
    env.step(env.action_format.render("", ToolCall("mkdir", {"nonsense": 1})))
    assert env.observation().startswith("Error during execution:")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (ToolCall("round_number", {"number": 10**30, "decimal_places": -(2**63)}), "decimal_places must be at most"),
        (ToolCall("logarithm", {"value": 2.0, "base": 10, "precision": 10**12}), "precision must be at most"),
        (ToolCall("square_root", {"number": 2, "precision": 10**12}), "precision must be at most"),
        (ToolCall("power", {"base": 10**30, "exponent": 10**6}), "too large"),
        (ToolCall("power", {"base": 10.0, "exponent": 10**6}), "Numerical result out of range"),
        (ToolCall("multiply", {"a": 10**4000, "b": 10**4000}), "integer string conversion"),
    ],
)
def test_calculations_that_would_not_end_are_errors(call, words):
    env = make(split="all")
    task = next(t for t in map(env.suite.task, env.task_ids()) if "MathAPI" in t.classes)
    env.reset(options={"task_id": task.task_id})
    precision = mpmath.mp.dps, decimal.getcontext().prec
    env.step(env.action_format.render("", call))
    assert words in env.observation() and env.info()["tool_error"]
    env.step(env.action_format.render("", ToolCall("logarithm", {"value": 8, "base": 2, "precision": 40})))
    assert env.observation() == "{'result': mpf('3.0')}", "in the words of the official harness"
    assert (mpmath.mp.dps, decimal.getcontext().prec) == precision


def test_time_stands_still():
    from trace_envs.tool_use.bfcl.simulators import NOW, simulator_class

    system = simulator_class("GorillaFileSystem")()
    system._load_scenario({})
    system.touch("a")
    assert system.root.contents["a"]._last_modified == NOW


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a.b(1)",
        "a(b)",
        "a(*b)",
        "a(**b)",
        "a(x=b())",
        "__import__('os').system('x')",
        "a(1",
        "(" * 500,
        "a(1)\nb()",
    ],
)
def test_only_calls_with_literals_are_read(text):
    with pytest.raises(ValueError, match="cannot be read as a call"):
        data.parse_call(text)


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3)
            ),
            max_leaves=12,
        ),
        max_size=4,
    )
)
@settings(deadline=None)
def test_graphs_keep_values_types_and_order(attributes):
    graph = freeze(attributes, {})
    again = thaw(graph, {})
    assert repr(again) == repr(attributes)
    assert freeze(again, {}, graph) is graph
    assert freeze(again, {}) == graph and hash(graph) == hash(freeze(again, {}))


class Item:
    def __init__(self, name):
        self.name, self.parent, self.inside = name, None, []


def test_graphs_keep_sharing_cycles_and_generators():
    child, parent = Item("child"), Item("parent")
    child.parent, parent.inside = parent, [child]
    rng, shared = random.Random(3), {"a": 1}
    rng.random()
    now = datetime.datetime(2024, 1, 2)
    attributes = {
        "root": parent,
        "here": child,
        "rng": rng,
        "x": shared,
        "y": [shared],
        "set": {3, 1},
        "at": now,
        "t": (1, [2]),
    }
    graph = freeze(attributes, {"Item": Item})
    again = thaw(graph, {"Item": Item})
    assert again["root"].inside[0] is again["here"] and again["here"].parent is again["root"] is not parent
    assert again["x"] is again["y"][0] and again["set"] == {1, 3} and again["at"] == now and again["t"] == (1, [2])
    assert [again["rng"].random() for _ in range(3)] == [rng.random() for _ in range(3)]
    again["x"]["a"] = True
    assert (
        freeze(again, {"Item": Item}, graph) != graph
        or type(thaw(freeze(again, {"Item": Item}, graph), {"Item": Item})["x"]["a"]) is bool
    )
    with pytest.raises(TypeError, match="holds a Item"):
        freeze(attributes, {})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"category": "base"}, "unknown category 'base' of bfcl-v4; known: multi_turn_base"),
        ({"split": "dev"}, "unknown split 'dev' of bfcl-v4; known: train, validation, test, all"),
        ({"dataset_seed": 1}, "dataset_seed must be 0, got 1"),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(ValueError, match=error):
        make(**arguments)


def test_a_task_of_another_split_is_named_as_such():
    with pytest.raises(ValueError, match="it is of another split"):
        make(split="test").reset(options={"task_id": "multi_turn_base_0"})


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    data.load_category.cache_clear()
    data.function_schemas.cache_clear()
    words = ["evaluate", "--env-id", "TraceToolUse-v0", "--suite", "bfcl-v4", "--category", "multi_turn_miss_param"]
    try:
        assert main([*words, "--split", "validation"]) == 2
    finally:
        data.load_category.cache_clear()
    assert "pip install --no-deps bfcl-eval" in capsys.readouterr().err


def test_a_damaged_file_is_named(monkeypatch, tmp_path):
    folder = tmp_path / "data"
    (folder / "possible_answer").mkdir(parents=True)
    (folder / "possible_answer" / "BFCL_v4_multi_turn_base.json").write_text('{"id": "a", "ground_truth": []}\n{"id"')
    monkeypatch.setattr(data, "package_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"BFCL_v4_multi_turn_base.json, line 2"):
        data.load_category.__wrapped__("multi_turn_base")


def test_evaluate_from_the_command_line(capsys, tmp_path):
    words = [
        "--suite",
        "bfcl-v4",
        "--category",
        "multi_turn_base",
        "--agent",
        "oracle",
        "--output",
        str(tmp_path / "o.json"),
    ]
    assert main(["evaluate", "--env-id", "TraceToolUse-v0", *words]) == 0
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["eval/accuracy"] == 1.0 and record["eval/questions"] == 40
    capsys.readouterr()


def test_heavy_modules_of_the_package_are_not_imported():
    code = (
        "import sys; from trace_envs.tool_use import ToolUseEnv; ToolUseEnv(suite='bfcl-v4').reset(seed=0); "
        "print([m for m in sys.modules if m.startswith('bfcl_eval') and 'func_source_code' not in m])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "model_handler" not in found.stdout and "constants" not in found.stdout
