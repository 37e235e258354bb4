"""How fast is our BM25, beside rank-bm25, whose scores it has, and beside bm25s?

Each query alone, top 5, on the same tokens:

* *real*: 500 questions of HotpotQA, MuSiQue and 2WikiMultiHopQA over all their passages (about 9,000 different ones).
* *made*: documents of words with the frequencies of Zipf's law, 1,000 to 200,000 of them (1,000,000 with `--largest`).

Bars: our best five have rank-bm25's scores to 1e-9, 100 times the speed of rank-bm25, 1.5 times that of bm25s. Printed, too, is
how the time of a query grows with the number of documents (a power; no bar, but it should be that of the postings read).

    python -m benchmarks.retrieval --check
    python -m benchmarks.retrieval --quick
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import bm25s
import numpy as np
import tyro
from matplotlib import pyplot as plt
from rank_bm25 import BM25Okapi
from rich.console import Console

from benchmarks import commit, config_of, data_folder, versions
from benchmarks.arena_show import markdown, print_table
from trace_envs.multihop_qa.readers import load_dataset
from trace_envs.multihop_qa.retrieval import BM25Index, tokenize

RANK_BAR, BM25S_BAR, TOLERANCE = 100.0, 1.5, 1e-9
TOP = 5
TITLE = "Retrieval, microseconds a query"
FILES = {
    "hotpotqa": ("hotpotqa/hotpotqa_train.json", "hotpotqa/hotpotqa_train_corpus.json", 100),
    "musique": ("musique/musique_train.json", "musique/musique_train_corpus.json", 100),
    "2wikimultihopqa": (
        "2wikimultihopqa/2wikimultihopqa_train_500.json",
        "2wikimultihopqa/2wikimultihopqa_corpus.json",
        300,
    ),
}


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        data: Folder of the real data sets; without it TRACE_DATA_DIR, or `../shared/data`. Where there is none, only made
            documents are searched.
        sizes: Numbers of made documents.
        largest: A million as well, which takes some minutes and gigabytes.
        queries: Queries on made documents.
        rank_queries: Queries that rank-bm25 is asked, which scores every document for each.
        repeats: Repetitions; the median counts, the packages alternate.
        quick: Small sizes, few queries, and no files.
        check: Exit with status 1 if a bar is missed.
        seed: Seeds documents and queries.
        output: Directory of the results.
    """

    data: Path | None = None
    sizes: tuple[int, ...] = (1_000, 10_000, 50_000, 200_000)
    largest: bool = False
    queries: int = 500
    rank_queries: int = 20
    repeats: int = 5
    quick: bool = False
    check: bool = False
    seed: int = 0
    output: Path = Path("results")


def real(folder: Path) -> tuple[list[str], list[str]]:
    """Returns passages and questions of the data sets."""
    passages: dict[str, None] = {}
    questions = []
    for name, (data, corpus, count) in FILES.items():
        loaded = load_dataset(name, data_path=folder / data, corpus_path=folder / corpus)
        passages |= dict.fromkeys(f"{p.title} {p.text}" for p in loaded.passages)
        questions += [task.prompt for task in loaded.tasks[:count]]
    return list(passages), questions


def made(count: int, queries: int, seed: int) -> tuple[list[str], list[str]]:
    """Returns documents and queries of words whose frequencies follow Zipf's law."""
    rng = np.random.default_rng([seed, count])
    words = np.array([f"w{i}" for i in range(100_000)])
    chances = 1.0 / np.arange(1, len(words) + 1)
    edges = np.cumsum(chances / chances.sum())

    def text(length: int) -> str:
        return " ".join(words[np.searchsorted(edges, rng.random(length))])

    return [text(int(rng.integers(40, 120))) for _ in range(count)], [text(12) for _ in range(queries)]


def seconds_each(search: Callable[[str], Any], queries: Sequence[str]) -> float:
    """Returns seconds a query."""
    start = time.perf_counter()
    for query in queries:
        search(query)
    return (time.perf_counter() - start) / len(queries)


