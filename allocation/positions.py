"""Where each slot of a vector stands in the forest, as arrays: `info["trace"]`.

Invariant: after every step, each active slot's row is that of the node it stands at.
"""

from __future__ import annotations

import numpy as np

from allocation.tree import Node, Origin

NAMES = ("tree", "node_id", "parent_id", "depth", "rollout")
_, NODE, PARENT, DEPTH, _ = range(len(NAMES))
MASKS = tuple(f"_{name}" for name in (*NAMES, "is_continuation"))


class Positions:
    """The positions of all slots; most of a row does not change in a step, so the rows are kept from step to step.

    Args:
        num_envs: Number of slots.

    Attributes:
        active: Which slots have work, bool [num_envs].
    """

    def __init__(self, num_envs: int):
        self.active = np.zeros(num_envs, bool)
        self._numbers = np.zeros((len(NAMES), num_envs), np.int64)
        self._is_continuation = np.zeros(num_envs, bool)

    def start(self, slot: int, tree: int, node: Node, rollout: int, origin: Origin) -> None:
        """Puts a slot at the anchor of its next rollout."""
        self.active[slot] = True
        parent = -1 if node.parent is None else node.parent
        self._numbers[:, slot] = tree, node.id, parent, node.depth, rollout
        self._is_continuation[slot] = origin == "continuation"

    def clear(self, slot: int) -> None:
        """Makes a slot idle."""
        self.active[slot] = False

    def move(self, node_ids: list[int]) -> None:
        """Moves the active slots one turn further, to the nodes of these ids."""
        active, numbers = self.active, self._numbers
        numbers[PARENT] = numbers[NODE]
        # A mask takes twice as long, and most of the time it masks nothing.
        numbers[NODE, ... if len(node_ids) == len(active) else active] = node_ids
        numbers[DEPTH] += 1

    def info(self, which: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows of some slots in the form of Gymnasium's infos: the others' are zero, and masked.

        Args:
            which: Bool [num_envs].

        Returns:
            `tree` (index in the forest), `node_id`, `parent_id` (-1 at the root), `depth`, `rollout` (number within the
            tree), `is_continuation`, each int64 or bool [num_envs], and for each its mask `_<name>`.
        """
        info = dict(zip(NAMES, self._numbers * which, strict=True))
        info["is_continuation"] = self._is_continuation & which
        mask = which.copy()
        info.update(dict.fromkeys(MASKS, mask))
        return info
