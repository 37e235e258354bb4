"""`check_snapshot(env)`: does an environment come back exactly, as far as playing it can tell?

Invariant: a check that was not made is in the report, with the reason; an error names the check, the turn and the first thing
that differs, and says what to look for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from trace_envs.snapshots.checks import SnapshotCheckError
from trace_envs.snapshots.elsewhere import ChecksElsewhere
from trace_envs.snapshots.episodes import Actions, Episode, default_actions, record

__all__ = ["SnapshotCheckError", "SnapshotReport", "check_snapshot"]


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """What was checked and held.

    Attributes:
        env_id: The environment.
        adapter: Name of the adapter that carries it.
        passed: Names of the checks that passed, in order.
        skipped: Names of those that could not be made, with the reason.
        episodes: Episodes played.
        turns: Their turns, repetitions apart.
    """

    env_id: str
    adapter: str
    passed: tuple[str, ...]
    skipped: Mapping[str, str]
    episodes: int
    turns: int


def check_snapshot(
    env: gym.Env,
    *,
    seed: int = 0,
    turns: int = 16,
    episodes: int = 3,
    actions: Actions | None = None,
    make: Callable[[], gym.Env] | None = None,
    another_process: bool = True,
) -> SnapshotReport:
    """Checks that snapshots of an environment and of all wrappers around it are exact.

    It plays random episodes, takes a snapshot before every turn, and looks whether what follows a restore is what followed
    the first time: observations, rewards, flags and infos, wrappers' attributes, random states. An environment whose spec
    says `nondeterministic` may go on differently; there only what was restored is compared.

    Args:
        env: The environment, with or without wrappers. It is left reset.
        seed: Seed of everything that the check draws, and of the first episode.
        turns: Most turns of an episode.
        episodes: Number of episodes.
        actions: Called with a generator, the observation and the info; returns an action. Give one where random actions end
            an episode at once or never reach what is random. By default samples of the action space, or calls of the tools
            that `info["tools"]` lists.
        make: Makes another environment of the same kind with the same wrappers; by default the environment's spec does.
        another_process: Restore in another process too, which is started for it.

    Returns:
        What was checked, and what could not be.

    Raises:
        SnapshotCheckError: The first divergence.
        SnapshotUnsupportedError: No adapter can carry the environment, or a wrapper is not known.
        ValueError: `turns` or `episodes` is less than 1.
    """
    if min(turns, episodes) < 1:
        raise ValueError(f"turns and episodes must be at least 1, got turns={turns} and episodes={episodes}")
    rng = np.random.default_rng(seed)
    choose = default_actions(env, seed) if actions is None else actions
    checks = ChecksElsewhere(env, rng, choose, make)
    repeats = not (env.spec is not None and env.spec.nondeterministic)
    # Why checks of these kinds cannot be made, where they cannot.
    no_repeats = "" if repeats else "spec.nondeterministic: the same actions need not give the same again"
    passed: dict[str, None] = {}

    def run(name: str, check: Callable[[], None], reason: str = "") -> None:
        if reason:
            checks.skipped[name] = reason
            return
        checks.name = name
        check()
        passed[name] = None

    restored = "a restored environment was stepped; restore()"
    played: list[Episode] = []
    for number in range(episodes):
        checks.episode = record(env, seed + number, turns, lambda observation, info: choose(rng, observation, info))
        played.append(checks.episode)
        no_digest = next((moment.no_digest for moment in checks.episode.moments if moment.digest is None), "")
        # Those that name a cause come before those that only see its effect.
        run("immutability", lambda: checks.immutability("the environment was stepped; snapshot()"), no_digest)
        run("random state", checks.random_state)
        run("global generators", checks.global_generators, no_repeats)
        run("immutability", lambda: checks.immutability(restored), no_digest)
        run("wrapper state", checks.wrapper_state)
        run("restore and re-step", checks.restore_and_re_step, no_repeats)
        run("repeated restore", checks.repeated_restore, no_repeats)
        run("seeded restore", checks.seeded_restore, no_repeats)
        run("branch independence", checks.branch_independence, no_repeats)
        run("digest", lambda: checks.digest(repeats), no_digest)
    checks.episode = max(played, key=lambda episode: len(episode.steps))
    run("sibling instance", lambda: checks.sibling(repeats))
    if another_process:
        run("another process", checks.another_process, no_repeats)
    else:
        checks.skipped["another process"] = "another_process=False"
    for checks.episode in played:
        run("immutability", lambda: checks.immutability(restored), no_digest)
    env.reset(seed=seed)
    first = played[0].moments[0].taken
    return SnapshotReport(
        env_id=first.env_id,
        adapter=first.adapter,
        passed=tuple(name for name in passed if name not in checks.skipped),
        skipped=checks.skipped,
        episodes=episodes,
        turns=sum(len(episode.steps) for episode in played),
    )
