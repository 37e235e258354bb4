"""How many turns a second does `TraceMultiHopQA-v0` take, beside rank-bm25's own scoring, and beside GEM's tool environment?

A scripted agent answers real HotpotQA questions (synthetic ones where the real data are absent), over HotpotQA's own passages
and over those of three data sets together: it searches by words of what it has read, then answers. The same texts are then
played in two environments that differ in their retriever only, and every observation is compared.

GEM (gem-llm), in an environment of its own, plays the same episodes, and all that it searches for has been found for it.

Bars: 30 times the turns a second of the environment with rank-bm25, 3 times those of GEM as it comes (its search tool asks a
server on the same machine). How the time of a turn grows with its number is printed, too (no bar).

    python -m benchmarks.environment --check
    python -m venv .venv-gem && .venv-gem/bin/pip install gem-llm==0.1.0 datasets requests
    python -m benchmarks.environment --check --gem .venv-gem/bin/python
    python -m benchmarks.environment --quick
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from rank_bm25 import BM25Okapi
from rich.console import Console

from agents.policies.scripted import SCRIPTS
from benchmarks import commit, config_of, data_folder, versions
from benchmarks.arena_show import markdown, print_table
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.multihop_qa.passages import read_passages
from trace_envs.multihop_qa.retrieval import tokenize
from trace_envs.state import Act, ToolCall

BAR, GEM_BAR = 30.0, 3.0
TITLE = "Turns of TraceMultiHopQA-v0"
GEM_TITLE = "The same episodes in GEM's ToolEnvWrapper, everything found beforehand"
CORPORA = {
    "hotpotqa": "hotpotqa_train_corpus.json",
    "musique": "musique_train_corpus.json",
    "2wikimultihopqa": "2wikimultihopqa_corpus.json",
}


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        questions: Questions that are played.
        rank_questions: Questions that are played with rank-bm25, the first of them.
        repeats: Repetitions; the median counts, the two alternate.
        gem: Interpreter of an environment that has gem-llm; without one GEM is left out.
        quick: Few of all, and no files.
        check: Exit with status 1 if a bar is missed.
        output: Directory of the results.
    """

    questions: int = 100
    rank_questions: int = 10
    repeats: int = 5
    gem: str | None = None
    quick: bool = False
    check: bool = False
    output: Path = Path("results")

    def __post_init__(self) -> None:
        if self.gem is not None and shutil.which(self.gem) is None:
            raise ValueError(
                f"gem must be an interpreter of an environment that has gem-llm, there is no program {self.gem!r}; "
                "make one with python -m venv .venv-gem && .venv-gem/bin/pip install gem-llm==0.1.0 datasets requests"
            )


