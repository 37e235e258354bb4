"""Records a dense forest of FrozenLake: a sparse foreign environment in which values and the policy gradient are exact.

Prompts are random maps, all of which end at the same corner. The policy is a softmax table over positions that all maps share
and that does not see the holes, so that its gradient is one of `CELLS * ACTIONS` numbers and a sketch of as many buckets is
the score itself. Rollouts are drawn from Gymnasium's own transition tables (`FrozenLakeEnv.P`) with a limit of turns; a turn
is one token sampled and one shown. Where an arena of language tasks says "tokens", here it says turns, twice.

    python -m benchmarks.record_lakes --output benchmarks/assets/dense/tabular_frozen_lake.npz

The environment slips, so the same action may lead to different places: rows of scores are told apart by where the turn ended.
What follows depends on place and turn alone, hence prefixes that agree in both and in the last action share a row.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map

from allocation.arena.dense import DenseForest
from allocation.contrast import FloatArray
from allocation.roots import BoolArray, IntArray
from benchmarks import config_of

SIDE, CELLS, ACTIONS = 4, 16, 4
EXACT = 1_000_000
"""Reference rollouts that stand for an exact value: its share of successes is rounded to so many."""


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        output: File to write.
        maps: Random maps.
        turns: Limit of turns; a rollout that reaches it has failed.
        success_rate: Chance that a step goes where it was meant to; else it slips to one of the two sides.
        frozen: Chance that a cell of a map is no hole.
        steps: Steps of exact gradient ascent that made the policy, from the uniform one.
        step_size: Of each, on the gradient of the mean value.
        spines: Root rollouts of each map.
        continuations: Continuations from each inner prefix of each spine.
        seed: Seeds maps and rollouts.
        quick: A very small record.
    """

    output: Path
    maps: int = 48
    turns: int = 16
    success_rate: float = 0.8
    frozen: float = 0.75
    steps: int = 8
    step_size: float = 4.0
    spines: int = 16
    continuations: int = 4
    seed: int = 1
    quick: bool = False


class Lakes(NamedTuple):
    """Some maps as finite Markov decision processes.

    Attributes:
        transition: Chance of each next cell, float64 [maps, cells, actions, cells].
        goal: Whether a cell is the goal, bool [maps, cells].
        over: Whether a cell is the goal or a hole, bool [maps, cells].
    """

    transition: FloatArray
    goal: BoolArray
    over: BoolArray


class Exact(NamedTuple):
    """What is true of a policy on some maps.

    Attributes:
        value: Chance of success after so many turns at a cell, float64 [maps, turns + 1, cells].
        gradient: Of the mean over maps of the value at the start with respect to the logits, float64 [cells, actions].
    """

    value: FloatArray
    gradient: FloatArray


def make_lakes(args: Args) -> Lakes:
    """Returns the maps of a recording, with the tables that Gymnasium's environment samples from."""
    transition = np.zeros((args.maps, CELLS, ACTIONS, CELLS))
    cells = np.zeros((args.maps, CELLS), dtype="U1")
    for i in range(args.maps):
        # Hashed, so that recordings with neighbouring seeds share no maps.
        desc = generate_random_map(SIDE, args.frozen, seed=int(np.random.default_rng([args.seed, i]).integers(2**31)))
        table = FrozenLakeEnv(desc=desc, is_slippery=True, success_rate=args.success_rate).P
        cells[i] = list("".join(desc))
        for cell in range(CELLS):
            for action in range(ACTIONS):
                for chance, to, _, _ in table[cell][action]:
                    transition[i, cell, action, to] += chance
    return Lakes(transition, cells == "G", (cells == "G") | (cells == "H"))


def softmax(logits: FloatArray) -> FloatArray:
    """Returns the policy of logits, float64 [cells, actions]."""
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def solve(lakes: Lakes, policy: FloatArray, turns: int) -> Exact:
    """Returns values by dynamic programming, and the gradient by the policy gradient theorem (Sutton et al., 2000).

    Over a finite horizon: the sum over turns and cells of the chance to be there times pi(a | cell) (Q(cell, a) - V(cell)).

    Args:
        lakes: The maps.
        policy: float64 [cells, actions].
        turns: Limit of turns.
    """
    maps = len(lakes.goal)
    value = np.zeros((maps, turns + 1, CELLS))
    value[:, turns] = lakes.goal
    advantage = np.zeros((maps, turns, CELLS, ACTIONS))
    for turn in reversed(range(turns)):
        q = np.einsum("mcan,mn->mca", lakes.transition, value[:, turn + 1])
        value[:, turn] = np.where(lakes.over, lakes.goal, (policy * q).sum(axis=-1))
        advantage[:, turn] = np.where(lakes.over[..., None], 0.0, q - value[:, turn][..., None])
    there = np.zeros((maps, CELLS))
    there[:, 0] = 1.0
    gradient = np.zeros((CELLS, ACTIONS))
    for turn in range(turns):
        gradient += (there[..., None] * policy * advantage[:, turn]).sum(axis=0) / maps
        there = np.einsum("mc,ca,mcan->mn", np.where(lakes.over, 0.0, there), policy, lakes.transition)
    return Exact(value, gradient)


def train(lakes: Lakes, args: Args) -> FloatArray:
    """Returns the policy after some steps of exact gradient ascent, float64 [cells, actions]."""
    logits = np.zeros((CELLS, ACTIONS))
    for _ in range(args.steps):
        logits += args.step_size * solve(lakes, softmax(logits), args.turns).gradient
    return softmax(logits)


class Turn(NamedTuple):
    """One turn: after `turn` turns the rollout went from `cell` by `action` to `to`."""

    turn: int
    cell: int
    action: int
    to: int


