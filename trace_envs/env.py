"""`ToolEnv`: a Gymnasium environment whose steps are an agent's turns, in text.

Invariant: everything that changes during an episode is in one immutable `EpisodeState`; the environment object only points
at the current one. So a snapshot is a reference, and `advance` can be called on any state without touching the environment.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.utils import seeding

from trace_envs.actions import get_format
from trace_envs.arguments import integer, random_seed
from trace_envs.conversation import cut, messages_of, text_of
from trace_envs.family import Family
from trace_envs.randomness import OwnGenerator
from trace_envs.snapshots.record import SCHEMA_VERSION, EnvSnapshot, check_settings
from trace_envs.spaces import DEFAULT_MAX_LENGTH, UnicodeText
from trace_envs.state import Act, Action, EpisodeState, FinalAnswer, FormatError, History, Task, ToolCall, Turn

MAX_KEY = 2**63 - 1
Self = TypeVar("Self", bound="ToolEnv")


class ToolEnv(gym.Env[str, str], Family):
    """Base of the environment families.

    A family (see `Family`) supplies the tasks (`pick_task`), its tools' schemas, and three pure functions:
    `initial_state(task, key)`, `call_tool(state, call) -> (state, observation, error)` and `judge(state, answer) -> Outcome`.
    Whatever is random in them is drawn from `self.randomness(state)`, which depends on the state alone.

    One step is one turn: the action is the agent's text (a thought, then one tool call or the final answer), the observation
    is what the tool returned. Malformed actions and refused calls are observations that say what was wrong; they count as
    `tool_errors` and use up a turn.

    Args:
        action_format: `hermes` (default), `react` or `tags`; see `trace_envs.actions`.
        max_turns: Turns after which the episode is truncated.
        max_action_chars: Longer actions are refused unread.
        max_observation_chars: Longer tool results are cut, with a note that says so.
        system_prompt: First message of `info["messages"]`; `None` for the format's own instructions, `""` for none.
        render_mode: `ansi` or `None`.
        **unknown: Whatever no class of the family takes; refused.

    Raises:
        ValueError: An argument has an unknown or impossible value.
        TypeError: An argument is unknown; the message lists the known ones.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(
        self,
        *,
        action_format: str = "hermes",
        max_turns: int = 10,
        max_action_chars: int = 16_384,
        max_observation_chars: int = 16_384,
        system_prompt: str | None = None,
        render_mode: str | None = None,
        **unknown: Any,
    ):
        if unknown:
            names = ", ".join(map(repr, sorted(unknown)))
            raise TypeError(f"{type(self).__name__} takes no argument {names}; known: {', '.join(self._arguments())}")
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise TypeError(f"system_prompt must be a string or None, got {type(system_prompt).__name__}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render_mode {render_mode!r}; known: {', '.join(self.metadata['render_modes'])}")
        self.render_mode = render_mode
        self.action_format = get_format(action_format)
        self.max_turns = integer("max_turns", max_turns, 1)
        self.max_action_chars = integer("max_action_chars", max_action_chars, 1)
        self.max_observation_chars = integer("max_observation_chars", max_observation_chars, 1)
        self.tools = self.tool_schemas()
        self.system_prompt = system_prompt
        self._instructions: dict[int, tuple[Any, str]] = {}
        # Twice: room for the note that an observation was cut.
        self.observation_space = UnicodeText(max(DEFAULT_MAX_LENGTH, 2 * max_observation_chars))
        self.action_space = UnicodeText()
        self._state: EpisodeState | None = None
        self._closed = False
        self._config: dict[str, Any] | None = None
        self._random = OwnGenerator()

    @classmethod
    def _arguments(cls) -> list[str]:
        families = (c for c in cls.__mro__ if issubclass(c, ToolEnv))
        parameters = (p for c in families for p in list(inspect.signature(c.__init__).parameters.values())[1:])
        return sorted({p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)})

    def settings(self) -> dict[str, Any]:
        """Returns what shapes the future of an episode besides its state, as plain data; a family adds its own.

        A snapshot is restored only into an environment whose settings are equal. What only changes how an episode is shown
        (`system_prompt`, `render_mode`) is not among them.
        """
        return {
            "action_format": self.action_format.name,
            "max_turns": self.max_turns,
            "max_action_chars": self.max_action_chars,
            "max_observation_chars": self.max_observation_chars,
        }

    # The transition, pure.

    @staticmethod
    def randomness(state: EpisodeState) -> np.random.Generator:
        """Returns the generator for what is random in this turn, a function of the state alone."""
        return np.random.Generator(np.random.Philox(key=state.key, counter=[0, 0, 0, state.turn]))

    def advance(self, state: EpisodeState, text: str) -> EpisodeState:
        """Returns the state after one turn; neither `state` nor the environment changes.

        Raises:
            RuntimeError: The episode is over.
        """
        if state.done:
            raise RuntimeError("the episode is over; call reset() or restore() before the next step")
        action: Action
        if len(text) > self.max_action_chars:
            size, text = len(text), text[: self.max_action_chars]
            action = FormatError(f"The action is {size} characters long; at most {self.max_action_chars} are read.")
        else:
            action = self.action_format.parse(
                text, self.callable_tools(state), max_calls=self.max_calls, plain_answer=self.plain_answer
            )
        results: list[str] = []
        error, calls = False, 0
        if isinstance(action, FinalAnswer):
            replied = self.reply(state, action.text)
            if replied is None:
                turn = Turn(text, action, "")
                state = replace(state, turn=state.turn + 1, history=History(turn, state.history), terminated=True)
                return replace(state, outcome=self.judge(state, action.text))
            after, observation = replied
        elif isinstance(action, FormatError):
            after, observation, error = state, f"Error: {action.message}", True
        elif isinstance(action, ToolCall):
            after, observation, error = self.call_tool(state, action)
            calls = 1
        else:
            after, results, error = self.call_tools(state, action.calls)
            observation, calls = "", len(results)
        if results:
            results = cut(results, self.max_observation_chars)
            observation = "\n".join(results)
        elif len(observation) > self.max_observation_chars:
            (observation,) = cut([observation], self.max_observation_chars)
        state = EpisodeState(  # not `replace`, which takes longer than most tools
            after.task,
            after.key,
            state.turn + 1,
            History(Turn(text, action, observation, error, tuple(results)), state.history),
            after.tool_calls + calls,
            state.tool_errors + int(error),
            after.world,
            after.outcome,
            after.terminated,
            after.truncated or state.turn + 1 >= self.max_turns,
        )
        return replace(state, outcome=self.judge(state, None)) if state.truncated else state

    def write(self, thought: str, act: Act, state: EpisodeState | None = None) -> str:
        """Returns a turn as text that is read back as `act` at that moment, if the tools of the moment can read it at all.

        Raises:
            ValueError: The action format has no way to write this.
        """
        tools = self.callable_tools(self.state if state is None else state)
        try:
            return self.action_format.render(thought, act, tools)
        except ValueError:  # a tool that is not there, or not with such arguments
            return self.action_format.render(thought, act)

    # Gymnasium's interface.

    @property
    def _np_random(self) -> np.random.Generator | None:  # type: ignore[override]
        """Where Gymnasium keeps `np_random`: whoever takes it from here may draw from it at any time."""
        return self._random.lend()

    @_np_random.setter
    def _np_random(self, generator: np.random.Generator | None) -> None:
        self._random = OwnGenerator(generator, lent=True)

    def _own_generator(self) -> OwnGenerator:
        if self._random.generator is None:
            generator, self._np_random_seed = seeding.np_random()
            self._random = OwnGenerator(generator)
        return self._random

    @property
    def state(self) -> EpisodeState:
        """The current state.

        Raises:
            RuntimeError: `reset` was never called.
        """
        if self._state is None:
            self._check_open()
            raise RuntimeError("call reset() first")
        return self._state

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedEnvironmentError(f"this {type(self).__name__} was closed; make another environment")

    def close(self) -> None:
        """Closes the environment; it cannot be used any more. Its snapshots and forks can."""
        self._closed, self._state = True, None

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Seeds `np_random`, which picks the task and the episode's randomness.
            options: `{"task_id": ...}` picks a task.

        Returns:
            The task's prompt and the info described at `info`.

        Raises:
            ValueError: An option or the task id is unknown; the episode under way goes on.
            TypeError: The seed or the options are of another type.
            ClosedEnvironmentError: The environment was closed.
        """
        self._check_open()
        seed = random_seed(seed)
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"options must be a dictionary or None, got {options!r:.60} ({type(options).__name__})")
        options = dict(options or {})
        task_id = options.pop("task_id", None)
        if options:
            raise ValueError(f"unknown reset options {sorted(map(str, options))}; known: ['task_id']")
        super().reset(seed=seed)
        if seed is not None:
            self._random = OwnGenerator(self._random.generator)  # made a moment ago, and nobody else has it
        task = self.pick_task(self._own_generator().draw(), task_id)
        self._state = self.initial_state(task, int(self._random.draw().integers(MAX_KEY)))
        return self.observation(), self.info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Takes one turn.

        Raises:
            RuntimeError: The episode is over, or was never begun.
            TypeError: The action is no string.
        """
        if not isinstance(action, str):
            raise TypeError(f"step() takes the agent's text (a string), got {action!r:.60} ({type(action).__name__})")
        self._state = state = self.advance(self.state, action)
        reward = state.outcome.reward if state.outcome is not None else 0.0
        return self.observation(), reward, state.terminated, state.truncated, self.info()

    def observation(self) -> str:
        """Returns what the agent sees now: the prompt at first, then the last turn's result."""
        history = self.state.history
        return self.state.task.prompt if history is None else history.turn.observation

    def messages(self, state: EpisodeState | None = None) -> list[dict[str, Any]]:
        """Returns the conversation as OpenAI-style chat messages."""
        state = self.state if state is None else state
        prompt = self.system_prompt if self.system_prompt is not None else self._instructions_for(state.task)
        return messages_of(state, prompt, native_results=self.action_format.name == "hermes")

    def _instructions_for(self, task: Task) -> str:
        tools = self.first_tools(task)
        # By identity: tasks share their lists of tools, and to compare schemas takes longer than to show a conversation.
        known = self._instructions.get(id(tools))
        if known is None:
            text = self.action_format.instructions(tools, max_calls=self.max_calls, plain_answer=self.plain_answer)
            known = self._instructions[id(tools)] = tools, text  # kept, so that its id stays its own
        return known[1]

    def info(self) -> dict[str, Any]:
        """Returns what else is known: the conversation so far, and the verdict at the end.

        There are `messages`, `tools` (those of now), `max_calls` (of one turn), `task_id`, `turn`, `tool_calls`, `tool_errors`
        and `tool_error`, which says whether the last turn was malformed or refused. At the end of an episode there are also
        `is_correct`, `reward_components` and `episode` (return `r` and length `l` in turns). Gold answers are never in it.
        Gymnasium's `RecordEpisodeStatistics` writes to `episode` too; give it another `stats_key`.
        """
        state = self.state
        info: dict[str, Any] = {
            "messages": self.messages(),
            "tools": self.tools_at(state),
            "max_calls": self.max_calls,
            "task_id": state.task.task_id,
            "turn": state.turn,
            "tool_calls": state.tool_calls,
            "tool_errors": state.tool_errors,
            "tool_error": state.history is not None and state.history.turn.error,
        }
        if state.outcome is not None:
            info["is_correct"] = state.outcome.is_correct
            info["reward_components"] = dict(state.outcome.components)
            info["episode"] = {"r": state.outcome.reward, "l": state.turn}
        return info

    def render(self) -> str | None:  # type: ignore[override]
        """Returns the episode so far as plain text (`render_mode="ansi"`)."""
        return text_of(self.state) if self.render_mode == "ansi" else None

    # Snapshots.

    @property
    def config(self) -> dict[str, Any]:
        """`settings()`, one object for all snapshots; it is not to be changed."""
        if self._config is None:
            self._config = self.settings()
        return self._config

    def snapshot(self) -> EnvSnapshot:
        """Returns the present moment, in constant time: the state is immutable and shared.

        Raises:
            RuntimeError: `reset` was never called.
            ClosedEnvironmentError: The environment was closed.
        """
        state = self._state
        if state is None:
            state = self.state  # which raises
        spec, history, outcome = self.spec, state.history, state.outcome
        return EnvSnapshot.quick(
            type(self).__name__ if spec is None else spec.id,
            state.turn,
            state,
            self._random.record or self._random.state(),
            self._config or self.config,
            state.task.prompt if history is None else history.turn.observation,
            0.0 if outcome is None else outcome.reward,
        )

    def restore(self, snapshot: EnvSnapshot, *, seed: int | None = None) -> None:
        """Returns to a moment, in constant time.

        Args:
            snapshot: Taken from this environment or from another of the same id and settings.
            seed: New randomness for the turns that follow; `None` repeats them exactly.

        Raises:
            ValueError: The snapshot is of another environment id, other settings or another schema version, or the seed is
                negative. The environment stays where it was.
            TypeError: The snapshot is no `EnvSnapshot`, or the seed no integer.
            ClosedEnvironmentError: The environment was closed.
        """
        if not isinstance(snapshot, EnvSnapshot):
            raise TypeError(f"expected an EnvSnapshot, as snapshot() returns it, got {type(snapshot).__name__}")
        if self._closed:
            self._check_open()
        if snapshot.version != SCHEMA_VERSION:
            raise ValueError(
                f"the snapshot has schema version {snapshot.version}, this release reads version {SCHEMA_VERSION}"
            )
        spec, state = self.spec, snapshot.payload
        env_id = type(self).__name__ if spec is None else spec.id
        if snapshot.env_id != env_id:
            raise ValueError(f"the snapshot is of {snapshot.env_id!r}, this environment is {env_id!r}")
        if snapshot.config is not self._config and snapshot.config is not None:
            check_settings(snapshot.config, self.config)
        if not isinstance(state, EpisodeState):
            raise ValueError(f"the snapshot's payload is a {type(state).__name__}, expected an EpisodeState")
        if seed is not None:
            seed = random_seed(seed)
            rng = np.random.default_rng(seed)
            self._state = replace(state, key=int(rng.integers(MAX_KEY)))
            self._random, self._np_random_seed = OwnGenerator(rng), seed
            return
        random_state = snapshot.random_state
        if random_state is not None and random_state is not self._random.record:
            self._own_generator().put(random_state)
        self._state = state

    def fork(self: Self) -> Self:
        """Returns an independent environment at the same moment; tasks, corpus and index are shared."""
        self._check_open()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        # What Gymnasium lets change besides the state: three generators.
        twin._random = OwnGenerator(copy.deepcopy(self._random.generator))
        twin.observation_space, twin.action_space = copy.deepcopy((self.observation_space, self.action_space))
        return twin
