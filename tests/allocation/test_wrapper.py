import gymnasium as gym
import numpy as np
import pytest
from bit_env import BitEnv, DepthPredictor, bit_vector, follow_hints, run, shape, trace, wrapped

from agents.policies import ScriptedPolicy, collect
from allocation import Root, Sample, TraceAllocator, TreeAllocationWrapper, UniformAllocator
from trace_envs.multihop_qa.oracle import oracle_action
from trace_envs.state import FinalAnswer, ToolCall


def anchors(tree):
    """The node that each continuation started from."""
    return [
        tree.nodes[n.parent]
        for n in tree.nodes
        if n.origin == "continuation" and tree.nodes[n.parent].rollout != n.rollout
    ]


def test_an_ordinary_loop_over_a_real_environment():
    envs = TreeAllocationWrapper(gym.make_vec("TraceMultiHopQA-v0", num_envs=3, vectorization_mode="sync"), budget=8)
    obs, info = envs.reset(seed=0)
    assert len(obs) == 3 and all(isinstance(o, str) and o for o in obs) and info["trace"]["depth"].tolist() == [0, 0, 0]
    done = 0
    while envs.active.any():
        obs, reward, terminated, truncated, info = envs.step(["<answer>yes</answer>"] * 3)
        assert reward.shape == terminated.shape == truncated.shape == (3,)
        done += int((terminated | truncated).sum())
    assert done == envs.forest.ledger.root_rollouts and len(envs.forest) >= 1
    envs.close()


@pytest.mark.parametrize("num_envs", [1, 4, 40])
def test_continuations_start_where_their_anchor_was(num_envs):
    # Without noise an episode is a function of its seed and actions, so every path can be replayed from the root.
    forest = run(wrapped(num_envs, noise=0.0, keep_snapshots=True), trust=0.7)
    branched = 0
    for tree in forest:
        branched += len(anchors(tree))
        assert all(a.origin == "root" and a.depth > 0 and not a.terminal for a in anchors(tree))
        for leaf in tree.leaves():
            env = BitEnv(noise=0.0)
            observation, _ = env.reset(seed=tree.info["seed"])
            for node in tree.path(leaf)[1:]:
                parent = tree.nodes[node.parent]
                assert parent.snapshot.payload.guesses == env.state.guesses
                assert np.array_equal(parent.observation, observation)
                observation, reward, terminated, truncated, info = env.step(int(node.action))
                assert (reward, terminated, truncated) == (node.reward, node.terminated, node.truncated)
            assert np.array_equal(leaf.observation, observation) and info["is_correct"] == leaf.is_correct
    assert branched == forest.ledger.continuations == 16


def test_branches_of_one_prefix_do_not_share_their_luck():
    forest = run(wrapped(8, 64, turns=6, noise=0.5), trust=1.0)
    # The policy always follows its hint, so two rollouts of one prompt differ only by the environment's randomness.
    assert any(len({tuple(n.action for n in t.path(leaf)) for leaf in t.leaves()}) > 1 for t in forest)


def oracle_that_errs(state, rng):
    if rng.random() < 0.2:
        return "Whatever.", FinalAnswer("nobody")
    if rng.random() < 0.2:
        return "Let me see.", ToolCall("search", {"query": "" if rng.random() < 0.5 else "zebra"})
    return oracle_action(state.task, list(state.turns()), rng)


@pytest.fixture(scope="module")
def real_forest():
    vector = gym.make_vec(
        "TraceMultiHopQA-v0", num_envs=5, vectorization_mode="sync", vector_kwargs={"copy": False}, top_k=2, max_turns=6
    )
    envs = TreeAllocationWrapper(vector, allocator=trace(), budget=40, keep_snapshots=True)
    return envs, collect(envs, ScriptedPolicy(oracle_that_errs), seed=3)


def test_paths_of_the_real_environment_replay(real_forest):
    _, forest = real_forest
    env = gym.make("TraceMultiHopQA-v0", top_k=2, max_turns=6).unwrapped
    assert forest.ledger.continuations == 20 and forest.effective_ratio() > 0
    for tree in forest:
        for leaf in tree.leaves():
            observation, info = env.reset(options={"task_id": tree.key})
            for node in tree.path(leaf)[1:]:
                parent = tree.nodes[node.parent]
                assert parent.observation == observation
                assert list(parent.snapshot.payload.turns()) == list(env.state.turns())
                assert parent.info["messages"] == info["messages"]
                observation, reward, terminated, truncated, info = env.step(node.action)
                assert (reward, terminated, truncated) == (node.reward, node.terminated, node.truncated)
                assert (node.tool_errors, node.tool_error) == (info["tool_errors"], info["tool_error"])
            assert leaf.is_correct == info["is_correct"] and leaf.components == info["reward_components"]
            assert leaf.snapshot is None


