"""Episodes played in order to check snapshots: what to do, what came, and what can be seen of an environment from outside.

Invariant: nothing here changes an environment but by `reset` and `step`, and nothing that is kept of an episode changes when
the environment goes on.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import PassiveEnvChecker, RecordEpisodeStatistics, TimeLimit

from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.record import EnvSnapshot, Snapshotable, SnapshotUnsupportedError
from trace_envs.snapshots.stack import snapshot
from trace_envs.state import FinalAnswer, ToolCall

Actions = Callable[[np.random.Generator, Any, dict[str, Any]], Any]

# What wrappers of Gymnasium keep that is no part of a moment.
_RECORDS = {"episode_count", "episode_start_time", "time_queue", "return_queue", "length_queue"}
_FRAMES = {"frame_list", "render_history", "recorded_frames", "recording", "step_id", "episode_id", "_video_name"}
_NO_PART_OF_A_MOMENT = _RECORDS | _FRAMES | {"window", "clock", "_cached_spec"}


class Step(NamedTuple):
    """What one step gave, copied; clocks are left out of the info."""

    observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: dict[str, Any]

    @property
    def over(self) -> bool:
        """Whether the episode ended here."""
        return bool(self.terminated or self.truncated)


@dataclass(frozen=True, slots=True)
class Moment:
    """A snapshot, and what could be seen from outside when it was taken.

    Attributes:
        taken: The snapshot.
        digest: Its digest at that time; `None` if part of it is no plain data.
        no_digest: What is no plain data then.
        wrappers: For each of Gymnasium's own wrappers in the stack: class name and attributes.
        random_state: State of the environment's `np_random`, if it has one.
    """

    taken: EnvSnapshot
    digest: str | None
    no_digest: str
    wrappers: list[tuple[str, dict[str, Any]]]
    random_state: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Episode:
    """An episode as it was played, without a restore.

    Attributes:
        seed: Seed of its reset.
        first: Observation and info that the reset returned.
        actions: The actions.
        steps: What each of them gave.
        moments: The moment before each of them.
    """

    seed: int
    first: tuple[Any, dict[str, Any]]
    actions: list[Any]
    steps: list[Step]
    moments: list[Moment]

    def seen(self, turn: int) -> tuple[Any, dict[str, Any]]:
        """Returns the observation and the info at a turn."""
        return (self.steps[turn - 1].observation, self.steps[turn - 1].info) if turn else self.first


def moment_of(env: gym.Env) -> Moment:
    """Takes a snapshot and looks at the environment from outside."""
    taken = snapshot(env)
    digest, reason = None, ""
    try:
        digest = taken.digest
    except SnapshotUnsupportedError as error:
        reason = str(error)
    return Moment(taken, digest, reason, wrapper_attributes(env), random_state(env))


def state_difference(a: EnvSnapshot, b: EnvSnapshot) -> str:
    """Returns where the states of two snapshots differ first."""
    mine, other = a.state(), b.state()
    found = {name: difference(value, other[name]) for name, value in mine.items()}
    return next(
        (joined(name, where) for name, where in found.items() if where is not None), "nothing that can be named"
    )


def joined(name: str, where: str) -> str:
    """Puts a name before what `difference` returned."""
    return name + where if where.startswith(("[", ".")) else f"{name}: {where}"


def record(env: gym.Env, seed: int, turns: int, choose: Callable[[Any, dict[str, Any]], Any]) -> Episode:
    """Plays an episode of at most `turns` turns, with a snapshot before each."""
    observation, info = env.reset(seed=seed)
    episode = Episode(seed, copy.deepcopy((observation, info)), [], [], [])
    for _ in range(turns):
        episode.moments.append(moment_of(env))
        episode.actions.append(choose(observation, info))
        step = take_step(env, episode.actions[-1])
        episode.steps.append(step)
        if step.over:
            break
        observation, info = step.observation, step.info
    return episode


def play(env: gym.Env, actions: Sequence[Any]) -> list[Step]:
    """Steps through actions until they or the episode are over."""
    steps: list[Step] = []
    for action in actions:
        steps.append(take_step(env, action))
        if steps[-1].over:
            break
    return steps


def take_step(env: gym.Env, action: Any) -> Step:
    """Takes one step and copies what it gave: many environments write to the same array again and again."""
    observation, reward, terminated, truncated, info = env.step(action)
    info = copy.deepcopy(info)
    for wrapper in wrappers_of(env):
        if isinstance(wrapper, RecordEpisodeStatistics) and isinstance(info.get(wrapper._stats_key), dict):
            info[wrapper._stats_key].pop("t", None)  # seconds since the reset
    return Step(copy.deepcopy(observation), reward, terminated, truncated, info)


def wrappers_of(env: gym.Env) -> Iterator[gym.Wrapper]:
    """Yields every wrapper, outermost first."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


