"""`trace-envs train --policy vllm`: what samples is vLLM, and it has the learner's weights at every update."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

import agents.trainer
from agents.checkpoint import list_checkpoints
from agents.cli import main
from agents.models import SHIPPED, load_model
from agents.policies import collect
from agents.runlog import read_jsonl
from allocation.forest_table import ForestTable

WORDS = [
    *("--policy", "vllm", "--env.top-k", "2", "--env.system-prompt", "", "--budget", "24", "--num-envs", "12"),
    *("--eval-per-level", "1", "--checkpoint-every", "1", "--max-new-tokens", "32", "--lr", "1e-3", "--threads", "1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(SHIPPED["tiny"], tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def forests(monkeypatch):
    """The forests that training collects."""
    collected = []

    def listening(*args, **kwargs):
        collected.append(collect(*args, **kwargs))
        return collected[-1]

    monkeypatch.setattr(agents.trainer, "collect", listening)
    return collected


@pytest.fixture
def train(tmp_path, folder):
    """Runs the command and returns the run's directory."""

    def run(*words, name="run", model=folder, status=0):
        where = ["--model", str(model), "--runs", str(tmp_path), "--name", name]
        assert main(["train", *WORDS, *where, *words]) == status
        return tmp_path / name

    return run


def metrics(run):
    """The records of updates and evaluations, without what depends on the clock."""
    records = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def versions(forest):
    return {node.sample.version for tree in forest for node in tree.nodes[1:]}


def test_the_engine_follows_the_learner(train, forests, capsys):
    run = train("--max-steps", "3")
    assert "the engine took over the weights of 3 updates" in " ".join(capsys.readouterr().out.split())
    updates = [r for r in metrics(run) if "train/success" in r]
    assert [r["update"] for r in updates] == [1, 2, 3]
    assert [versions(forest) for forest in forests] == [{0}, {1}, {2}]
    for record in updates:
        # Each update moved the engine by far more than what was left between it and the learner before.
        assert record["engine/moved"] > 100 * record["drift/mean_abs"] and record["drift/max_abs"] < 1e-3
        assert record["importance/ess"] == pytest.approx(1, abs=1e-3) and abs(record["importance/kl"]) < 1e-4
        assert record["importance/clipped"] == 0
        assert 0 < record["ledger/prefilled_tokens"] < record["ledger/cached_tokens"]
    for forest in forests:
        assert forest.ledger.generated_tokens == sum(len(n.sample.action_ids) for t in forest for n in t.nodes[1:])

    # What vLLM said of its last tokens is what the learner's weights at that time say.
    model, _ = load_model(str(list_checkpoints(run / "checkpoints")[-2]))
    table = ForestTable.of(forests[-1])
    assert len(table)
    count = 0
    for tree in forests[-1]:
        for leaf in tree.leaves():
            ids, expected = [], []
            for node in tree.path(leaf):
                action = node.sample.action_ids if node.sample is not None else []
                expected += [(len(ids) + i, p) for i, p in enumerate(node.sample.logprobs if len(action) else [])]
                ids += [*action, *(node.context_ids if node.context_ids is not None else [])]
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for place, logprob in expected:
                assert float(scores[place - 1, ids[place]]) == pytest.approx(logprob, abs=1e-3)
            count += len(expected)
    assert count > 100


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(train, forests, monkeypatch):
    whole = train("--max-steps", "3", name="whole")
    listening = agents.trainer.collect

    def interrupted(*args, **kwargs):
        if len(forests) == 5:
            raise KeyboardInterrupt
        return listening(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(agents.trainer, "collect", interrupted)
        run = train("--max-steps", "3", status=130)
    train("--resume", "--max-steps", "3")
    assert metrics(run) == metrics(whole)
    assert [versions(forest) for forest in forests] == [{0}, {1}, {2}, {0}, {1}, {2}]
    ends = [load_model(str(list_checkpoints(d / "checkpoints")[-1]))[0].state_dict() for d in (run, whole)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_adapters_are_trained_and_go_on(train, forests):
    run = train("--lora.rank", "4", "--lora.alpha", "8", "--max-steps", "2")
    updates = [r for r in metrics(run) if "train/success" in r]
    assert all(r["engine/moved"] > 100 * r["drift/mean_abs"] > 0 for r in updates)
    # The checkpoint holds adapters; they are the start of another run.
    train("--max-steps", "1", name="more", model=list_checkpoints(run / "checkpoints")[-1])
    (record,) = [r for r in metrics(run.parent / "more") if "train/success" in r]
    assert record["drift/max_abs"] < 1e-3 and record["engine/moved"] > 0
    assert np.isfinite(record["loss/policy"])


def test_a_checkpoint_is_evaluated_with_vllm(train, capsys):
    run = train("--max-steps", "1")
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    words = ["--model", str(checkpoint), "--top-k", "2", "--system-prompt", "", "--temperature", "0", "--limit", "12"]
    results = []
    for engine in ("vllm", "transformers"):
        file = run / f"{engine}.json"
        assert main(["evaluate", "--policy", engine, *words, "--output", str(file)]) == 0
        results.append(file.read_text())
    assert results[0] == results[1]


def test_settings_that_do_not_go_together(train, folder, tmp_path, capsys):
    words = ["train", *WORDS, "--runs", str(tmp_path), "--model"]
    for given, message in (
        ([str(folder), "--predictor", "hidden_state"], "which vLLM does not give; use --predictor text or counts"),
        ([str(tmp_path / "nowhere")], "is no model folder"),
        ([str(folder), "--engine.block-size", "48"], "leave engine.block_size unset"),
    ):
        assert main([*words, *given]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
