import copy
import json
import re
import warnings
from dataclasses import replace

import gymnasium as gym
import lock_env
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from lock_env import LISTEN, OPEN, LockEnv, dial, recite

from trace_envs.env import ToolEnv
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.state import ToolCall

lock_env.register()

ACTIONS = st.one_of(st.sampled_from([dial(1), dial(-1), LISTEN, OPEN, dial(1) + LISTEN, recite(40), ""]), st.text())
SCRIPTS = st.lists(ACTIONS, max_size=6)
RUNNING = {"messages", "tools", "max_calls", "task_id", "turn", "tool_calls", "tool_errors", "tool_error"}
FINISHED = RUNNING | {"is_correct", "reward_components", "episode"}


def play(env, script):
    """Steps until the script or the episode ends; returns everything that was seen."""
    seen = []
    for action in script:
        seen.append(copy.deepcopy(env.step(action)))
        if env.unwrapped.state.done:
            break
    return seen


@pytest.mark.parametrize("render_mode", [None, "ansi"])
def test_gymnasium_finds_nothing_to_warn_of(render_mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("Lock-v0", render_mode=render_mode)
        check_env(env.unwrapped)
        env.reset(seed=0)
        play(env, [dial(1), "nonsense", OPEN])
        if render_mode:
            env.render()


def test_an_episode_from_reset_to_verdict():
    env = LockEnv()
    observation, info = env.reset(seed=0, options={"task_id": "3"})
    assert observation == "Open the lock."
    assert set(info) == RUNNING
    assert (info["task_id"], info["turn"], info["tool_calls"], info["tool_error"]) == ("3", 0, 0, False)
    assert info["tools"] == env.tool_schemas()
    assert env.step(dial(3))[:4] == ("turned by 3", 0.0, False, False)
    observation, reward, terminated, truncated, info = env.step(f"Now it opens. {OPEN}")
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    assert set(info) == FINISHED
    assert (info["turn"], info["tool_calls"], info["tool_errors"], info["tool_error"]) == (2, 1, 0, False)
    assert (info["is_correct"], info["reward_components"], info["episode"]) == (True, {"em": 1.0}, {"r": 1.0, "l": 2})
    with pytest.raises(RuntimeError, match=r"over; call reset\(\) or restore\(\)"):
        env.step(OPEN)


def test_messages_are_a_chat_with_the_agents_own_words():
    env = LockEnv(system_prompt="Be quick.")
    env.reset(seed=0)
    env.step(f"Hm. {dial(2)}")
    _, _, _, _, info = env.step("nonsense")
    assert info["messages"] == [
        {"role": "system", "content": "Be quick."},
        {"role": "user", "content": "Open the lock."},
        {"role": "assistant", "content": f"Hm. {dial(2)}"},
        {"role": "tool", "content": "turned by 2"},
        {"role": "assistant", "content": "nonsense"},
        {"role": "user", "content": env.observation()},
    ]
    assert [m["role"] for m in env.messages()] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert LockEnv(system_prompt="").reset(seed=0)[1]["messages"][0]["role"] == "user"
    default = LockEnv().reset(seed=0)[1]["messages"][0]
    assert default["role"] == "system" and "dial" in default["content"]
    for fmt in ("react", "tags"):  # these formats know no tool role
        env = LockEnv(action_format=fmt)
        env.reset(seed=0)
        env.step(env.action_format.render("", ToolCall("listen"), env.tools))
        assert env.state.tool_calls == 1 and env.messages()[-1]["role"] == "user"


def test_malformed_and_refused_actions_are_counted_and_explained():
    env = LockEnv()
    env.reset(seed=0)
    observation, _, _, _, info = env.step("no action at all")
    assert observation.startswith("Error: No action found")
    assert (info["tool_error"], info["tool_errors"], info["tool_calls"]) == (True, 1, 0)
    observation, _, _, _, info = env.step(dial(-1))
    assert observation == "Error: the dial only turns right."
    assert (info["tool_error"], info["tool_errors"], info["tool_calls"]) == (True, 2, 1)
    _, _, _, _, info = env.step(dial(1))
    assert (info["tool_error"], info["tool_errors"], info["tool_calls"], info["turn"]) == (False, 2, 2, 3)


def test_the_turn_limit_truncates_and_an_answer_in_the_last_turn_does_not():
    env = LockEnv(max_turns=2)
    env.reset(options={"task_id": "0"})
    assert env.step(LISTEN)[2:4] == (False, False)
    observation, reward, terminated, truncated, info = env.step(LISTEN)
    assert observation.startswith("click ") and (reward, terminated, truncated) == (0.0, False, True)
    assert set(info) == FINISHED and info["is_correct"] is False and info["episode"] == {"r": 0.0, "l": 2}
    env.reset(options={"task_id": "0"})
    env.step(LISTEN)
    assert env.step(OPEN)[1:4] == (1.0, True, False)


@given(SCRIPTS, st.integers(0, 2**32))
def test_flags_keys_and_counts_agree_at_every_turn(script, seed):
    env = LockEnv(max_turns=4)
    env.reset(seed=seed)
    seen = play(env, script)
    for turn, (observation, reward, terminated, truncated, info) in enumerate(seen, 1):
        over = terminated or truncated
        assert observation in env.observation_space
        assert not (terminated and truncated)
        assert over == (turn == len(seen) and env.state.done) and (over or turn < 4)
        assert set(info) == (FINISHED if over else RUNNING)
        assert info["turn"] == turn and info["tool_calls"] <= turn
        assert reward == (info["episode"]["r"] if over else 0.0)
    assert env.state.tool_errors == sum(info["tool_error"] for *_, info in seen)


@given(SCRIPTS, st.integers(0, 2**32))
def test_a_seed_fixes_the_episode(script, seed):
    env, other = LockEnv(), LockEnv()
    other.reset(seed=seed + 1)
    assert env.reset(seed=seed) == other.reset(seed=seed)
    assert play(env, script) == play(other, script)
    assert env.reset() == other.reset()


def test_the_episodes_of_a_seed_differ_from_each_other_and_from_another_seeds():
    env = LockEnv()
    env.reset(seed=0, options={"task_id": "1"})
    first = env.step(LISTEN)[0]
    again = env.step(LISTEN)[0]
    env.reset(options={"task_id": "1"})
    next_episode = env.step(LISTEN)[0]
    env.reset(seed=1, options={"task_id": "1"})
    assert len({first, again, next_episode, env.step(LISTEN)[0]}) == 4


def test_advance_changes_neither_the_state_nor_the_environment():
    env = LockEnv()
    env.reset(seed=0)
    state = env.state
    after = env.advance(state, LISTEN)
    assert env.state is state and state.turn == 0 and after.turn == 1
    assert env.advance(state, LISTEN) == after != state


def test_long_observations_are_cut_and_say_so():
    env = LockEnv(max_observation_chars=100)
    env.reset(seed=0)
    assert env.step(recite(100))[0] == "x" * 100
    assert env.step(recite(117))[0] == "x" * 100 + "\n[17 more characters were cut]"
    roomy = LockEnv(max_observation_chars=1 << 20)
    roomy.reset(seed=0)
    observation = roomy.step(recite((1 << 20) + 1))[0]
    assert observation.endswith("[1 more characters were cut]") and observation in roomy.observation_space


def test_long_actions_are_refused_unread():
    env = LockEnv(max_action_chars=100, max_turns=20)
    env.reset(seed=0)
    observation, _, _, _, info = env.step(OPEN + "x" * 100)
    assert observation == f"Error: The action is {len(OPEN) + 100} characters long; at most 100 are read."
    assert info["tool_error"] and len(info["messages"][-2]["content"]) == 100
    assert env.step(OPEN + "x" * (100 - len(OPEN)))[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action_format": "xml"}, "unknown action format 'xml'; known: hermes, react, tags"),
        ({"render_mode": "human"}, "unknown render_mode 'human'; known: ansi"),
        ({"max_turns": 0}, "max_turns must be at least 1, got 0"),
        ({"max_action_chars": 0}, "max_action_chars must be at least 1, got 0"),
        ({"max_observation_chars": -1}, "max_observation_chars must be at least 1, got -1"),
    ],
)
def test_bad_values_are_named_with_the_known_ones(arguments, message):
    with pytest.raises(ValueError) as caught:
        LockEnv(**arguments)
    assert str(caught.value) == message