def rollout(
    lakes: Lakes, policy: FloatArray, turns: int, lake: int, turn: int, cell: int, rng: np.random.Generator
) -> Iterator[Turn]:
    """Yields the turns from a cell to the end."""
    while turn < turns and not lakes.over[lake, cell]:
        action = int(rng.choice(ACTIONS, p=policy[cell]))
        to = int(rng.choice(CELLS, p=lakes.transition[lake, cell, action]))
        yield Turn(turn, cell, action, to)
        turn, cell = turn + 1, to


def scores(policy: FloatArray, cells: IntArray, actions: IntArray) -> FloatArray:
    """Returns the gradients of log pi(action | cell) with respect to all logits, float64 [n, cells * actions]."""
    n = np.arange(len(cells))
    score = np.zeros((len(cells), CELLS, ACTIONS))
    score[n, cells] = -policy[cells]
    score[n, cells, actions] += 1
    return score.reshape(len(cells), -1)


def record(args: Args) -> DenseForest:
    """Draws, scores and returns a record."""
    if args.quick:
        args = replace(args, maps=6, spines=4, continuations=2)
    lakes = make_lakes(args)
    policy = train(lakes, args)
    exact = solve(lakes, policy, args.turns)
    columns: dict[str, list[int]] = {name: [] for name in ("prompt", "parent", "rollout", "continuation", "row", "to")}
    turns: list[Turn] = []
    rows: dict[tuple[int, Turn], int] = {}

    def add(lake: int, number: int, parent: int, turn: int, cell: int, rng: np.random.Generator) -> None:
        continuation = int(parent >= 0)
        for step in rollout(lakes, policy, args.turns, lake, turn, cell, rng):
            row = rows.setdefault((lake, step), len(rows))
            for name, value in zip(columns, (lake, parent, number, continuation, row, step.to), strict=True):
                columns[name].append(value)
            turns.append(step)
            parent = len(turns) - 1

    for lake in range(args.maps):
        rng = np.random.default_rng([args.seed, 1, lake])
        start = len(turns)
        for number in range(args.spines):
            add(lake, number, -1, 0, 0, rng)
        number = args.spines
        for node in range(start, len(turns)):
            step = turns[node]
            if lakes.over[lake, step.to] or step.turn + 1 == args.turns:
                continue
            for _ in range(args.continuations):
                add(lake, number, node, step.turn + 1, step.to, rng)
                number += 1

    prompt, to = np.array(columns["prompt"]), np.array(columns["to"])
    terminated, correct = lakes.over[prompt, to], lakes.goal[prompt, to]
    terminal = terminated | (np.array([step.turn for step in turns]) + 1 == args.turns)
    edges = [step for _, step in rows]
    cells = np.array([step.cell for step in edges])
    score = scores(policy, cells, np.array([step.action for step in edges]))
    scale = np.abs(score).max(axis=1) / 127
    norm2 = float((exact.gradient**2).sum())
    # What the best of observers sees: the place, and the map.
    view = np.concatenate([np.eye(CELLS)[to], lakes.over[prompt]], axis=1) * ~terminal[:, None]
    meta = {
        "family": "FrozenLake-v1",
        "label": f"exact, {args.steps} steps",
        "env_kwargs": {"is_slippery": True, "success_rate": args.success_rate, "max_episode_steps": args.turns},
        "temperature": 1.0,
        "features_explained": 1.0,
        "config": {**config_of(args), "output": args.output.name},
        "versions": {name: version(name) for name in ("numpy", "gymnasium")},
        "python": platform.python_version(),
        "gradient_norm2": norm2,
        "gradient_norm2_unbiased": norm2,
        "gradient_reliability": 1.0,
    }
    return DenseForest(
        meta,
        keys=np.array([f"map {i}" for i in range(args.maps)]),
        hops=np.zeros(args.maps, dtype=np.int16),
        prompt_tokens=np.ones(args.maps, dtype=np.int16),
        reference_successes=np.rint(EXACT * exact.value[:, 0, 0]).astype(np.int32),
        reference_count=np.full(args.maps, EXACT, dtype=np.int32),
        root_features=np.concatenate([np.eye(CELLS)[np.zeros(args.maps, int)], lakes.over], axis=1).astype(np.float16),
        prompt=prompt.astype(np.int16),
        parent=np.array(columns["parent"], dtype=np.int32),
        rollout=np.array(columns["rollout"], dtype=np.int32),
        continuation=np.array(columns["continuation"], dtype=bool),
        terminated=terminated,
        truncated=terminal & ~terminated,
        is_correct=correct,
        tool_error=np.zeros(len(turns), dtype=bool),
        reward=correct.astype(np.float32),
        action_tokens=np.ones(len(turns), dtype=np.int16),
        context_tokens=(~terminal).astype(np.int16),
        edge_row=np.array(columns["row"], dtype=np.int32),
        features=view.astype(np.float16),
        dot=(score @ exact.gradient.ravel()).astype(np.float32),
        norm2=(score**2).sum(axis=1).astype(np.float32),
        entropy=-(policy * np.log(policy)).sum(axis=1)[cells].astype(np.float16),
        sketch=np.rint(score / scale[:, None]).astype(np.int8),
        sketch_scale=scale.astype(np.float32),
    )


def main(args: Args) -> None:
    """Runs the recording."""
    dense = record(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    dense.save(args.output)
    print(
        f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, {dense.num_prompts} maps, {len(dense.parent)} turns, "
        f"{len(dense.dot)} different; {dense.gate()}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m benchmarks.record_lakes"))
