"""The bars of the arena.

Invariant: they are judged on the very figures of the table, at equal tokens; nothing is left out but the oracle, which no run
can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.arena_show import Result

RATIO_BAR = 1.7
GRPO_RANGE = (0.25, 0.40)
SIGNALS = ("cosine", "snr_per_1k")


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar on one world: what was found, and whether it holds."""

    text: str
    holds: bool


def bars(results: Sequence[Result]) -> list[Bar]:
    """Judges all worlds.

    * `trace` has at least `RATIO_BAR` times the effective ratio of `grpo` wherever `grpo` has one in `GRPO_RANGE`. The ratio is
      the paper's, over whole trees; the one over root rollouts is printed beside it.
    * `trace_plus` has more gradient signal per token than any other method, by both measures, without overlap of intervals.

    A bar that could not be judged does not hold.
    """
    found = []
    judged = 0
    for world in dict.fromkeys(r.world for r in results):
        here = {r.method: r.sample for r in results if r.world == world and r.comparison == "tokens"}
        if {"grpo", "trace"} <= set(here):
            base = here["grpo"].interval("ratio_tree")
            tree, roots = (here["trace"].over(here["grpo"], name) for name in ("ratio_tree", "ratio_roots"))
            text = (
                f"{world}: effective ratio of trace over grpo's {base.mean:.1%}: {tree.mean:.2f} "
                f"[{tree.low:.2f}, {tree.high:.2f}] (over roots alone {roots.mean:.2f})"
            )
            if GRPO_RANGE[0] <= base.mean <= GRPO_RANGE[1]:
                judged += 1
                found.append(Bar(f"{text}, bar {RATIO_BAR}", tree.mean >= RATIO_BAR))
            else:
                found.append(Bar(f"{text}, no bar outside of {GRPO_RANGE[0]:.0%} to {GRPO_RANGE[1]:.0%}", True))
        if "trace_plus" not in here:
            found.append(Bar(f"{world}: trace_plus was not run", False))
            continue
        for name in SIGNALS:
            ours = here["trace_plus"].interval(name)
            rivals = {m: s.interval(name) for m, s in here.items() if m not in ("trace_plus", "oracle")}
            near = [m for m, interval in rivals.items() if not ours.above(interval)]
            text = f"{world}: {name} of trace_plus {ours.mean:.3f} [{ours.low:.3f}, {ours.high:.3f}]"
            rest = f"not clearly above {', '.join(near)}" if near else "above every other method"
            found.append(Bar(f"{text}, {rest}", bool(rivals) and not near))
    if not judged:
        found.append(
            Bar(f"no world has grpo at {GRPO_RANGE[0]:.0%} to {GRPO_RANGE[1]:.0%}: trace was not judged", False)
        )
    return found
