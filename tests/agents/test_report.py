"""The report of a run: what a person finds in it, and what a model cannot smuggle into it."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from agents import report
from agents.report import fold, outcome, select_trees, write_report
from agents.runlog import RunLog

HOSTILE = '</script></pre><img src=x onerror="window.hit=1"><script>window.hit=1</script>{{ 7*7 }}&amp;\'\x00\x1b[31m'
CHROMIUM = Path("/usr/bin/chromium")


def node(id: int, parent: int | None, depth: int, **more: Any) -> dict[str, Any]:
    return {
        "id": id, "parent": parent, "depth": depth, "origin": "root", "action": f"<tool_call>search {id}</tool_call>",
        "observation": f"Passage {id}.", "predicted": 0.4, "value": 0.5, "weight": 0.5, "advantage": 0.25,
        "reward": None, "is_correct": None, "terminated": False, "truncated": False, "tool_error": False, "tokens": 17,
    } | more  # fmt: skip


def end(correct: bool) -> dict[str, Any]:
    return {"terminated": True, "is_correct": correct, "reward": float(correct), "value": float(correct)}


def tree(update: int, number: int, rng: random.Random, hops: int = 3, text: str = "") -> dict[str, Any]:
    """Makes a tree of four root rollouts, two of which are continued from their second turn."""
    question = f"Where was the founder of company {number} of update {update} born? {text}"
    nodes = [node(0, None, 0, action="", observation=question, advantage=None)]
    for rollout in range(4):
        parent = 0
        for depth in range(1, hops + 2):
            last = depth == hops + 1
            more = end(rng.random() < 0.5) if last else {}
            nodes.append(node(len(nodes), parent, depth, tool_error=rng.random() < 0.1, **more))
            if text:
                nodes[-1] |= {"action": text, "observation": text}
            parent = len(nodes) - 1
        if rollout < 2 and hops > 1:
            anchor = parent - hops + 1
            parent = anchor
            for depth in range(3, hops + 2):
                more = end(rng.random() < 0.5) if depth == hops + 1 else {}
                nodes.append(node(len(nodes), parent, depth, origin="continuation", **more))
                parent = len(nodes) - 1
    return {
        "update": update, "tree": number, "task_id": f"train/{update}-{number}", "question": question,
        "answers": ["Oslo", "Christiania"], "level": hops, "predicted": 0.4, "nodes": nodes,
    }  # fmt: skip


def metrics(update: int, total: int, rng: random.Random) -> dict[str, Any]:
    way = update / total
    record: dict[str, Any] = {"update": update}
    if update:
        record |= {
            "train/success": 0.4 + 0.15 * way + rng.gauss(0, 0.05),
            "train/reward": 0.38 + 0.15 * way,
            "effective_ratio/roots": 0.4 + rng.gauss(0, 0.06),
            "effective_ratio/tree": 0.55 + rng.gauss(0, 0.06),
            "ledger/root_rollouts": 64,
            "ledger/continuations": 32,
            "ledger/generated_tokens": 3210,
            "ledger/prefilled_tokens": 21000,
            "ledger/cached_tokens": 90000,
            "ledger/tool_calls": 260,
            "predictor/brier": 0.24 - 0.1 * way,
            "predictor/skill": -0.1 + 0.4 * way,
            "predictor/auc": 0.55 + 0.3 * way,
            "loss/policy": rng.gauss(0, 0.02),
            "loss/grad_norm": 1 + rng.random(),
            "time/rollout": 0.4,
            "time/update": 0.3,
        } | {f"budget/by_level/{h}": 16 + round(way * (h - 3) * 4) for h in range(1, 7)}
        record |= {f"budget/by_depth/{d}": 64 if d == 0 else 8 - d for d in range(6)}
    if update % 10 == 0:
        by_hops = {h: 1 / (1 + math.exp(1.4 * (h - 3 - 1.5 * way))) for h in range(1, 7)}
        record |= {"eval/accuracy": sum(by_hops.values()) / 6}
        record |= {f"eval/accuracy_by_level/{h}": value for h, value in by_hops.items()}
        record |= {f"eval/questions_by_level/{h}": 100 for h in by_hops}
    return record


def make_run(path: Path, updates: int = 20, trees: int = 2, text: str = "") -> Path:
    rng = random.Random(0)
    with RunLog(path) as log:
        log.write_config(
            {"env_id": "TraceMultiHopQA-v0", "allocation": {"allocator": "trace", "budget": 96}, "seed": 0}
        )
        for update in range(updates + 1):
            log.log(metrics(update, updates, rng))
            for number in range(trees if update else 0):
                log.log_tree(tree(update, number, rng, hops=1 + (update + number) % 6, text=text))
    return path


def test_a_report_holds_figures_table_curves_and_trees(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "demo"))
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "demo" / "report.html"
    assert "demo" in html and "TraceMultiHopQA-v0" in html and "allocator trace" in html
    assert html.count("<svg") == 8 and html.count('class="tree"') == 40
    assert re.search(r'<tr class="mean"><td>mean</td><td>600</td>', html)
    assert "Accuracy on unseen tasks" in html and "By depth of the anchor" in html
    assert "64,200" in html  # 20 updates of 3,210 tokens
    assert "built-in method" not in html and "update 20 · hops 3" in html
    assert "continuation 1 after turn 2" in html and "Christiania" in html


def test_a_report_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "demo")).read_text(encoding="utf-8")
    for reference in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", html):
        assert reference.startswith(("#", "data:")), reference
    assert "@import" not in html and "#0101" not in html and "#0102" not in html and "#0103" not in html
    ids = re.findall(r'\sid="([^"]+)"', html)
    clips = [
        name for name in ids if not name.startswith(("figure", "axes", "line2d", "patch", "xtick", "ytick", "text"))
    ]
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(clips)


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "demo")
    assert write_report(directory).read_bytes() == write_report(directory).read_bytes()


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "demo", updates=2, trees=1, text=HOSTILE)).read_text(encoding="utf-8")
    assert "<img" not in html and html.count("<script") == 1 and "{{ 7*7 }}" in html and "\x00" not in html
    assert "&lt;/script&gt;&lt;/pre&gt;&lt;img" in html and "&amp;amp;" in html


@pytest.mark.parametrize(
    ("reason", "shown"), [("context", "out of context"), ("error", "no answer of the policy"), ("stop", "out of turns")]
)
def test_a_truncated_end_says_what_it_ran_out_of(tmp_path: Path, reason: str, shown: str) -> None:
    directory = make_run(tmp_path / "demo", updates=1, trees=0)
    record = tree(1, 0, random.Random(0))
    leaf = next(n for n in record["nodes"] if n["terminated"])
    leaf |= {"terminated": False, "truncated": True, "is_correct": False, "finish_reason": reason}
    (directory / "trees.jsonl").write_text(json.dumps(record) + "\n")
    assert f"✗ {shown}<" in write_report(directory).read_text(encoding="utf-8")


def test_a_run_name_and_config_stay_text(tmp_path: Path) -> None:
    directory = tmp_path / "<b>&run"
    with RunLog(directory) as log:
        log.write_config({"env_id": "</pre><script>1</script>"})
        log.log({"update": 0, "eval/accuracy": 0.5})
    html = write_report(directory).read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;run" in html and html.count("<script") == 1


@pytest.mark.parametrize("content", [None, b"", b'{"update": 1, "no', b"\n\n"])
def test_missing_empty_or_torn_trees_are_no_obstacle(tmp_path: Path, content: bytes | None) -> None:
    directory = make_run(tmp_path / "demo", updates=3, trees=0)
    trees = directory / "trees.jsonl"
    trees.unlink() if content is None else trees.write_bytes(content)
    if content and content.strip():
        with pytest.warns(RuntimeWarning, match="cut short"):
            path = write_report(directory)
    else:
        path = write_report(directory)
    assert "No tree was recorded" in path.read_text(encoding="utf-8")


def test_a_torn_last_tree_costs_one_tree_and_one_warning(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "demo", updates=3, trees=1)
    with open(directory / "trees.jsonl", "ab") as file:
        file.write(b'{"update": 4, "nodes": [')
    with pytest.warns(RuntimeWarning, match="cut short") as caught:
        html = write_report(directory).read_text(encoding="utf-8")
    assert html.count('class="tree"') == 3
    assert sum("cut short" in str(warning.message) for warning in caught) == 1


def test_a_run_that_has_logged_nothing_or_little_still_has_a_page(tmp_path: Path) -> None:
    RunLog(tmp_path / "empty").close()
    assert "No update has been logged" in write_report(tmp_path / "empty").read_text(encoding="utf-8")
    with RunLog(tmp_path / "little") as log:
        log.log({"update": 1, "train/success": math.nan, "train/reward": 0.5})
        log.log_tree({"update": 1})
        log.log_tree(
            {"update": 1, "nodes": [{"id": 0, "parent": None}, {"id": 1, "parent": 0}, {"id": 2, "parent": 7}]}
        )
    html = write_report(tmp_path / "little").read_text(encoding="utf-8")
    assert html.count("<svg") == 1 and html.count('class="tree"') == 2
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl.*runs/<name>"):
        write_report(tmp_path)


def test_long_runs_and_long_texts_stay_below_five_megabytes(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "demo", updates=120, trees=3, text="& long passage " * 1000)
    path = write_report(directory)
    assert path.stat().st_size < 5_000_000
    html = path.read_text(encoding="utf-8")
    assert "characters left out" in html and re.search(r"\d+ of 360 recorded trees", html)


def test_trees_are_chosen_mixed_and_late_first(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    lines = []
    for update in range(100):
        nodes = [node(0, None, 0), node(1, 0, 1, **end(True)), node(2, 0, 1, **end(update % 2 == 0))]
        lines.append(json.dumps({"update": update, "nodes": nodes}))
    path.write_text("\n".join(lines))
    chosen, total = select_trees(path, limit=20)
    updates = [record["update"] for record in chosen]
    assert total == 100 and len(set(updates)) == 20
    assert updates[:10] == list(range(99, 79, -2))  # odd updates are mixed
    assert updates[10] == 1 and all(update % 2 for update in updates[:15])
    assert updates[15:] == [98, 96, 94, 92, 90]


def test_folding_keeps_every_node_once() -> None:
    record = tree(3, 0, random.Random(1), hops=4)
    view = fold(record)
    seen: list[int] = []

    def walk(branches: list[report.Branch]) -> None:
        for branch in branches:
            seen.extend(turn["id"] for turn in branch.turns)
            walk(branch.branches)

    walk(view.branches)
    assert sorted([0, *seen]) == [n["id"] for n in record["nodes"]]
    ends = [outcome(n) for n in record["nodes"] if outcome(n) is not None]
    assert (view.wins, view.leaves, view.continuations) == (sum(ends), 6, 2)
    first = view.branches[0]
    assert [branch.name for branch in first.branches] == ["as first drawn", "continuation 1 after turn 2"]
    assert len(first.turns) == 2 and first.leaves == 2


def test_folding_survives_damaged_parents_and_deep_chains() -> None:
    loop = [node(0, None, 0), node(1, 2, 1), node(2, 1, 2), node(3, 0, 1)]
    assert [turn["id"] for turn in fold({"nodes": loop}).branches[0].turns] == [3]
    chain = [node(0, None, 0)] + [node(i, i - 1, i) for i in range(1, 5000)]
    assert len(fold({"nodes": chain}).branches[0].turns) == 4999


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a browser at {CHROMIUM}: apt-get install chromium")
def test_a_person_can_unfold_and_filter_without_error_or_request(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    directory = make_run(tmp_path / "demo", updates=5, trees=4)
    with RunLog(directory, resume=True) as log:
        log.log_tree(tree(6, 0, random.Random(3), text=HOSTILE))
    path = write_report(directory)
    errors: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        first = page.locator("details.tree").first
        action = first.locator("pre.act").first
        assert not action.is_visible()
        first.locator("summary").first.click()
        first.locator("details.turn > summary").first.click()
        assert action.is_visible() and "<img src=x onerror=" in action.inner_text()
        first.locator("button.unfold").click()
        assert first.locator("details.turn:not([open])").count() == 0
        assert page.evaluate("window.hit") is None

        shown = page.locator("#f-shown")
        assert shown.inner_text() == "21 of 21"
        page.select_option("#f-update", "3")
        assert shown.inner_text() == "4 of 21" and page.locator("details.tree:visible").count() == 4
        page.fill("#f-text", "company 2 of update")
        assert shown.inner_text() == "1 of 21"
        page.fill("#f-text", "")
        page.select_option("#f-update", "")
        page.check("#f-mixed")
        mixed = page.locator('details.tree[data-mixed="1"]').count()
        assert page.locator("details.tree:visible").count() == mixed > 0
        browser.close()
    assert not errors
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