def test_the_ledger_agrees_with_a_recount(real_forest):
    envs, forest = real_forest
    nodes = [(t, n) for t in forest for n in t.nodes if n.parent is not None]
    rollouts = {(t.index, n.rollout): n.origin for t, n in nodes}
    env = envs.envs.envs[0].unwrapped
    ledger = forest.ledger
    assert ledger.root_rollouts == sum(o == "root" for o in rollouts.values())
    assert ledger.continuations == sum(o == "continuation" for o in rollouts.values())
    assert ledger.root_rollouts + ledger.continuations == ledger.restores == forest.num_leaves == 40
    assert ledger.environment_turns == len(nodes)
    assert ledger.tool_calls == sum(
        isinstance(env.action_format.parse(n.action, env.tools), ToolCall) for _, n in nodes
    )
    assert ledger.tool_calls > 0 and ledger.replayed_turns == 0


def test_info_says_where_each_slot_stands():
    envs = wrapped(6)
    rng = np.random.default_rng(0)
    obs, info = envs.reset(seed=2)
    continued = 0
    while envs.active.any():
        assert [c.slot for c in envs.contexts()] == np.flatnonzero(envs.active).tolist()
        for context in envs.contexts():
            i, node, where = context.slot, context.node, info["trace"]
            assert info["_trace"][i]
            assert where["tree"][i] == context.tree.index and envs.forest.trees[context.tree.index] is context.tree
            assert where["node_id"][i] == node.id and where["depth"][i] == node.depth
            assert where["parent_id"][i] == (-1 if node.parent is None else node.parent)
            assert info["turn"][i] == node.depth and np.array_equal(obs[i], context.observation)
            continued += bool(where["is_continuation"][i])
        before = {c.slot: c for c in envs.contexts()}
        obs, reward, terminated, _, info = envs.step(follow_hints(obs, rng))
        for i, context in before.items():
            made = context.tree.nodes[context.node.children[-1]]
            if terminated[i]:
                assert info["final_info"]["trace"]["node_id"][i] == made.id and info["final_info"]["_trace"][i]
                assert info["_final_obs"][i] and np.array_equal(info["final_obs"][i], made.observation)
                assert info["final_info"]["is_correct"][i] == made.is_correct
                assert reward[i] == made.reward
        assert not any(terminated[i] for i in set(range(6)) - set(before))
    assert continued > 0


@pytest.mark.parametrize("as_dict", [False, True])
def test_slots_without_work_stay_idle(as_dict):
    envs = wrapped(9, budget=5, allocator=UniformAllocator(5), as_dict=as_dict)
    rng = np.random.default_rng(0)
    obs, info = envs.reset(seed=0)
    assert envs.active.tolist() == [True] * 5 + [False] * 4
    while envs.active.any():
        assert obs in envs.observation_space
        actions = follow_hints(obs, rng)
        actions[5:] = ["never looked at"] * 4
        obs, reward, terminated, truncated, info = envs.step(actions)
        assert not (reward[5:].any() or terminated[5:].any() or truncated[5:].any())
        assert not info["_trace"][5:].any() if "_trace" in info else not envs.active.any()
    assert obs in envs.observation_space and envs.forest.num_leaves == 5


def test_the_same_seed_gives_the_same_forest():
    first, second = run(wrapped(), seed=7), run(wrapped(), seed=7)
    assert shape(first) == shape(second) and first.ledger.counts() == second.ledger.counts()
    assert shape(first) != shape(run(wrapped(), seed=8))
    envs = wrapped()
    run(envs, seed=3)
    assert shape(run(envs, seed=7)) == shape(first), "an earlier forest leaked into a seeded one"


