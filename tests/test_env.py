import copy
import warnings

import gymnasium as gym
import lock_env
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from lock_env import LISTEN, OPEN, LockEnv, dial, recite

from trace_envs.env import ToolEnv
from trace_envs.state import ToolCall

lock_env.register()

ACTIONS = st.one_of(st.sampled_from([dial(1), dial(-1), LISTEN, OPEN, dial(1) + LISTEN, recite(40), ""]), st.text())
SCRIPTS = st.lists(ACTIONS, max_size=6)
RUNNING = {"messages", "tools", "task_id", "turn", "tool_calls", "tool_errors", "tool_error"}
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
