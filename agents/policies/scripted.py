"""Policies that follow a script: an oracle that knows the way, and an honest reader that does not.

Invariant: they act through the same text as a model does, so what they score is what the environment allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from allocation import Context, Sample
from trace_envs.actions import ActionFormat, get_format
from trace_envs.env import ToolEnv
from trace_envs.multihop_qa.data import QATask
from trace_envs.multihop_qa.heuristics import bm25_action
from trace_envs.multihop_qa.oracle import oracle_action
from trace_envs.state import Act, EpisodeState

Script = Callable[[EpisodeState, np.random.Generator], tuple[str, Act] | str]
"""Returns a thought and an action, or the whole turn as text."""


def _oracle(state: EpisodeState, rng: np.random.Generator) -> tuple[str, Act]:
    if not isinstance(state.task, QATask):
        raise TypeError(f"the oracle of multi-hop questions cannot act on a {type(state.task).__name__}; see oracle_of")
    return oracle_action(state.task, list(state.turns()), rng)


def _bm25(state: EpisodeState, rng: np.random.Generator) -> tuple[str, Act]:
    if not isinstance(state.task, QATask):
        raise ValueError(
            "the agent bm25 answers multi-hop questions only; of other tasks the agent oracle knows the way"
        )
    return bm25_action(state.task.prompt, list(state.turns()))


def oracle_of(env: ToolEnv, noise: float = 0.0) -> Script:
    """Returns the oracle of an environment as a script.

    Args:
        env: Of the same family and with the same arguments as those that are acted in; it is not stepped.
        noise: Chance of a mistake at each step.
    """
    return lambda state, rng: env.write(*env.oracle(state, rng, noise), state)


SCRIPTS: dict[str, Script] = {"oracle": _oracle, "bm25": _bm25}
"""Scripts by name, for multi-hop questions. `oracle` looks at the gold answer and evidence; `bm25` sees what any agent sees."""


class ScriptedPolicy:
    """Acts by a script.

    Args:
        script: A name of `SCRIPTS`, or a function of the episode's state and a generator.
        action_format: The environment's action format.
        seed: Seeds the generator that the script is given.
    """

    def __init__(self, script: str | Script, *, action_format: str = "hermes", seed: int = 0):
        if isinstance(script, str) and script not in SCRIPTS:
            raise ValueError(f"unknown scripted agent {script!r}; known: {', '.join(SCRIPTS)}")
        self._script = SCRIPTS[script] if isinstance(script, str) else script
        self._format: ActionFormat = get_format(action_format)
        self._rng = np.random.default_rng(seed)

    def act(self, contexts: Sequence[Context]) -> list[Sample]:
        """Returns the script's next action for each context; the samples hold text and no tokens."""
        return [self._sample(context) for context in contexts]

    def _sample(self, context: Context) -> Sample:
        if context.node.snapshot is None:
            raise ValueError(
                "a scripted policy reads the environment's state from the node's snapshot, and there is none; pass "
                "keep_snapshots=True to TreeAllocationWrapper"
            )
        state = context.node.snapshot.payload
        said = self._script(state, self._rng)
        text = said if isinstance(said, str) else self._format.render(*said)
        nothing = np.zeros(0, dtype=np.int64)
        return Sample(text, nothing, nothing.astype(np.float32), nothing)