def test_unknown_arguments_are_named_with_the_known_ones():
    with pytest.raises(
        TypeError, match=r"^LockEnv takes no argument 'max_turn'; known: action_format, max_action_chars, "
    ):
        LockEnv(max_turn=3)
    with pytest.raises(TypeError, match="takes no argument 'max_turn'"):
        gym.make("Lock-v0", max_turn=3)


def test_reset_refuses_what_it_does_not_know_and_leaves_the_episode_alone():
    env = LockEnv()
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(OPEN)
    env.reset(seed=0)
    env.step(dial(1))
    state, random_state = env.state, env.np_random.bit_generator.state
    with pytest.raises(ValueError, match=r"unknown reset options \['5', 'task'\]; known: \['task_id'\]"):
        env.reset(seed=3, options={"task": "1", 5: 5})
    with pytest.raises(ValueError, match="no task '10'"):
        env.reset(options={"task_id": "10"})
    assert env.state is state and env.np_random.bit_generator.state == random_state
    assert env.reset(options={})[0] == "Open the lock."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LockEnv(max_turns="3"), r"max_turns must be an integer, got '3' \(str\)"),
        (lambda: LockEnv(max_turns=True), r"max_turns must be an integer, got True \(bool\)"),
        (lambda: LockEnv(max_action_chars=1.5), r"max_action_chars must be an integer, got 1.5 \(float\)"),
        (lambda: LockEnv(system_prompt=5), "system_prompt must be a string or None, got int"),
        (lambda: MultiHopQAEnv(top_k="3"), r"top_k must be an integer, got '3' \(str\)"),
        (lambda: MultiHopQAEnv(dataset_seed=None), r"dataset_seed must be an integer, got None"),
        (lambda: MultiHopQAEnv(search_dropout="0.5"), r"search_dropout must be a number, got '0.5' \(str\)"),
        (lambda: MultiHopQAEnv(data_path=5), r"data_path must be a path or None, got 5 \(int\)"),
        (lambda: LockEnv().reset(seed="0"), r"seed must be an integer, got '0' \(str\)"),
        (lambda: LockEnv().reset(seed=1.0), r"seed must be an integer, got 1.0 \(float\)"),
        (
            lambda: LockEnv().reset(options=["task_id"]),
            r"options must be a dictionary or None, got \['task_id'\] \(list\)",
        ),
        (lambda: begun().step(None), r"step\(\) takes the agent's text \(a string\), got None \(NoneType\)"),
        (lambda: begun().step(b"open"), r"step\(\) takes the agent's text \(a string\), got b'open' \(bytes\)"),
        (lambda: begun().restore("junk"), r"expected an EnvSnapshot, as snapshot\(\) returns it, got str"),
        (lambda: begun().restore(begun().snapshot(), seed="1"), r"seed must be an integer, got '1' \(str\)"),
    ],
)
def test_a_wrong_type_is_named(make, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LockEnv(max_turns=0), "max_turns must be at least 1, got 0"),
        (lambda: MultiHopQAEnv(top_k=0), "top_k must be at least 1, got 0"),
        (lambda: LockEnv().reset(seed=-1), "seed must be a non-negative integer or None, got -1"),
        (
            lambda: begun().restore(replace(begun().snapshot(), payload=5)),
            "the snapshot's payload is a int, expected an Episode",
        ),
        (
            lambda: begun().restore(replace(begun().snapshot(), random_state={"bit_generator": "MT19937"})),
            "the snapshot's random state does not fit np_random",
        ),
    ],
)
def test_a_wrong_value_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def begun():
    env = LockEnv()
    env.reset(seed=0)
    env.step(dial(1))
    return env