class RankBM25:
    """A retriever that scores all documents by rank-bm25, as its users do."""

    def __init__(self, texts: Sequence[str]):
        self._index = BM25Okapi([tokenize(text) for text in texts])

    def search(self, query: str, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns positions and scores of the best documents that hold a word of the query; of equals the first."""
        scores = np.asarray(self._index.get_scores(tokenize(query)))
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[scores[best] > 0]
        return best, scores[best]


def environments(folder: Path) -> Iterator[tuple[str, MultiHopQAEnv]]:
    """Yields environments with what they search: HotpotQA's own passages, then those of three data sets together."""
    root = data_folder()
    data = root / "hotpotqa" / "hotpotqa_train.json"
    corpora = [root / name / file for name, file in CORPORA.items()]
    if not data.exists() or not all(corpus.exists() for corpus in corpora):
        yield "synthetic", MultiHopQAEnv(split="test")
        return
    yield "hotpotqa", MultiHopQAEnv(dataset="hotpotqa", data_path=str(data), corpus_path=str(corpora[0]))
    passages = dict.fromkeys(p for corpus in corpora for p in read_passages(corpus, "corpus", " "))
    together = folder / "passages.jsonl"
    together.write_text("".join(json.dumps({"title": p.title, "text": p.text}) + "\n" for p in passages))
    yield "hotpotqa, all passages", MultiHopQAEnv(dataset="hotpotqa", data_path=str(data), corpus_path=str(together))


Episode = tuple[str, list[tuple[str, Act]]]
"""A task's id with the thoughts and actions of the scripted agent."""


def episodes(env: MultiHopQAEnv, count: int) -> list[Episode]:
    """Lets the scripted agent play the first tasks."""
    rng, found = np.random.default_rng(0), []
    for task_id in env.task_ids()[:count]:
        env.reset(seed=0, options={"task_id": task_id})
        acts = []
        while not env.state.done:
            said = SCRIPTS["bm25"](env.state, rng)
            assert not isinstance(said, str)
            acts.append(said)
            env.step(env.action_format.render(*said))
        found.append((task_id, acts))
    return found


def for_gem(thought: str, act: Act) -> str:
    """Writes a turn in the tags that GEM reads."""
    said = f"<search>{act.arguments['query']}</search>" if isinstance(act, ToolCall) else f"<answer>{act.text}</answer>"
    return f"<think>{thought}</think>{said}"


def play_gem(python: str, env: MultiHopQAEnv, played: Sequence[Episode], repeats: int) -> dict[str, Any]:
    """Has GEM play the episodes; returns what `benchmarks.environment_gem` prints."""
    tasks, passages = {task.task_id: task for task in env.dataset.tasks}, env.dataset.passages
    queries = {act.arguments["query"].strip() for _, acts in played for _, act in acts if isinstance(act, ToolCall)}
    found = {
        query: [
            {"document": {"contents": f"{passages[i].title}\n{passages[i].text}"}}
            for i in env.index.search(query, env.top_k)[0]
        ]
        for query in queries
    }
    given = {
        "episodes": [
            {"id": i, "question": tasks[i].prompt, "answers": tasks[i].answers, "texts": [for_gem(*a) for a in acts]}
            for i, acts in played
        ],
        "found": found,
        "repeats": repeats,
    }
    script = Path(__file__).with_name("environment_gem.py")
    done = subprocess.run([python, str(script)], input=json.dumps(given), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python} could not run GEM:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def play(env: MultiHopQAEnv, played: Sequence[Episode]) -> tuple[float, list[str]]:
    """Plays episodes; returns seconds a turn and all observations."""
    written = [(task_id, [env.action_format.render(*said) for said in acts]) for task_id, acts in played]
    seen, turns, start = [], 0, time.perf_counter()
    for task_id, texts in written:
        env.reset(seed=0, options={"task_id": task_id})
        for text in texts:
            observation, *_ = env.step(text)
            seen.append(observation)
            turns += 1
    return (time.perf_counter() - start) / turns, seen


def by_turn(env: MultiHopQAEnv, turns: int) -> list[float]:
    """Returns the seconds of each of so many turns with the same search, medians over repetitions."""
    text = '<tool_call>{"name": "search", "arguments": {"query": "the history of the city"}}</tool_call>'
    taken = []
    for _ in range(30):
        env.reset(seed=0)
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            env.step(text)
            times.append(time.perf_counter() - start)
        taken.append(times)
    return np.median(taken, axis=0).tolist()


def draw(times: Sequence[float], path: Path) -> None:
    """Draws the time of a turn over its number."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, len(times) + 1), [1e6 * t for t in times])
    axes.set(xlabel="turn", ylabel="microseconds", title="A turn with a search")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure(searched: str, ours: MultiHopQAEnv, args: Args) -> dict[str, Any]:
    """Returns the row of an environment."""
    theirs = copy.copy(ours)
    theirs.index = RankBM25([f"{p.title} {p.text}" for p in ours.dataset.passages])
    played = episodes(ours, args.questions)
    few = played[: args.rank_questions]
    same = play(ours, few)[1] == play(theirs, few)[1]
    seconds: dict[str, list[float]] = {"all": [], "ours": [], "rank": []}
    for repeat in range(args.repeats + 1):
        for name, env, what in (("all", ours, played), ("ours", ours, few), ("rank", theirs, few)):
            taken, _ = play(env, what)
            if repeat:  # the first warms up
                seconds[name].append(taken)
    middle = {name: median(values) for name, values in seconds.items()}
    ratio = middle["rank"] / middle["ours"]
    gem = {} if args.gem is None else against_gem(play_gem(args.gem, ours, played, args.repeats), middle["all"])
    return {
        "data": searched,
        "passages": len(ours.dataset.passages),
        "turns": sum(len(texts) for _, texts in played),
        "turns_per_second": 1 / middle["all"],
        "rank_bm25_turns_per_second": 1 / middle["rank"],
        "ratio": ratio,
        "same_observations": same,
        "met": ratio >= BAR and same,
        **gem,
    }


def against_gem(theirs: dict[str, Any], ours: float) -> dict[str, Any]:
    """Returns what a row says of GEM, given the seconds of our turns."""
    ratios = {f"gem_{name}_ratio": taken / ours for name, taken in theirs["seconds"].items()}
    speeds = {f"gem_{name}_turns_per_second": 1 / taken for name, taken in theirs["seconds"].items()}
    return {
        **speeds,
        **ratios,
        "gem_correct": theirs["correct"]["http"],
        "gem_met": ratios["gem_http_ratio"] >= GEM_BAR,
    }


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table, its headline first."""
    table = [["searched", "passages", "turns/s", "with rank-bm25", "ratio", f"bar {BAR:g}", "same observations"]]
    for row in rows:
        speeds = [f"{row[name]:,.0f}" for name in ("turns_per_second", "rank_bm25_turns_per_second")]
        verdict = "met" if row["met"] else "MISSED"
        table.append(
            [
                row["data"],
                f"{row['passages']:,}",
                *speeds,
                f"{row['ratio']:.1f}",
                verdict,
                str(row["same_observations"]),
            ]
        )
    return table


def gem_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table of GEM; none without GEM."""
    table = [["searched", "turns/s", "GEM", "ratio", f"bar {GEM_BAR:g}", "GEM without its server", "ratio"]]
    for row in rows:
        if "gem_met" in row:
            speeds = [f"{row[name]:,.0f}" for name in ("turns_per_second", "gem_http_turns_per_second")]
            verdict = "met" if row["gem_met"] else "MISSED"
            free = [f"{row['gem_free_turns_per_second']:,.0f}", f"{row['gem_free_ratio']:.2f}"]
            table.append([row["data"], *speeds, f"{row['gem_http_ratio']:.1f}", verdict, *free])
    return table[: len(table) * (len(table) > 1)]


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether the bar is met everywhere and all observations are the same."""
    if args.quick:
        args = replace(args, questions=20, rank_questions=4, repeats=2)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, env, args) for name, env in environments(Path(folder))]
    long = MultiHopQAEnv(dataset="synthetic", split="validation", max_turns=64)
    times = by_turn(long, 16 if args.quick else 64)
    slope = float(np.polyfit(np.log(np.arange(4, len(times) + 1)), np.log(times[3:]), 1)[0])
    line = f"a turn's time grows with its number to the power {slope:.2f}"
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {"config": config_of(args), "versions": versions("gymnasium", "rank-bm25"), "commit": commit()}
        text = "".join(json.dumps(row | shared) + "\n" for row in (*rows, {"turn_seconds": times, "slope": slope}))
        (args.output / "environment.jsonl").write_text(text)
        tables = [markdown(TITLE, cells(rows)), *(markdown(GEM_TITLE, t) for t in [gem_cells(rows)] if t)]
        (args.output / "environment.md").write_text("\n".join([*tables, line]) + "\n")
        draw(times, args.output / "environment.png")
    print_table(console, TITLE, cells(rows))
    if gem_cells(rows):
        print_table(console, GEM_TITLE, gem_cells(rows))
    console.print(line, highlight=False)
    ratios = ", ".join(f"{row['ratio']:.1f} ({row['passages']:,} passages)" for row in rows)
    console.print(f"turns over those with rank-bm25: {ratios}", highlight=False)
    return all(row["met"] and row.get("gem_met", True) for row in rows)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.environment")
    sys.exit(0 if main(given) or not given.check else 1)
