"""A seeded synthetic encyclopedia with multi-hop questions.

Invariant: a data set is a function of its arguments. Splits share no name word; only `test_compositions` asks for the
held-out pairs of relations; following the steps of any question through BM25 search answers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trace_envs.multihop_qa.data import QADataset
from trace_envs.multihop_qa.synthetic.names import SPLITS, name_chunks
from trace_envs.multihop_qa.synthetic.questions import QuestionWriter
from trace_envs.multihop_qa.synthetic.relations import fixed_words
from trace_envs.multihop_qa.synthetic.world import build_world

__all__ = ["SPLITS", "fixed_words", "name_chunks", "synthetic_dataset"]

_SALT = 2606  # keeps these streams apart from other users of the same small seeds


@dataclass(frozen=True)
class _Profile:
    """What distinguishes a split: defaults of the arguments, and the kinds of question."""

    questions_per_hop: int
    hops: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    scale: float = 1.0
    crowd: float = 1.0
    held_out: bool = False


_PROFILES = {
    "train": _Profile(600, scale=3.0),
    "validation": _Profile(100),
    "test": _Profile(300),
    "test_longer": _Profile(300, hops=(7, 8)),
    "test_compositions": _Profile(300, hops=(2, 3, 4, 5, 6), held_out=True),
    "test_distractors": _Profile(300, scale=2.0, crowd=4.0),
}

# Only two to four hops allow for two sides that are short enough to read, hence 40 % there for about 20 % overall.
_MIXED_HOPS = (2, 3, 4)
_MIX = ("chain", "comparison", "chain", "yes", "chain", "chain", "comparison", "chain", "no", "chain")


@lru_cache(maxsize=16)
def synthetic_dataset(
    split: str = "train",
    *,
    seed: int = 0,
    questions_per_hop: int | None = None,
    hops: tuple[int, ...] | None = None,
    scale: float | None = None,
) -> QADataset:
    """Returns questions about an invented world, and its encyclopedia.

    Args:
        split: `train`, `validation` and `test` are alike; `test_longer` asks for longer chains, `test_compositions` for
            pairs of relations that no other split combines, `test_distractors` in a world full of name-alikes.
        seed: Another seed gives another world over the same split's words.
        questions_per_hop: Questions of each number of hops, the split's default if `None`.
        hops: Numbers of hops to ask for, the split's default if `None`.
        scale: Size of the world, as a multiple of about 900 passages; the split's default if `None`.

    Returns:
        The data set, the same object for the same arguments.

    Raises:
        ValueError: The split is unknown, a number is out of range, or the world is too small for the questions.
    """
    if split not in _PROFILES:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    profile = _PROFILES[split]
    n = profile.questions_per_hop if questions_per_hop is None else questions_per_hop
    hops = profile.hops if hops is None else hops
    scale = profile.scale if scale is None else scale
    least = 2 if profile.held_out else 1
    if n < 1 or scale <= 0 or seed < 0:
        raise ValueError(f"want questions_per_hop >= 1, scale > 0 and seed >= 0, not {n}, {scale} and {seed}")
    if not hops or any(not least <= h <= 8 for h in hops) or len(set(hops)) != len(hops):
        raise ValueError(f"split {split!r} has questions of {least} to 8 hops, each named once, not {hops}")
    rng = np.random.default_rng([_SALT, SPLITS.index(split), seed])
    world = build_world(split, rng, scale=scale, crowd=profile.crowd)
    writer = QuestionWriter(world, rng, held_out=profile.held_out)
    tasks = []
    for h in hops:
        mixed = h in _MIXED_HOPS and not profile.held_out
        tasks += writer.write(n, h, f"synthetic-{split}", kinds=_MIX if mixed else ("chain",))
    return QADataset(f"synthetic/{split}/{seed}", tuple(tasks), tuple(world.passages))