@pytest.mark.parametrize("allocator", [trace(), UniformAllocator(4)], ids=["trace", "grpo"])
def test_the_number_of_slots_does_not_change_the_forest(allocator):
    forests = []
    for num_envs in (1, 3, 8, 50):
        envs = TreeAllocationWrapper(bit_vector(num_envs, turns=6), allocator=allocator, budget=32)
        _, info = envs.reset(seed=5)
        while envs.active.any():
            actions = [0] * num_envs
            for context in envs.contexts():
                # A function of (tree, rollout, turn), so that the rollouts of one prompt differ.
                numbers = [context.tree.index, int(info["trace"]["rollout"][context.slot]), context.node.depth]
                assert context.seed == context.tree.rollout_seeds[numbers[1]]
                actions[context.slot] = int(np.random.default_rng(numbers).integers(2))
            _, _, _, _, info = envs.step(actions)
        for tree in envs.forest:
            tree.sort()
        forests.append((shape(envs.forest), [t.rollout_seeds for t in envs.forest], envs.forest.ledger.counts()))
        assert all(len(set(t.rollout_seeds)) == t.num_rollouts and None not in t.rollout_seeds for t in envs.forest)
    assert all(forest == forests[0] for forest in forests[1:])


def test_without_a_seed_forests_go_on():
    envs = wrapped()
    run(envs, seed=7)
    keys = [t.key for t in envs.forest]
    envs.reset()
    assert [t.key for t in envs.forest] != keys


@pytest.mark.parametrize("num_envs", [1, 2, 7, 33, 100])
def test_any_number_of_slots_spends_the_same_budget(num_envs):
    ledger = run(wrapped(num_envs, budget=33)).ledger
    assert (ledger.root_rollouts, ledger.continuations) == (16, 17)


def test_candidates_can_be_named_and_come_from_a_source():
    def source(rng, count):
        return [Root(100 + i) for i in range(count)]

    envs = wrapped(allocator=UniformAllocator(4), budget=12, roots=source)
    run(envs)
    assert [t.key for t in envs.forest] == ["100", "101", "102"] and envs.forest.trees[0].info["seed"] == 100
    envs.reset(seed=0, options={"roots": [Root(5)]})
    assert [t.key for t in envs.forest] == ["5"]
    with pytest.raises(ValueError, match="no candidate prompt"):
        envs.reset(options={"roots": []})


def test_hidden_states_reach_the_root_stage():
    seen = []

    class Spy(TraceAllocator):
        def allocate_roots(self, candidates, budget, rng, wave=0):
            seen.extend(t.root.features for t in candidates)
            return super().allocate_roots(candidates, budget, rng, wave)

    def encode(contexts):
        return np.arange(len(contexts), dtype=np.float32)[:, None] * np.ones(3, np.float32), 7 * len(contexts)

    envs = TreeAllocationWrapper(bit_vector(2), allocator=Spy(DepthPredictor()), budget=16, encode=encode)
    envs.reset(seed=0)
    features, tokens = encode([None] * len(seen))
    assert np.array_equal(np.stack(seen), features)
    assert envs.forest.ledger.prefilled_tokens == tokens


def test_snapshots_are_dropped_at_the_end_unless_kept():
    assert all(n.snapshot is None and n.info is None for t in run(wrapped()) for n in t.nodes)
    kept = run(wrapped(keep_snapshots=True))
    assert all((n.snapshot is None) == n.terminal for t in kept for n in t.nodes)


def test_a_finished_tree_gives_up_its_snapshots_while_others_go_on():
    envs, rng, early = wrapped(2), np.random.default_rng(0), 0
    obs, _ = envs.reset(seed=0)
    while envs.active.any():
        obs, *_ = envs.step(follow_hints(obs, rng))
        for tree in envs.forest:
            if tree.finished:
                assert all(n.snapshot is None and n.info is None for n in tree.nodes)
                early += bool(envs.active.any())
            else:
                assert tree.root.snapshot is not None
    assert early > 0 and all(t.finished for t in envs.forest)


def test_a_context_that_did_not_fit_is_not_counted_as_reused():
    def sample(actions, prefilled, context=10):
        ids = np.arange(actions)
        return Sample("0", ids, ids.astype(np.float32), np.arange(context), prefilled=prefilled)

    envs = wrapped(1, budget=1, allocator=UniformAllocator(1), turns=6, noise=0.0)
    obs, _ = envs.reset(seed=0)
    ledger = envs.forest.ledger
    follow = np.random.default_rng(0)
    for given, cached in [(sample(4, 10), 0), (sample(3, 8), 16), (sample(0, 0), 16), (sample(1, 0), 16 + 47)]:
        obs, *_ = envs.step(follow_hints(obs, follow), [given])
        assert ledger.cached_tokens == cached
    assert ledger.generated_tokens == 8 and ledger.prefilled_tokens == 18
