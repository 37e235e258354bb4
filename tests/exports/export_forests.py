"""Forests for the tests of the exports."""

import numpy as np
from echo_env import EvenPredictor
from gymnasium.vector import SyncVectorEnv
from hypothesis import strategies as st
from token_trees import numbered

from agents.policies import collect
from allocation import Forest, Sample, TraceAllocator, TraceConfig, TreeAllocationWrapper
from allocation.forest_table import ForestTable
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.state import FinalAnswer, ToolCall

NO_IDS, NO_LOGPROBS = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
ENDS = st.sampled_from([None, None, "context", "error"])


@st.composite
def token_forests(draw, **kwargs):
    """Some trees in which every token has an id of its own and some rollouts end without an action."""
    forest = Forest(draw(numbered(**kwargs)))
    for index, tree in enumerate(forest):
        tree.index = index
        for node in list(tree.nodes):
            if node.sample is not None:
                node.sample.version = node.depth
            reason = draw(ENDS) if node.terminal else None
            if reason is not None:
                node.sample = Sample("", NO_IDS, NO_LOGPROBS, NO_IDS, finish_reason=reason)
    return forest


def advantages_of(forest):
    """A number of its own for every edge, and NaN at roots."""
    table = ForestTable.of(forest)
    return np.where(table.is_root, np.nan, np.arange(len(table)) + 0.5)


class Searcher:
    """Says anything in an action format, by a generator: calls, answers, nonsense; now and then nothing at all."""

    def __init__(self, action_format, seed=0, silent=0.1):
        self.format, self.silent = action_format, silent
        self.rng = np.random.default_rng(seed)

    def act(self, contexts):
        return [self.sample() for _ in contexts]

    def sample(self):
        if self.rng.random() < self.silent:
            return Sample("", NO_IDS, NO_LOGPROBS, NO_IDS, finish_reason="error", note="The line is dead.")
        call = ToolCall("search", {"query": f"who \N{SNOWMAN} {self.rng.integers(9)}"})
        texts = [
            self.format.render("I look it up.", call),
            self.format.render("", call),
            self.format.render("I know.", FinalAnswer("Paris")),
            "no format at all",
            "",
        ]
        return Sample(texts[self.rng.choice(5, p=[0.4, 0.2, 0.2, 0.1, 0.1])], NO_IDS, NO_LOGPROBS, NO_IDS)


def search_forest(action_format="hermes", *, budget=24, **kwargs):
    """A forest of a real environment with tools, and branches; its policy gives no ids."""
    envs = SyncVectorEnv([lambda: MultiHopQAEnv(action_format=action_format, max_turns=4, **kwargs)] * 3)
    wrapper = TreeAllocationWrapper(
        envs,
        allocator=TraceAllocator(EvenPredictor(), TraceConfig(continuations=1.0, cap_per_rollout=None)),
        budget=budget,
        success=lambda total, info: info["turn"] % 2 == 0,
    )
    forest = collect(wrapper, Searcher(MultiHopQAEnv(action_format=action_format).action_format), seed=0)
    assert forest.ledger.continuations and forest.ledger.unacted
    return forest
