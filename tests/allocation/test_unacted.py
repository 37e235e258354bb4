"""Policies that have no action for a prefix: the rollout ends there, truncated, and nothing else is changed."""

import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from hooked_env import HookedEnv, Single, assert_same, guess, lock_step, nothing, path_generator, trace, vector

from agents.advantages import ESTIMATORS, CreditConfig, estimate
from agents.evaluate import summary
from agents.figures import batch_figures
from allocation import Sample, TreeAllocationWrapper
from allocation.forest_table import ForestTable
from allocation.runner import AsyncRunner
from allocation.sample import UNACTED
from trace_envs.multihop_qa import MultiHopQAEnv

IDS = np.arange(3)
NO_IDS, NO_LOGPROBS = np.zeros(0, np.int64), np.zeros(0, np.float32)
BUDGET = 24


def silent(reason, *, share=0.25, prefix_only=False):
    """A policy that has no action at some prefixes: those of which a hash says so, or at some of its calls."""

    def choose(context):
        rng = path_generator(context)
        full = rng.random() < share and context.node.depth > 0
        shown = np.full(2, context.node.depth)
        if full and (prefix_only or reason == "context" or rng.random() < 0.5):
            shown = shown if reason == "context" else NO_IDS
            return Sample("", NO_IDS, NO_LOGPROBS, shown, finish_reason=reason, note="no room")
        return Sample(guess(context), IDS, np.zeros(3, np.float32), shown)

    return choose


@pytest.mark.parametrize("reason", UNACTED)
def test_both_drivers_end_such_rollouts_alike(reason):
    stepped = []

    def hook(env, what):
        stepped.append(what)

    settings = {"allocator": trace(), "budget": BUDGET, "success": lambda *_: True}
    envs = vector(hook, 4)
    forest = lock_step(envs, silent(reason), **settings)
    steps = stepped.count("step")
    assert_same(AsyncRunner(vector(nothing, 3), **settings).run_sync(Single(silent(reason)), seed=0), forest)
    ends = [(t, n) for t in forest for n in t.nodes if n.sample is not None and not n.sample.acted]
    assert len(ends) == forest.ledger.unacted > 2
    assert forest.ledger.environment_turns == steps, "no environment was stepped for them"
    assert forest.num_leaves == forest.ledger.root_rollouts + forest.ledger.continuations == BUDGET
    for tree, node in ends:
        parent = tree.nodes[node.parent]
        assert node.truncated and not node.terminated and node.reward == 0 and node.is_correct is False
        assert node.components == UNACTED[reason] and node.snapshot is None and not node.tool_error
        assert np.array_equal(node.observation, parent.observation), "numbers: the last observation stays"
    others = [n for t in forest for n in t.leaves() if n.sample.acted]
    assert others and all(n.is_correct for n in others)


@pytest.mark.parametrize("reason", UNACTED)
def test_text_says_why_and_verifying_goes_as_far_as_there_are_actions(reason):
    envs = SyncVectorEnv([MultiHopQAEnv] * 3)

    def choose(context):
        if context.node.depth == 2:
            return Sample("", NO_IDS, NO_LOGPROBS, NO_IDS, finish_reason=reason, note="There is no room left.")
        return Sample("<answer>?</answer>" if path_generator(context).random() < 0.2 else "?", IDS, NO_LOGPROBS, NO_IDS)

    forest = lock_step(envs, choose, allocator=trace(), budget=BUDGET)
    ends = [n for t in forest for n in t.leaves() if n.depth == 3]
    assert ends and all(n.observation == "There is no room left." for n in ends)
    assert all(n.tool_errors == 2 and not n.tool_error for n in ends)
    assert forest.verify()
    record = summary([(0, leaf) for t in forest for leaf in t.leaves()])
    name = next(iter(UNACTED[reason]))
    assert record[f"eval/{name}"] == record["eval/truncated"] == len(ends) / forest.num_leaves
    assert batch_figures(forest, 0)["ledger/unacted"] == len(ends)


def test_step_reports_them_as_it_does_any_end():
    wrapped = TreeAllocationWrapper(vector(nothing, 3), allocator="grpo", budget=6, success=lambda *_: True)
    wrapped.reset(seed=0)
    none = Sample("", NO_IDS, NO_LOGPROBS, NO_IDS, finish_reason="error", note="gone")
    _, rewards, terminated, truncated, info = wrapped.step(np.zeros(3, np.int64), [None, none, None])
    assert truncated.tolist() == [False, True, False] and not terminated.any() and not rewards.any()
    assert info["final_info"]["reward_components"]["policy_error"][1] == 1.0
    before = wrapped.forest.ledger.environment_turns
    wrapped.step(np.zeros(3, np.int64), [none] * 3)
    assert wrapped.forest.ledger.environment_turns == before and wrapped.forest.ledger.unacted == 4


def test_no_rollout_starts_where_there_was_no_room():
    for seed in range(4):
        forest = lock_step(
            SyncVectorEnv([lambda: HookedEnv(nothing)] * 4),
            silent("context", share=0.4),
            seed,
            allocator=trace(continuations=3.0),
            budget=60,
            success=lambda reward, info: reward > 0,
        )
        assert forest.ledger.continuations > 10 and forest.ledger.unacted > 5
        for tree in forest:
            full = [n for n in tree.nodes if tree.full(n)]
            assert all(len(n.children) == 1 for n in full if n.depth), "nothing was continued from a full prefix"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reason", UNACTED)
def test_what_went_before_is_charged_with_the_failure(estimator, reason):
    forest = lock_step(
        vector(nothing, 4), silent(reason), allocator=trace(), budget=60, success=lambda reward, info: reward > 0
    )
    table = ForestTable.of(forest)
    credit = estimate(table, estimator, CreditConfig(), values=np.full(len(table), 0.5) if estimator == "gae" else None)
    for values in (credit.up, credit.down, credit.weight):
        assert np.isfinite(values).all()
    silent_rows = [i for i in range(len(table)) if (s := table.node(i).sample) is not None and not s.acted]
    assert silent_rows and not table.tokens[silent_rows].any(), "their own edges have no tokens to train"
    lowest = table.along(np.minimum(credit.advantage, 0.0))
    assert (lowest[table.parent[silent_rows]] < 0).any(), "edges before them are made less likely"


def test_a_prefix_that_is_shown_in_other_tokens_is_refused():
    def drifting(context):
        sample = Sample(
            guess(context), IDS, np.zeros(3, np.float32), np.array([context.node.depth, len(context.node.children)])
        )
        return sample

    with pytest.raises(
        ValueError, match=r"two actions at node 0 of tree .* were sampled after different context_ids \(2 and 2"
    ):
        lock_step(vector(nothing, 1), drifting, allocator="grpo", budget=8, success=lambda *_: True)


def test_tokens_that_an_engine_counts_are_counted():
    def counting(context):
        return Sample(guess(context), NO_IDS, NO_LOGPROBS, NO_IDS, prefilled=7, generated=5)

    forest = lock_step(vector(nothing, 2), counting, allocator="grpo", budget=8, success=lambda *_: True)
    turns = forest.ledger.environment_turns
    assert (forest.ledger.generated_tokens, forest.ledger.prefilled_tokens) == (5 * turns, 7 * turns)
    assert forest.ledger.cached_tokens == 0