def measure(name: str, texts: list[str], queries: list[str], args: Args) -> dict[str, Any]:
    """Returns the row of a corpus."""
    tokens = [tokenize(text) for text in texts]
    start = time.perf_counter()
    ours = BM25Index(texts)
    building = time.perf_counter() - start
    rank = BM25Okapi(tokens)
    other = bm25s.BM25(method="lucene")
    other.index(tokens, show_progress=False)

    def ask_rank(query: str) -> Any:
        scores = rank.get_scores(tokenize(query))
        best = np.argpartition(-scores, TOP)[:TOP]
        return best[np.argsort(-scores[best])]

    def ask_bm25s(query: str) -> Any:
        return other.retrieve([tokenize(query)], k=TOP, show_progress=False, n_threads=0)

    def ask_ours(query: str) -> Any:
        return ours.search(query, TOP)

    few = queries[: args.rank_queries]
    worst = max(_difference(ours, rank, query) for query in few)
    ways: dict[str, tuple[Callable[[str], Any], list[str]]] = {
        "ours": (ask_ours, queries),
        "bm25s": (ask_bm25s, queries),
        "rank_bm25": (ask_rank, few),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(args.repeats + 1):
        for way, (search, asked) in ways.items():
            taken = seconds_each(search, asked)
            if repeat:  # the first warms up
                seconds[way].append(taken)
    # Ours on the queries that rank-bm25 was asked, for the ratio with it.
    same = median(seconds_each(ask_ours, few) for _ in range(max(args.repeats, 3)))
    middle = {way: median(values) for way, values in seconds.items()}
    to_rank, to_bm25s = middle["rank_bm25"] / same, middle["bm25s"] / middle["ours"]
    return {
        "corpus": name,
        "documents": len(texts),
        "queries": len(queries),
        "ours_us": 1e6 * middle["ours"],
        "bm25s_us": 1e6 * middle["bm25s"],
        "rank_bm25_us": 1e6 * middle["rank_bm25"],
        "to_rank": to_rank,
        "to_bm25s": to_bm25s,
        "difference": worst,
        "build_s": building,
        "met": to_rank >= RANK_BAR and to_bm25s >= BM25S_BAR and worst <= TOLERANCE,
    }


def _difference(ours: BM25Index, rank: BM25Okapi, query: str) -> float:
    """Returns by how much our best scores differ from rank-bm25's, relative to the best one."""
    found, scores = ours.search(query, TOP)
    theirs = np.asarray(rank.get_scores(tokenize(query)))
    best = np.sort(theirs[theirs > 0])[::-1][:TOP]
    if len(found) != len(best):
        return float("inf")
    if len(best) == 0:
        return 0.0
    return float(max(np.abs(best - scores).max(), np.abs(theirs[found] - scores).max()) / best[0])


def corpora(args: Args, console: Console) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields names, documents and queries."""
    folder = args.data or data_folder()
    if folder.is_dir():
        texts, questions = real(folder)
        yield "real", texts, questions[:: 10 if args.quick else 1]
    else:
        console.print(f"no real data in {folder}; only made documents are searched")
    for size in (*args.sizes, *((1_000_000,) if args.largest else ())):
        yield "made", *made(size, args.queries, args.seed)


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table, its headline first."""
    bars = f"bars {RANK_BAR:g}x, {BM25S_BAR:g}x, {TOLERANCE:g}"
    table = [
        ["corpus", "documents", "ours", "bm25s", "rank_bm25", "rank_bm25 / ours", "bm25s / ours", "difference", bars]
    ]
    for row in rows:
        times = [f"{row[name]:.0f}" for name in ("ours_us", "bm25s_us", "rank_bm25_us")]
        ratios = [f"{row['to_rank']:.0f}", f"{row['to_bm25s']:.2f}", f"{row['difference']:.1g}"]
        table.append([row["corpus"], f"{row['documents']:,}", *times, *ratios, "met" if row["met"] else "MISSED"])
    return table


def growth(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Returns the slope of log time over log size on made documents."""
    points = [(row["documents"], row[name]) for row in rows if row["corpus"] == "made"]
    if len(points) < 2:
        return float("nan")
    return float(np.polyfit(np.log([n for n, _ in points]), np.log([t for _, t in points]), 1)[0])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws time over the number of made documents."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    points = [row for row in rows if row["corpus"] == "made"]
    for name, label in (("rank_bm25_us", "rank-bm25"), ("bm25s_us", "bm25s"), ("ours_us", "ours")):
        axes.loglog([r["documents"] for r in points], [r[name] for r in points], marker="o", label=label)
    axes.set(xlabel="documents", ylabel="microseconds a query", title="BM25, one query, top 5")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> bool:
    """Runs the benchmark; returns whether its bars are met on the real passages and the largest made corpus."""
    if args.quick:
        args = replace(args, sizes=(1_000, 10_000), queries=50, rank_queries=5, repeats=2)
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = [measure(name, texts, queries, args) for name, texts, queries in corpora(args, console)]
    slopes = ", ".join(f"{name} {growth(rows, f'{name}_us'):.2f}" for name in ("ours", "bm25s", "rank_bm25"))
    line = f"time grows with the number of documents to the power: {slopes}"
    if not args.quick:
        args.output.mkdir(parents=True, exist_ok=True)
        shared = {"config": config_of(args), "versions": versions("numpy", "bm25s", "rank-bm25"), "commit": commit()}
        (args.output / "retrieval.jsonl").write_text("".join(json.dumps(row | shared) + "\n" for row in rows))
        (args.output / "retrieval.md").write_text(f"{markdown(TITLE, cells(rows))}\n{line}\n")
        draw(rows, args.output / "retrieval.png")
    print_table(console, TITLE, cells(rows))
    console.print(line, highlight=False)
    judged = [row for row in rows if row["corpus"] == "real"] + rows[-1:]
    found = ", ".join(f"{r['to_rank']:.0f} and {r['to_bm25s']:.2f} ({r['documents']:,})" for r in judged)
    console.print(f"times rank-bm25 and bm25s: {found}", highlight=False)
    return all(row["met"] for row in judged)


if __name__ == "__main__":
    given = tyro.cli(Args, prog="python -m benchmarks.retrieval")
    sys.exit(0 if main(given) or not given.check else 1)
