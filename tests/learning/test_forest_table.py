"""Tables against the trees that they were read from, and the phases that a scheduler notes."""

import itertools

import numpy as np
import pytest
from bit_env import DepthPredictor, bit_vector, run
from coins import play
from hypothesis import given, settings
from random_trees import forests, trees

from allocation import Forest, TraceAllocator, TraceConfig, Tree, TreeAllocationWrapper, make_allocator
from allocation.forest_table import ForestTable
from allocation.methods.base import Allocator
from allocation.scheduler import Scheduler


def each(some, of_tree):
    """What a function gives for every tree, as one array in the order of a table."""
    return np.concatenate([np.zeros(0), *(np.asarray(of_tree(tree), dtype=np.float64) for tree in some)])


@settings(max_examples=100, deadline=None)
@given(forests())
def test_a_table_holds_what_its_trees_do(some):
    table = ForestTable.of(Forest(some))
    nodes = [(t, tree, node) for t, tree in enumerate(some) for node in tree.nodes]
    assert len(table) == len(nodes) == table.start[-1]
    for row, (t, tree, node) in enumerate(nodes):
        assert table.node(row) is node and table.tree[row] == t and row == table.start[t] + node.id
        assert table.depth[row] == node.depth and table.terminal[row] == node.terminal
        assert table.parent[row] == (-1 if node.parent is None else table.start[t] + node.parent)
        assert table.is_root[row] == (node is tree.root) and table.num_children[row] == len(node.children)
        assert table.phase[row] == (-1 if node is tree.root else tree.phases[node.rollout])
        assert table.branch[row] == table.start[t] + tree.path(node)[min(node.depth, 1)].id
        assert table.tokens[row] == (0 if node.sample is None else len(node.sample.action_ids))
        below = sum(node in tree.path(leaf) for leaf in tree.leaves())
        assert table.leaves_below[row] == below
    assert [table.node(r) for r in table.leaves] == [node for _, _, node in nodes if node.terminal]
    assert sorted(np.concatenate([np.zeros(0), *table.levels])) == list(range(len(nodes)))
    assert all((table.depth[rows] == d).all() and len(rows) for d, rows in enumerate(table.levels))


