"""What do snapshots cost, in time and memory, and does the cost grow with what it must not grow with?

Five questions, each with its bar where it has one:

* speed: snapshot() and restore() at turn 8 of TraceMultiHopQA-v0 over a large corpus, against `copy.deepcopy` of the same
  environment with the corpus shared (bar: 100 times faster) and against the emulator's own state in ale-py (5 times).
* growth: the same at 1 to 64 turns, and over a hundred to all passages: the slope of log time over log size (no bar).
* memory: a tree of 1,000 leaves of 8 turns with a snapshot at every node, against the bytes of its text (bar: 1.5 times).
* overhead: what `TreeAllocationWrapper` adds to a step of a plain vector of 64 CartPoles (bar: 30 %, benchmarks/overhead.py).
* adapters: what taking and putting back costs for environments of other packages (no bar).

    python -m benchmarks.snapshots --check
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import tempfile
import timeit
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from rich.console import Console
from rich.table import Table

import trace_envs
from benchmarks import config_of, data_folder, versions
from benchmarks.overhead import wrapper_overhead
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.snapshots import EnvSnapshot, adapter_for
from trace_envs.snapshots.stack import split

BARS = {"deepcopy": 100.0, "ale": 5.0, "memory": 1.5, "overhead": 0.30}
PACKAGES = ("gymnasium", "numpy", "ale-py", "mujoco", "minigrid")
FOREIGN = (
    "CartPole-v1",
    "FrozenLake-v1",
    "Taxi-v4",
    "Blackjack-v1",
    "MiniGrid-DoorKey-5x5-v0",
    "InvertedPendulum-v5",
    "Ant-v5",
    "ALE/Pong-v5",
)


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        data_path: Questions of 2WikiMultiHopQA; without them those in TRACE_DATA_DIR, or the embedded encyclopedia.
        corpus_path: The passages to search.
        leaves: Leaves of the tree whose memory is measured.
        turns: Turns of each of its rollouts.
        quick: A tree of a tenth of the leaves, and no files.
        check: Exit with status 1 if a bar is missed.
        seed: Seeds everything random.
        output: Directory of the results.
    """

    data_path: Path | None = None
    corpus_path: Path | None = None
    leaves: int = 1000
    turns: int = 8
    quick: bool = False
    check: bool = False
    seed: int = 0
    output: Path = Path("results")


def make_env(args: Args, corpus: Path | None = None, max_turns: int = 128) -> MultiHopQAEnv:
    """Returns an environment over real passages if they are given."""
    if args.data_path is None:
        return MultiHopQAEnv(max_turns=max_turns)
    return MultiHopQAEnv(
        dataset="2wikimultihopqa",
        data_path=str(args.data_path),
        corpus_path=None if corpus is None else str(corpus),
        max_turns=max_turns,
    )


def searches(env: MultiHopQAEnv, rng: np.random.Generator) -> Iterator[str]:
    """Yields turns that search for three words of a random passage."""
    while True:
        words = env.dataset.passages[int(rng.integers(len(env.dataset.passages)))].text.split()
        query = " ".join(rng.choice(words, size=3)).replace("\\", "").replace('"', "")
        call = json.dumps({"name": "search", "arguments": {"query": query}}, ensure_ascii=False)
        yield f"I should find out about {query}.\n<tool_call>{call}</tool_call>"


def play(env: gym.Env, turns: int, rng: np.random.Generator) -> EnvSnapshot:
    """Begins an episode and takes some turns; returns the first moment."""
    env.reset(seed=int(rng.integers(2**31)))
    first = trace_envs.snapshot(env)
    texts = searches(env.unwrapped, rng)  # type: ignore[arg-type]
    for _ in range(turns):
        env.step(next(texts))
    return first