def wrapper_attributes(env: gym.Env) -> list[tuple[str, dict[str, Any]]]:
    """Returns copies of what Gymnasium's own wrappers hold, as far as it belongs to the moment.

    This looks at every attribute, whatever a snapshot knows of the wrapper. Others' wrappers may keep what is no part of a
    moment; only they can say.
    """
    found = []
    for wrapper in wrappers_of(env):
        if not type(wrapper).__module__.startswith("gymnasium.") or isinstance(
            wrapper, PassiveEnvChecker | Snapshotable
        ):
            continue
        held = {
            name: copy.deepcopy(value)
            for name, value in vars(wrapper).items()
            if name not in _NO_PART_OF_A_MOMENT and not isinstance(value, gym.Env | gym.Space) and not callable(value)
        }
        found.append((type(wrapper).__name__, held))
    return found


def time_limit(env: gym.Env) -> TimeLimit | None:
    """Returns the outermost `TimeLimit` of a stack."""
    return next((wrapper for wrapper in wrappers_of(env) if isinstance(wrapper, TimeLimit)), None)


def random_state(env: gym.Env) -> Mapping[str, Any] | None:
    """Returns the state of `np_random`; `None` if there is none yet (asking for it would make one)."""
    generator = env.unwrapped._np_random
    return None if generator is None else copy.deepcopy(generator.bit_generator.state)


GLOBAL_GENERATORS: dict[str, Callable[[int], None]] = {
    "numpy's global generator (np.random)": lambda seed: np.random.seed(seed),  # noqa: NPY002
    "Python's global generator (the module random)": random.seed,
}


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Puts the global generators back at the end.

    Whether an environment depends on them can only be found out by moving them; no other code of this package touches them.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def default_actions(env: gym.Env, seed: int) -> Actions:
    """Returns a source of actions: samples of the action space, or calls of the tools that `info["tools"]` lists.

    The space is copied: an environment's own generators stay as they are.
    """
    space = copy.deepcopy(env.action_space)
    space.seed(seed)

    def choose(rng: np.random.Generator, observation: Any, info: dict[str, Any]) -> Any:
        if isinstance(space, gym.spaces.Text) and info.get("tools") and rng.random() < 0.9:
            # A tool may want more of its arguments than their types; then any text will do.
            with suppress(ValueError):
                return _tool_action(env, rng, str(observation), info["tools"])
        return space.sample()

    return choose


def _tool_action(env: gym.Env, rng: np.random.Generator, observation: str, tools: Sequence[Mapping[str, Any]]) -> str:
    from trace_envs.actions import get_format
    from trace_envs.env import ToolEnv  # which imports this package

    inner = env.unwrapped
    action_format = inner.action_format if isinstance(inner, ToolEnv) else get_format("hermes")
    words = observation.split() or ["nothing"]
    action: ToolCall | FinalAnswer
    if rng.random() < 0.1:
        action = FinalAnswer(_word(rng, words))
    else:
        function = tools[int(rng.integers(len(tools)))]["function"]
        properties = function.get("parameters", {}).get("properties", {})
        action = ToolCall(function["name"], {n: _argument(rng, schema, words) for n, schema in properties.items()})
    return action_format.render("", action, tools)


def _word(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Returns three words in a row, without what could be read as a tag."""
    start = int(rng.integers(len(words)))
    return "".join(c for c in " ".join(words[start : start + 3]) if c.isalnum() or c == " ").strip()[:100] or "nothing"


def _argument(rng: np.random.Generator, schema: Mapping[str, Any], words: Sequence[str]) -> Any:
    if "enum" in schema:
        return schema["enum"][int(rng.integers(len(schema["enum"])))]
    values: dict[Any, Callable[[], Any]] = {
        "string": lambda: _word(rng, words),
        "integer": lambda: int(rng.integers(10)),
        "number": lambda: float(rng.integers(10)),
        "boolean": lambda: bool(rng.integers(2)),
        "array": list,
        "object": dict,
    }
    make = values.get(schema.get("type"))
    return None if make is None else make()
