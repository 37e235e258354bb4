"""A run that is killed with SIGKILL and resumed through the command line ends as one that was left alone, bit for bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from echo_env import random_model

from agents.checkpoint import list_checkpoints
from agents.runlog import read_jsonl
from benchmarks.resume import Run, differences, warm_up

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arguments(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    given = {
        "--env-id": "Echo-v0",
        "--model": str(folder),
        "--updates": "4",
        "--eval-every": "2",
        "--eval-per-level": "1",
        "--checkpoint-every": "1",
        "--budget": "48",
        "--num-envs": "8",
        "--max-new-tokens": "6",
        "--lr": "3e-3",
        "--trace-plus.pool-factor": "2",
        "--threads": "1",
    }
    return [word for pair in given.items() for word in pair]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    warm_up()
    run = Run(tmp_path_factory.mktemp("runs") / "whole", arguments)
    run.finish()
    return run


@pytest.fixture
def run(arguments, tmp_path):
    return Run(tmp_path / "killed", arguments)


def logged(run):
    path = run.directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS = {
    "before there is anything": lambda run: run.directory.exists(),
    "in the first evaluation": lambda run: list_checkpoints(run.directory / "checkpoints"),
    "while a checkpoint is written": lambda run: logged(run) > 1 and list(run.directory.glob("checkpoints/.*")),
    "in an update": lambda run: logged(run) >= 2,
    "after the evaluation in the middle": lambda run: logged(run) >= 4,
    "before the last evaluation": lambda run: logged(run) >= 6,
}


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_left_alone(run, whole):
    for name, reached in MOMENTS.items():
        kill = run.kill(name, lambda seconds, reached=reached: reached(run))
        assert kill.phase != "finished", f"it was over before it was to be killed {name}"
    run.finish()
    assert differences(whole.result(), run.result()) == []
    records = read_jsonl(run.directory / "metrics.jsonl")
    assert [r["update"] for r in records] == [0, 1, 2, 2, 3, 4, 4]
    assert any(r.get("loss/tokens") for r in records), "nothing was learned from"


def test_a_damaged_checkpoint_is_refused_and_the_run_goes_on_from_the_one_before(run, whole):
    run.kill("damage", lambda seconds: logged(run) >= 5)
    latest = list_checkpoints(run.directory / "checkpoints")[-1]
    weights = latest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run.finish()
    assert differences(whole.result(), run.result()) == []
    assert (latest.parent / f"refused-{latest.name}-1").is_dir(), "what was refused is kept"


def test_fewer_updates_than_are_done_change_nothing(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole.directory, copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    again = Run(copy, [])
    with pytest.raises(RuntimeError, match="--updates 2 is fewer"):
        again.finish(["--updates", "2"])
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_the_benchmark_of_the_shipped_agent_holds(tmp_path):
    words = [sys.executable, "-m", "benchmarks.resume", "--check", "--quick", "--kills", "2", "--repeated", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run 1: the same" in done.stdout
