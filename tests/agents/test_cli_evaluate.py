"""`trace-envs evaluate`: scripted agents, models, and what is refused."""

import json
import os
from pathlib import Path

import pytest

import agents.cli_evaluate
from agents.cli import main
from agents.models import SHIPPED, TINY_OF, load_model
from agents.runlog import read_jsonl

DATA = Path(os.environ.get("TRACE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


def one_line(capsys):
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("error: "), err
    return err[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-envs", "0"], "num_envs must be at least 1, got 0"),
        (["--limit", "-3"], "limit must be at least 0, got -3"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature must not be negative, got -1"),
        (["--agent", "bm25", "--policy", "vllm"], "--agent bm25 is scripted and --policy vllm runs a model"),
        (["--base-url", "http://localhost:1"], "go with --policy openai"),
        (["--policy", "vlm"], "unknown policy 'vlm'; known: transformers, vllm, openai"),
        (["--model", "./nowhere"], "is no model folder"),
        (["--policy", "vllm", "--model", "./nowhere"], "./nowhere is no folder"),
        (["--policy", "openai", "--sampling-top-k", "5"], "--policy openai has no top_k"),
        (
            ["--env-id", "TraceMultihopQA-v0"],
            "no environment 'TraceMultihopQA-v0'; known: TraceMath-v0, TraceMultiHopQA-v0",
        ),
        (["--env-id", "CartPole-v1"], "environment 'CartPole-v1' has no task_ids()"),
    ],
)
def test_mistakes_in_evaluate_end_in_one_line(capsys, words, message):
    assert main(["evaluate", *words]) == 2
    assert message in one_line(capsys)


def test_evaluate_asks_a_shipped_model_as_it_was_trained(monkeypatch, capsys):
    given = []

    def evaluate(policy, env_id, kwargs, task_ids, **others):
        given.append(kwargs)
        raise ValueError("enough")

    monkeypatch.setattr(agents.cli_evaluate, "evaluate", evaluate)
    monkeypatch.setattr(agents.cli_evaluate, "_policy", lambda args, known, opened: (None, "it"))
    for words in (["--agent", "model"], ["--model", "tiny", "--top-k", "4"], ["--agent", "bm25"]):
        assert main(["evaluate", *words]) == 2
    assert [(k.get("top_k"), k.get("system_prompt")) for k in given] == [(2, ""), (4, ""), (None, None)]


def evaluation(capsys, tmp_path, *words):
    file = tmp_path / "figures.json"
    assert main(["evaluate", *words, "--output", str(file)]) == 0
    capsys.readouterr()
    return json.loads(file.read_text())


def test_evaluate_scores_scripted_agents(capsys, tmp_path):
    oracle = evaluation(capsys, tmp_path, "--agent", "oracle", "--limit", "60")
    assert oracle["eval/em"] == oracle["eval/accuracy"] == 1.0 and oracle["eval/questions"] == 60
    assert evaluation(capsys, tmp_path, "--agent", "bm25", "--limit", "60")["eval/em"] < 0.9
    assert main(["evaluate", "--agent", "gpt"]) == 2
    assert "unknown agent 'gpt'; known: oracle, bm25, model" in one_line(capsys)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}; set TRACE_DATA_DIR")
def test_evaluate_on_real_questions(capsys, tmp_path):
    words = ["--dataset", "hotpotqa", "--data-path", str(DATA / "hotpotqa" / "hotpotqa_train.json")]
    oracle = evaluation(capsys, tmp_path, *words, "--agent", "oracle")
    bm25 = evaluation(capsys, tmp_path, *words, "--agent", "bm25")
    assert oracle["eval/questions"] == 100 and oracle["eval/em"] == 1.0
    assert oracle["eval/supporting_recall"] > 0.95
    assert 0 < bm25["eval/em"] < 0.9 and bm25["eval/f1"] >= bm25["eval/em"]


def test_episodes_are_kept_as_they_end(capsys, tmp_path):
    file = tmp_path / "episodes.jsonl"
    evaluation(capsys, tmp_path, "--agent", "bm25", "--limit", "7", "--save-rollouts", str(file))
    rows = read_jsonl(file)
    assert len(rows) == 7
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TINY_OF)
def test_the_shipped_agents_are_small_and_solve_easy_tasks(env_id, capsys, tmp_path):
    folder = SHIPPED[TINY_OF[env_id]]
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    model, _ = load_model(TINY_OF[env_id])
    assert size <= 4 * 2**20 and sum(p.numel() for p in model.parameters()) < 10**6
    words = ["--env-id", env_id, "--agent", "model", "--split", "test"]
    record = evaluation(capsys, tmp_path, *words)
    # Most easy tasks and few hard ones: success is spread widely, which is what there is to allocate by.
    assert record["eval/accuracy_by_level/1"] > 0.55 > 0.25 > record["eval/accuracy_by_level/6"]


@pytest.mark.parametrize("dataset", ["synthetic", "gsm8k"])
def test_evaluate_mathematics(dataset, capsys, tmp_path):
    words = ["--env-id", "TraceMath-v0", "--agent", "oracle"]
    if dataset == "synthetic":
        record = evaluation(capsys, tmp_path, *words, "--category", "modular", "--levels", "2", "5")
        assert record["eval/questions_by_level/2"] == record["eval/questions_by_level/5"] == 25
    else:
        file = tmp_path / "gsm8k.jsonl"
        rows = [{"question": f"{n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>.\n#### {n + 1}"} for n in range(8)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = evaluation(capsys, tmp_path, *words, "--dataset", "gsm8k", "--data-path", str(file))
        assert record["eval/questions"] == 8 and record["eval/turns"] == 2
    assert record["eval/accuracy"] == 1.0