def test_numbers_of_numpy_are_numbers():
    env = LockEnv(max_turns=np.int64(2))
    assert env.reset(seed=np.int64(3)) == LockEnv(max_turns=2).reset(seed=3) and type(env.max_turns) is int


def test_a_closed_environment_says_so_and_its_snapshots_live_on():
    env = begun()
    taken, twin, info = env.snapshot(), env.fork(), env.info()
    env.close()
    env.close()
    for attempt in (env.reset, env.snapshot, env.fork, env.info, lambda: env.step(OPEN), lambda: env.restore(taken)):
        with pytest.raises(
            gym.error.ClosedEnvironmentError, match=r"^this LockEnv was closed; make another environment"
        ):
            attempt()
    sibling = LockEnv()
    sibling.restore(taken)
    assert sibling.info() == twin.info() == info


def test_a_snapshot_knows_what_was_seen_and_what_it_needs():
    env = LockEnv(max_turns=2)
    env.reset(seed=0, options={"task_id": "1"})
    first = env.snapshot()
    assert (first.observation, first.turn, first.episode_return) == ("Open the lock.", 0, 0.0)
    env.step(dial(1))
    assert env.snapshot().observation == "turned by 1" and env.snapshot().config is first.config
    env.step(OPEN)
    assert env.snapshot().episode_return == 1.0
    assert first.config == {
        "action_format": "hermes",
        "max_turns": 2,
        "max_action_chars": 16_384,
        "max_observation_chars": 16_384,
    }