@settings(max_examples=100, deadline=None)
@given(forests())
def test_values_returns_and_weights_are_those_of_the_trees_to_the_last_bit(some):
    table = ForestTable.of(some)
    assert np.array_equal(table.returns, each(some, Tree.returns))
    assert np.array_equal(table.weights, each(some, Tree.weights))
    for kind in ("reward", "success"):
        assert np.array_equal(table.values(kind), each(some, lambda t, k=kind: t.values(k)), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(forests())
def test_sums_along_paths_below_nodes_and_over_children(some):
    table = ForestTable.of(some)
    x = np.random.default_rng(0).normal(size=len(table))
    along, gathered, children = table.along(x), table.gathered(x), table.children_sum(x)
    for t, tree in enumerate(some):
        mine = table.per_tree(x)[t]
        for node in tree.nodes:
            row = table.start[t] + node.id
            assert along[row] == pytest.approx(sum(mine[n.id] for n in tree.path(node)))
            assert gathered[row] == pytest.approx(sum(mine[n.id] for n in tree.nodes if node in tree.path(n)))
            assert children[row] == pytest.approx(sum(mine[i] for i in node.children))
    assert x.sum() == pytest.approx(sum(part.sum() for part in table.per_tree(x)))


@pytest.mark.parametrize("some", [[], [Tree("q", 0, "prompt")]])
def test_no_tree_and_a_bare_prompt(some):
    table = ForestTable.of(some)
    assert len(table) == len(some) and not len(table.leaves) and np.isnan(table.values()).all()
    assert len(table.levels) == len(some) and (table.weights == 1).all() and (table.phase == -1).all()


@settings(max_examples=30, deadline=None)
@given(trees())
def test_a_table_is_a_picture_of_the_moment(tree):
    table = ForestTable.of([tree])
    before = table.values(), table.weights.copy(), len(table)
    tree.add(tree.root, tree.num_rollouts, "root", terminated=True, reward=9.0)
    assert np.array_equal(table.values(), before[0], equal_nan=True) and len(table) == before[2]
    assert np.array_equal(table.weights, before[1])


# Phases.


def test_a_tree_without_a_scheduler_has_one_phase_of_root_rollouts_and_one_of_continuations():
    tree = Tree("q", 0, "prompt")
    node = tree.add(tree.root, 0, "root")
    tree.add(node, 0, "root", terminated=True)
    tree.add(node, 1, "continuation", terminated=True)
    tree.add(tree.root, 2, "root", terminated=True)
    assert list(tree.phases) == [0, 1, 0]


class Script(Allocator):
    """Spends root rollouts and continuations as it is told, wave by wave."""

    name = "script"

    def __init__(self, root_waves, prefix_waves=()):
        self.root_waves, self.prefix_waves = root_waves, prefix_waves

    def allocate_roots(self, candidates, budget, rng, wave=0):
        return np.array(self.root_waves[wave]) if wave < len(self.root_waves) else np.zeros(len(candidates), dtype=int)

    def prefix_budgets(self, root_counts, total, rng):
        return np.full(len(root_counts), total // len(root_counts))

    def allocate_prefixes(self, tree, budget, rng, wave=0):
        return [(tree.root.children[0], self.prefix_waves[wave])] if wave < len(self.prefix_waves) else []


def played(root_waves, prefix_waves=(), continuations=0):
    """Runs a script with rollouts of two turns; returns the trees."""
    prompts = len(root_waves[0])
    candidates = [Tree(str(i), -1, "prompt") for i in range(prompts)]
    forest, rng = Forest(), np.random.default_rng(0)
    roots = sum(map(sum, root_waves))
    scheduler = Scheduler(Script(root_waves, prefix_waves), forest, candidates, roots, continuations * prompts, rng)
    while (job := scheduler.next()) is not None:
        node = job.node if job.node.depth else job.tree.add(job.node, job.rollout, job.origin)
        job.tree.add(node, job.rollout, job.origin, terminated=True)
        scheduler.finished(job)
    assert scheduler.done
    return {t.key: t for t in forest}


@pytest.mark.parametrize(
    ("root_waves", "prefix_waves", "continuations", "phases"),
    [
        # All root rollouts at once.
        ([[3, 1]], (), 0, {"0": [0, 0, 0], "1": [0]}),
        # In waves; a prompt that a wave leaves out has fewer phases, and one that joins later begins with phase 0.
        ([[2, 0], [1, 2], [0, 1], [1, 0]], (), 0, {"0": [0, 0, 1, 2], "1": [0, 0, 1]}),
        # Continuations in waves.
        ([[2, 1]], (1, 2), 3, {"0": [0, 0, 1, 2, 2], "1": [0, 1, 2, 2]}),
        # What is left of the continuations goes to root rollouts, decided on with all outcomes in view.
        ([[2, 1]], (1,), 3, {"0": [0, 0, 1, 2, 2], "1": [0, 1, 2, 2]}),
        ([[2]], (), 3, {"0": [0, 0, 1, 1, 1]}),
        ([[1], [1]], (1,), 2, {"0": [0, 1, 2, 3]}),
    ],
)
def test_the_scheduler_notes_when_each_rollout_was_decided_on(root_waves, prefix_waves, continuations, phases):
    found = played(root_waves, prefix_waves, continuations)
    assert {key: list(tree.phases) for key, tree in found.items()} == phases
    assert all(len(tree.phases) == tree.num_rollouts for tree in found.values())


def test_rounds_of_reinforce_ada_are_phases():
    forest = play("reinforce_ada", np.r_[np.full(30, 0.5), np.zeros(10)], 200, per_round=2, max_rounds=4, enough=2)
    assert max(max(t.phases) for t in forest) == 3
    for tree in forest:
        # Rollouts are numbered in the order of planning, so phases never fall, and none is left out.
        sizes = [len(list(group)) for _, group in itertools.groupby(tree.phases)]
        assert len(sizes) == 1 + max(tree.phases) and list(tree.phases) == sorted(tree.phases)
        assert all(size == 2 for size in sizes[:-1]), "a round of a prompt is two rollouts"


@pytest.mark.parametrize("prefix_waves", [1, 2])
def test_waves_of_trace_are_phases_in_any_order_of_finishing(prefix_waves):
    found = []
    for slots in (1, 5):
        config = TraceConfig(continuations=1.0, cap_per_rollout=None, prefix_waves=prefix_waves, root_waves=2)
        allocator = TraceAllocator(DepthPredictor(), config)
        envs = TreeAllocationWrapper(bit_vector(slots), allocator=allocator, budget=40)
        forest = run(envs)
        for tree in forest:
            origins = {n.rollout: n.origin for n in tree.nodes[1:]}
            kinds = [{origins[i] for i, p in enumerate(tree.phases) if p == phase} for phase in set(tree.phases)]
            assert set(tree.phases) == set(range(1 + max(tree.phases))) and all(len(kind) == 1 for kind in kinds)
            assert kinds[0] == {"root"}
        found.append([max(t.phases) for t in forest])
    assert max(found[0]) >= prefix_waves


@pytest.mark.parametrize("name", ["treepo", "tree_grpo", "trace_plus"])
def test_a_branch_is_of_a_later_phase_than_its_anchor(name):
    envs = TreeAllocationWrapper(bit_vector(3), allocator=make_allocator(name, predictor=DepthPredictor()), budget=48)
    forest = run(envs)
    assert forest.ledger.continuations > 0
    for tree in forest:
        for node in tree.nodes[1:]:
            parent = tree.nodes[node.parent]
            if parent.rollout not in (-1, node.rollout):
                assert tree.phases[node.rollout] > tree.phases[parent.rollout]
