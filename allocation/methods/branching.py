"""Methods that sample uniformly chosen prompts as trees: TreePO, Tree-GRPO and ARPO.

Invariant: which prompts are sampled, and how many rollouts each gets, never depends on an outcome or on a predictor; only the
places where a prompt's rollouts part company differ. Equal choices are settled by the seeded generator, in an order that does
not depend on which rollout came first to its turn.

All three were published for engines that stop every path at the same time, decide where to branch, and go on. Here a prompt's
root rollouts are finished first and branches are added to the finished tree, in waves: to go on with a stopped path or to take
its continuation from a tree that is already there is the same in distribution, as long as a decision at a prefix looks at
nothing that came after it. What a method plans in waves is therefore what it would have planned in steps, but for the
differences that its class names.

Rollouts for which there is no prefix to start from become further root rollouts of the same prompt (`leftover_roots`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocation.entropies import entropy_rises
from allocation.methods.base import Allocator, dealt, grouped
from allocation.settings import check_numbers, check_whole
from allocation.tree import Node, Tree


class BranchingAllocator(Allocator):
    """Uniform prompts, each with a tree of `group_size` rollouts of which a fixed share starts at the prompt.

    Args:
        group_size: Rollouts of a prompt, of either kind.
        root_share: Share of them that starts at the prompt, in (0, 1]; at least one does.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, group_size: int, root_share: float):
        check_whole(group_size=group_size)
        check_numbers(root_share=root_share)
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        if not 0 < root_share <= 1:
            raise ValueError(f"root_share must lie in (0, 1], got {root_share}")
        self.group_size = group_size
        self.root_share = root_share

    def pool_size(self, budget: int) -> int:
        """As many prompts as groups fit into the budget."""
        return max(1, budget // self.group_size)

    def root_budget(self, budget: int) -> int:
        """The share of the budget that starts at prompts, at least one rollout for each prompt."""
        return min(budget, max(round(self.root_share * budget), self.pool_size(budget)))


class TreePOAllocator(BranchingAllocator):
    """`treepo` (TreePO, arXiv 2508.17445): every path that is still active branches at every depth until the tree is full.

    A tree starts with `width` paths. After each segment the branching budget, the rollouts that the tree still lacks, is
    divided evenly over its active paths, and no path becomes more than `width`; where there are more active paths than
    budget, those that branch are drawn at random. When all paths have ended and rollouts are still lacking, finished paths
    are drawn at random, each is cut at a random segment, and sampling goes on from there (the paper's fallback). In wave w
    those paths branch that are active at depth w + 1, which has the same distribution as stopping them all there: budgets
    count paths, and paths neither merge nor vanish.

    Differences: a segment is a turn, not a fixed number of tokens. Budgets are always even; dividing them by the
    log-probability of segments (an option of the published method) and stopping repetitive paths early are left out. A branch
    is sampled to its end before the deeper branches of other paths are, which saves no time but changes nothing in law. The
    last wave is the fallback, and cuts a path at a prefix drawn uniformly from those on it.

    Args:
        group_size: Rollouts of a prompt (the released code's `max_width`).
        width: Paths that one path may become at one depth (the released code's `fixed_step_width`), at least 2.

    Raises:
        ValueError: A number is out of range.
    """

    name = "treepo"

    def __init__(self, group_size: int = 8, width: int = 2):
        check_whole(group_size=group_size, width=width)
        if width < 2:
            raise ValueError(f"width must be at least 2, or nothing ever branches, got {width}")
        super().__init__(group_size, min(1.0, width / max(group_size, 1)))
        self.width = width

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """Branches what is active at depth `wave + 1`; where nothing is, draws finished paths and cuts them."""
        prefixes = inner_prefixes(tree)
        active = [n for n in prefixes if n.depth == wave + 1]
        if active:
            counts = dealt(len(active), min(budget, len(active) * (self.width - 1)), rng)
            return _chosen(active, counts)
        return _chosen(prefixes, self._fallback(tree, prefixes, budget, rng))

    @staticmethod
    def _fallback(tree: Tree, prefixes: Sequence[Node], budget: int, rng: np.random.Generator) -> np.ndarray:
        """Deals the budget to finished paths and cuts each path at a prefix drawn uniformly from those on it."""
        position = {n.id: i for i, n in enumerate(prefixes)}
        counts = np.zeros(len(prefixes), dtype=np.int64)
        # A prefix that left no room for an action is none to start from, so a path may have no place to be cut.
        ends = (tree.path(n) for n in sorted(tree.leaves(), key=lambda n: n.rollout))
        paths = [path for end in ends if (path := [position[n.id] for n in end if n.id in position])]
        if paths:
            for path, count in zip(paths, dealt(len(paths), budget, rng).tolist(), strict=True):
                for cut in rng.integers(len(path), size=count):
                    counts[path[cut]] += 1
        return counts


class TreeGRPOAllocator(BranchingAllocator):
    """`tree_grpo` (Tree-GRPO, arXiv 2509.21240): chains first, then rounds that expand random nodes.

    A prompt starts with M chains, each the trunk of a tree of its own. In each of L rounds N nodes of every trunk's tree are
    drawn uniformly, with replacement, among those that are not terminal, nodes of earlier expansions included, and each draw
    is continued to a terminal: M (1 + L N) rollouts. A round is a wave of continuations here, so the method is sequential in
    the paper too and nothing about its order changes.

    Differences: a prompt's trees hang on one root, and the root is not drawn (the released code draws it, too), since an
    expansion from there would be another chain. M is the share 1 / (1 + L N) of `group_size`, so that budgets are exact for
    every combination: where it is not whole it differs by one between prompts, and where draws do not go up evenly, so do
    those of trunks and rounds. A trunk that ended in its first turn leaves its draws to the others. The released code keeps
    K leaves of each tree and drops the others; all are kept here.

    Args:
        group_size: Rollouts of a prompt.
        nodes: Nodes that are expanded in a round in each trunk's tree, N.
        rounds: Rounds, L.

    Raises:
        ValueError: A number is out of range.
    """

    name = "tree_grpo"

    def __init__(self, group_size: int = 8, nodes: int = 1, rounds: int = 3):
        check_whole(nodes=nodes, rounds=rounds)
        if nodes < 1 or rounds < 1:
            raise ValueError(f"nodes and rounds must be at least 1, got nodes={nodes}, rounds={rounds}")
        super().__init__(group_size, 1 / (1 + nodes * rounds))
        self.nodes = nodes
        self.rounds = rounds

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """One round of expansions."""
        prefixes = inner_prefixes(tree)
        trunk = _trunks(tree)
        of_trunk: dict[int, list[int]] = {}
        for i, node in enumerate(prefixes):
            of_trunk.setdefault(trunk[node.id], []).append(i)
        counts = np.zeros(len(prefixes), dtype=np.int64)
        if of_trunk:
            spent = len(tree.leaves("continuation"))
            due = -(-(budget + spent) * (wave + 1) // self.rounds) - spent
            draws = dealt(len(of_trunk), min(budget, max(due, 1)), rng)
            for among, count in zip(of_trunk.values(), draws.tolist(), strict=True):
                np.add.at(counts, rng.choice(among, size=count), 1)
        return _chosen(prefixes, counts)


class ARPOAllocator(BranchingAllocator):
    """`arpo` (ARPO, arXiv 2507.19849): half of the rollouts are global, the others branch where entropy rose.

    After each tool call the entropy H_t of the next tokens is compared with that of the rollout's start, H_0. With
    P_t = alpha + beta (H_t - H_0) the path branches into `branches` further paths where P_t > tau. When the budget is spent
    nothing branches any more; when all paths have ended before that, the rest is sampled from the prompt.

    Differences: the budget is exact, so prefixes over the threshold are served in falling order of P_t, not in the order of
    time; branches of branches come in the next wave, from what is left by then. P_t decides by itself, as in the paper; the
    released code branches with a chance of about P_t. Entropies are means over the whole turn after the tool's answer (the
    released code takes the first 20 tokens of a turn, and branches at its end); the normalisation by the vocabulary
    is part of `beta` and cannot change an order. Every inner prefix counts as one after a tool call, since it ends with the
    environment's answer. As H_t is measured on tokens that follow the prefix, the choice is not strictly exogenous.

    Args:
        group_size: Rollouts of a prompt.
        root_share: Share of them that are global; the paper's scripts take half.
        alpha: P_t where the entropy has not changed.
        beta: Rise of P_t for each nat.
        tau: Threshold; at `alpha`, its default, a prefix is branched where entropy rose at all.
        branches: Further paths from one prefix, Z.

    Raises:
        ValueError: A number is out of range.
    """

    name = "arpo"
    uses_entropy = True

    def __init__(
        self,
        group_size: int = 8,
        root_share: float = 0.5,
        alpha: float = 0.5,
        beta: float = 0.2,
        tau: float = 0.5,
        branches: int = 1,
    ):
        super().__init__(group_size, root_share)
        check_whole(branches=branches)
        check_numbers(alpha=alpha, beta=beta, tau=tau)
        if not np.isfinite([alpha, beta, tau]).all():
            raise ValueError(f"alpha, beta and tau must be finite, got {alpha}, {beta} and {tau}")
        if beta <= 0:
            raise ValueError(f"beta must be positive: entropy is what arpo branches by, got {beta}")
        if branches < 1:
            raise ValueError(f"branches must be at least 1, got {branches}")
        self.alpha, self.beta, self.tau = alpha, beta, tau
        self.branches = branches

    def allocate_prefixes(
        self, tree: Tree, budget: int, rng: np.random.Generator, wave: int = 0
    ) -> list[tuple[int, int]]:
        """Branches the prefixes over the threshold that have not been branched yet.

        Raises:
            ValueError: The policy gives no entropies.
        """
        prefixes = inner_prefixes(tree)
        chance = self.alpha + self.beta * entropy_rises(tree, prefixes)
        over = np.array([len(n.children) == 1 for n in prefixes], dtype=bool) & (chance > self.tau)  # NaN is not over
        found = np.flatnonzero(over)
        # In random order first, then stably by falling chance: that is what breaks ties.
        found = found[rng.permutation(len(found))]
        found = found[np.argsort(-chance[found], kind="stable")]
        counts = grouped(len(prefixes), self.branches, min(budget, len(found) * self.branches), found)
        return _chosen(prefixes, counts)


def inner_prefixes(tree: Tree) -> list[Node]:
    """Returns all nodes between the root and the terminals, of either origin, by rollout and depth.

    That order, unlike the one of ids, does not depend on which rollout came first to its turn.
    """
    return sorted(
        (n for n in tree.nodes if n.depth and not n.terminal and not tree.full(n)), key=lambda n: (n.rollout, n.depth)
    )


def _trunks(tree: Tree) -> list[int]:
    """Returns, by node, the number of the root rollout that its path from the root begins with; -1 at the root."""
    trunk = [-1] * len(tree.nodes)
    for node in tree.nodes[1:]:  # parents come first
        trunk[node.id] = node.rollout if node.depth == 1 else trunk[node.parent]  # type: ignore[index]
    return trunk


def _chosen(prefixes: Sequence[Node], counts: np.ndarray) -> list[tuple[int, int]]:
    return [(n.id, k) for n, k in zip(prefixes, counts.tolist(), strict=True) if k]