def test_a_snapshot_is_restored_only_into_equal_settings():
    taken = begun().snapshot()
    other = LockEnv(max_turns=7, action_format="tags")
    other.reset(seed=1)
    state = other.state
    message = (
        "the snapshot is of an environment with other settings: action_format was 'hermes' and is 'tags', max_turns was 10 and "
        "is 7; restore it into one that was made with the same arguments"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        other.restore(taken)
    assert other.state is state
    LockEnv(system_prompt="Be quick.", render_mode="ansi").restore(taken)
    for change in (
        {"top_k": 2},
        {"search_dropout": 0.5},
        {"reward": "f1"},
        {"dataset_seed": 1},
        {"split": "validation"},
    ):
        env = MultiHopQAEnv()
        env.reset(seed=0)
        MultiHopQAEnv().restore(env.snapshot())
        with pytest.raises(
            ValueError, match=rf"other settings: .*{next(iter(change)).removesuffix('_seed').removesuffix('split')}"
        ):
            MultiHopQAEnv(**change).restore(env.snapshot())


def test_data_sets_are_the_same_if_they_say_the_same(tmp_path):
    def make(name, answer="Rome"):
        question = {
            "_id": "q",
            "question": "Capital of Italy?",
            "answer": answer,
            "context": [["Italy", ["Rome is it."]]],
        }
        path = tmp_path / name
        path.write_text(
            json.dumps([question | {"supporting_facts": [["Italy", 0]], "type": "bridge", "level": "easy"}])
        )
        env = MultiHopQAEnv(dataset="hotpotqa", data_path=path)
        env.reset(seed=0)
        return env

    env = make("one.json")
    make("two.json").restore(env.snapshot())
    with pytest.raises(ValueError, match="other settings: dataset_digest was"):
        make("three.json", "Milan").restore(env.snapshot())


DRAWS = st.sampled_from(
    ["keep", "draw", "kept", "reset", "seeded", "step", "snapshot", "restore", "reseeded", "set", "peek"]
)


@given(st.lists(DRAWS, max_size=12))
@settings(max_examples=150, deadline=None)
def test_the_random_state_is_known_whoever_draws(script):
    """Snapshots must give the generator's state as it is, and restore it, however it moved meanwhile."""
    env = LockEnv()
    env.reset(seed=0)
    held, taken = [], [(env.snapshot(), copy.deepcopy(env._random.generator))]
    for i, act in enumerate(script):
        if act == "keep":
            held.append(env.np_random)
        elif act == "draw":
            env.np_random.random()
        elif act == "kept" and held:
            held[-1].random()
        elif act in ("reset", "seeded"):
            env.reset(seed=i if act == "seeded" else None)
        elif act == "step":
            env.step(LISTEN)
        elif act == "peek":
            env._np_random.bit_generator.random_raw()
        elif act == "set":
            held.append(np.random.default_rng(i))
            env.np_random = held[-1]
        elif act == "snapshot":
            taken.append((env.snapshot(), copy.deepcopy(env._random.generator)))
        elif act in ("restore", "reseeded"):
            snapshot, generator = taken[i % len(taken)]
            env.restore(snapshot, seed=i if act == "reseeded" else None)
            if act == "restore":
                assert env._random.generator.bit_generator.state == generator.bit_generator.state
        # Past every cache: the generator itself.
        assert env.snapshot().random_state == env._random.generator.bit_generator.state
        assert env.fork().np_random.bit_generator.state == env._random.generator.bit_generator.state


def test_moments_between_which_the_generator_did_not_move_share_its_record():
    env = begun()
    first = env.snapshot()
    env.step(dial(1))
    assert env.snapshot().random_state is first.random_state
    env.np_random.random()
    assert env.snapshot().random_state != first.random_state
    env.restore(first)
    assert env.snapshot().random_state == first.random_state


def test_render_writes_the_episode_down():
    env = LockEnv(render_mode="ansi")
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.render()
    env.reset(options={"task_id": "4"})
    assert env.render() == "[4] Open the lock."
    env.step(dial(4))
    env.step(OPEN)
    assert env.render() == (
        f"[4] Open the lock.\n--- turn 1\n{dial(4)}\n>>> turned by 4\n--- turn 2\n{OPEN}\n=== correct, reward 1"
    )
    silent = LockEnv()
    silent.reset(seed=0)
    assert silent.render() is None


def test_a_family_must_supply_its_parts():
    with pytest.raises(TypeError, match="abstract"):
        ToolEnv()