def microseconds(call: Callable[[], Any]) -> float:
    """Returns the least time of a call over repeats, in microseconds."""
    timer = timeit.Timer(call)
    number, _ = timer.autorange()
    return min(timer.repeat(repeat=7, number=max(number // 2, 1))) / max(number // 2, 1) * 1e6


def there_and_back(env: gym.Env, elsewhere: EnvSnapshot) -> float:
    """Returns the microseconds of snapshot() and restore() at one moment, coming from another, through the whole stack."""
    here = trace_envs.snapshot(env)

    def both() -> None:
        trace_envs.restore(env, elsewhere)
        trace_envs.snapshot(env)
        trace_envs.restore(env, here)
        trace_envs.snapshot(env)

    return microseconds(both) / 2


def speed(args: Args) -> list[dict[str, Any]]:
    """Snapshots against deep copies and against ale-py."""
    env = make_env(args, args.corpus_path)
    first = play(env, 8, np.random.default_rng(args.seed))

    def deep() -> Any:
        return copy.deepcopy(env, {id(env.dataset): env.dataset, id(env.index): env.index})

    import ale_py

    gym.register_envs(ale_py)
    ale: Any = gym.make("ALE/Pong-v5").unwrapped
    ale.reset(seed=args.seed)
    for _ in range(8):
        ale.step(0)

    ours = there_and_back(env, first)
    stack = PassiveEnvChecker(OrderEnforcing(TimeLimit(env, 128)))
    through = there_and_back(stack, play(stack, 8, np.random.default_rng(args.seed)))
    clone = microseconds(lambda: ale.restore_state(ale.clone_state(include_rng=True)))
    rows = []
    for name, other in (("deepcopy", microseconds(deep)), ("ale", clone)):
        rows.append(
            {
                "figure": name,
                "passages": len(env.dataset.passages),
                "microseconds": ours,
                "microseconds_with_wrappers": through,
                "other_microseconds": other,
                "value": other / ours,
                "bar": BARS[name],
                "met": other / ours >= BARS[name],
            }
        )
    return rows


def growth(args: Args) -> list[dict[str, Any]]:
    """Slopes over depth and over the size of the corpus."""
    rng = np.random.default_rng(args.seed)
    env = make_env(args, args.corpus_path)
    depths = [1, 2, 4, 8, 16, 32, 64]
    by_depth = []
    for depth in depths:
        by_depth.append(there_and_back(env, play(env, depth, rng)))
    rows = [{"figure": "growth over turns", "sizes": depths, "microseconds": by_depth}]
    if args.corpus_path is not None:
        passages = json.loads(args.corpus_path.read_text())
        sizes, by_size = [], []
        with tempfile.TemporaryDirectory() as folder:
            for size in sorted({min(size, len(passages)) for size in (100, 1000, 3000, len(passages))}):
                part = Path(folder, f"{size}.json")
                part.write_text(json.dumps(passages[:size]))
                small = make_env(args, part)
                sizes.append(len(small.dataset.passages))
                by_size.append(there_and_back(small, play(small, 8, rng)))
        rows.append({"figure": "growth over passages", "sizes": sizes, "microseconds": by_size})
    for row in rows:
        row["value"] = float(np.polyfit(np.log(row["sizes"]), np.log(row["microseconds"]), 1)[0])
    return rows


def memory(args: Args) -> list[dict[str, Any]]:
    """Bytes of all snapshots of a tree, as the allocator counts them, over the bytes of its text.

    Half of the leaves are root rollouts, the others start at a random prefix of one of them. Text counts once for each edge:
    what the agent wrote and what it was shown. It is measured twice: as Python holds the strings (the bar: what snapshots
    add to text that has to be held anyway), and in UTF-8, which is smaller wherever a passage has a character beyond
    Latin-1, since Python then takes two bytes for each.
    """
    env = make_env(args, args.corpus_path, max_turns=args.turns + 1)
    rng = np.random.default_rng(args.seed)
    texts = searches(env, rng)
    env.reset(seed=args.seed)
    root = env.snapshot()
    gc.collect()
    tracemalloc.start()
    kept = [root]
    inner = []
    for leaf in range(args.leaves):
        start = root if leaf < args.leaves // 2 else inner[int(rng.integers(len(inner)))]
        env.restore(start, seed=leaf)
        for turn in range(start.turn or 0, args.turns):
            env.step(next(texts))
            kept.append(env.snapshot())
            if leaf < args.leaves // 2 and turn + 1 < args.turns:
                inner.append(kept[-1])
    del inner, texts
    env.restore(root)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    strings = [text for taken in kept[1:] for text in (taken.payload.history.turn.text, taken.observation)]
    sizes = {
        "memory": sum(map(sys.getsizeof, strings)),
        "memory against UTF-8": sum(len(text.encode()) for text in strings),
    }
    rows: list[dict[str, Any]] = [
        {
            "figure": name,
            "leaves": args.leaves,
            "nodes": len(kept),
            "bytes": held,
            "text_bytes": size,
            "value": held / size,
        }
        for name, size in sizes.items()
    ]
    rows[0] |= {"bar": BARS["memory"], "met": rows[0]["value"] <= BARS["memory"]}
    return rows


def adapters(args: Args) -> Iterator[dict[str, Any]]:
    """Costs of foreign environments, twenty steps into an episode."""
    import ale_py
    import minigrid

    gym.register_envs(ale_py)
    gym.register_envs(minigrid)
    for env_id in FOREIGN:
        env = gym.make(env_id)
        env.reset(seed=args.seed)
        env.action_space.seed(args.seed)
        for _ in range(20):
            *_, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                env.reset()
        taken = trace_envs.snapshot(env)
        yield {
            "figure": f"adapter {env_id}",
            "adapter": adapter_for(split(env)[1]).name,
            "take_microseconds": microseconds(lambda e=env: trace_envs.snapshot(e)),
            "put_microseconds": microseconds(lambda e=env, t=taken: trace_envs.restore(e, t)),
            "bytes": len(taken.to_bytes()),
        }
        env.close()


def main(args: Args) -> int:
    """Runs the benchmark; returns the exit status."""
    args = with_data(replace(args, leaves=args.leaves // 10) if args.quick else args)
    rows = [*speed(args), *growth(args), *memory(args), *adapters(args)]
    found = wrapper_overhead(seed=args.seed)
    # Uniform sampling takes no snapshot but at roots: what is left is the wrapper alone.
    for name, figure in (("grpo", "overhead"), ("trace", "overhead with a snapshot at each node")):
        rows.append(
            {"figure": figure, "plain_microseconds": found["plain"], "value": found[name]["overhead"], **found[name]}
        )
        if name == "grpo":
            rows[-1] |= {"bar": BARS["overhead"], "met": found[name]["overhead"] <= BARS["overhead"]}
    table = Table("figure", "value", "bar", "", title="Snapshots")
    for row in rows:
        bar = row.get("bar")
        verdict = "" if bar is None else "met" if row["met"] else "[bold red]missed[/]"
        value = row.get("value")
        shown = (
            f"{value:.3g}"
            if value is not None
            else f"{row['take_microseconds']:.1f} + {row['put_microseconds']:.1f} us"
        )
        note = row["adapter"] if str(row["figure"]).startswith("adapter") else verdict
        table.add_row(row["figure"], shown, "" if bar is None else f"{bar:g}", note)
    Console().print(table)
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        config = config_of(args)
        with (args.output / "snapshots.jsonl").open("w") as file:
            for row in rows:
                file.write(json.dumps(row | {"config": config, "versions": versions(*PACKAGES)}) + "\n")
    return int(args.check and any(not row.get("met", True) for row in rows))


def with_data(args: Args) -> Args:
    """Fills in the real data of TRACE_DATA_DIR where it is there."""
    folder = data_folder() / "2wikimultihopqa"
    data, corpus = folder / "2wikimultihopqa_train_500.json", folder / "2wikimultihopqa_corpus.json"
    if args.data_path is None and args.corpus_path is None and data.exists() and corpus.exists():
        return replace(args, data_path=data, corpus_path=corpus)
    return args


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m benchmarks.snapshots")))
