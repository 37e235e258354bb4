"""The episodes of `benchmarks.environment` in GEM's tool environment (gem-llm), by an interpreter of GEM's own.

`benchmarks.environment --gem PYTHON` runs it; it imports nothing of this repository, since GEM pins versions of its own.
Standard input holds the episodes and what each search finds. Searching itself is free for GEM: its search tool asks a local
server, as it always does, which has the answers ready (`http`); and once more it is given them without asking anybody (`free`).
Standard output ends with a line of JSON: the seconds of a turn, and the share of episodes that GEM judges correct.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import msgspec
from datasets import Dataset
from gem.envs.qa_env import QaEnv
from gem.tools.search_tool import SearchTool
from gem.tools.tool_env_wrapper import ToolEnvWrapper

Found = dict[str, list[dict[str, Any]]]


class FreeSearch(SearchTool):  # type: ignore[misc]
    """GEM's tool without the way to the server."""

    def __init__(self, found: Found):
        super().__init__()
        self._found = found

    def _search(self, query: str) -> str:
        return str(self._passages2string(self._found[query]))


def serve(found: Found, ready: Connection) -> None:
    """Answers GEM's requests; sends the port that it listens on first."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = msgspec.msgpack.decode(self.rfile.read(int(self.headers["Content-Length"])))
            body = msgspec.msgpack.encode({"result": found[asked["query"]]})
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        ready.send(server.server_port)
        server.serve_forever()


def play(env: ToolEnvWrapper, texts: dict[str, list[str]]) -> tuple[float, float]:
    """Plays each episode once; returns seconds a turn and the share that is correct."""
    turns, correct, start = 0, 0.0, time.perf_counter()
    data = env.env.dataset
    for _ in range(len(texts)):
        position = env.env.idx % len(data)
        env.reset()
        for text in texts[data[position]["id"]]:
            _, reward, *_ = env.step(text)
            turns += 1
        correct += reward
    return (time.perf_counter() - start) / turns, correct / len(texts)


def main() -> None:
    """Measures both ways of searching, one after the other in each repetition."""
    given = json.load(sys.stdin)
    rows = [{"question": e["question"], "answer": e["answers"], "id": e["id"]} for e in given["episodes"]]
    texts = {e["id"]: e["texts"] for e in given["episodes"]}
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(given["found"], there), daemon=True)
    server.start()
    tools = {"http": SearchTool(search_url=f"http://127.0.0.1:{here.recv()}/"), "free": FreeSearch(given["found"])}
    envs = {name: ToolEnvWrapper(QaEnv(dataset=Dataset.from_list(rows)), [tool]) for name, tool in tools.items()}
    seconds: dict[str, list[float]] = {name: [] for name in envs}
    correct = {}
    for repeat in range(given["repeats"] + 1):
        for name, env in envs.items():
            taken, correct[name] = play(env, texts)
            if repeat:  # the first warms up
                seconds[name].append(taken)
    server.terminate()
    print(json.dumps({"seconds": {name: median(s) for name, s in seconds.items()}, "correct": correct}))


if __name__ == "__main__":
    main()
