import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from echo_env import EchoEnv
from training_runs import metrics, train, weights

import agents.evaluate
from agents.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from agents.cli import main
from agents.config import load_config, resolve, to_dict
from agents.figures import batch_figures
from agents.learner import Learner
from agents.manifest import read_manifest, write_manifest
from agents.models import load_model
from agents.policies import collect
from agents.runlog import RunLog, read_jsonl
from agents.state_file import read_state, write_state
from agents.tasks import TaskDeck
from agents.trainer import Trainer
from allocation import Tree

DATA = Path(os.environ.get("TRACE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize("allocator", ["treepo", "tree_grpo", "arpo", "trace"])
def test_branching_methods_train_and_get_what_they_ask_for(config, allocator):
    trace = replace(config.trace, prefix_mode="entropy")
    trainer = train(replace(config, allocator=allocator, trace=trace, updates=1))
    (record,) = [r for r in metrics(config) if "train/success" in r]
    assert record["ledger/continuations"] > 0
    assert record["ledger/root_rollouts"] + record["ledger/continuations"] + record["ledger/unspent"] == 16
    assert trainer.policy.entropy == (allocator in ("arpo", "trace"))
    # Hidden states of the candidates are computed only where a predictor will look at them.
    assert (trainer.envs._encode is not None) == (allocator == "trace")


def test_a_run_writes_what_it_promises(config):
    trainer = train(config)
    records = metrics(config)
    updates = [r for r in records if "train/success" in r]
    evaluations = [r for r in records if "eval/accuracy" in r]
    assert [r["update"] for r in updates] == [1, 2, 3] and [r["update"] for r in evaluations] == [0, 3]
    for r in updates:
        assert r["ledger/root_rollouts"] + r["ledger/continuations"] == 16
        assert sum(v for k, v in r.items() if k.startswith("budget/by_level/")) == 16
        assert sum(v for k, v in r.items() if k.startswith("budget/by_depth/")) == 16
        assert (
            sum(v for k, v in r.items() if k.startswith("budget/by_depth/") and k[-2:] != "/0")
            == (r["ledger/continuations"])
        )
        assert 0 <= r["effective_ratio/roots"] <= 1 and r["train/prompts"] >= 1
    assert any(r["loss/tokens"] > 0 and r["loss/grad_norm"] > 0 for r in updates), "nothing was learned from"
    assert all(abs(r["loss/kl"]) < 1e-4 for r in updates), "the learner's log-probs are not those of the sampler"
    assert evaluations[0]["eval/questions"] == 4
    assert trainer.total.root_rollouts == sum(r["ledger/root_rollouts"] for r in updates)
    trees = read_jsonl(config.directory / "trees.jsonl")
    assert {t["update"] for t in trees} == {1, 2, 3} and all(t["question"].startswith("Say") for t in trees)
    assert [p.name for p in list_checkpoints(config.directory / "checkpoints")] == ["update-000002", "update-000003"]
    assert load_config(config.directory / "config.yaml") == resolve(config)
    before, _ = load_model(config.model)
    assert not torch.equal(weights(config), torch.cat([p.flatten() for p in before.parameters()]))


@pytest.mark.parametrize("allocator", ["trace", "grpo"])
def test_a_seed_decides_everything(config, allocator):
    runs = [replace(config, name=name, seed=seed, allocator=allocator) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for run in runs:
        train(run)
    first, second, other = map(metrics, runs)
    assert first == second != other
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    trees = [(r.directory / "trees.jsonl").read_bytes() for r in runs]
    assert trees[0] == trees[1] != trees[2]


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(config):
    # Large batches, so that the predictor is soon ready and its state matters.
    # A schedule would depend on the number of updates, which differs between the parts.
    config = replace(config, updates=5, eval_every=2, budget=96, lr_schedule="constant")
    whole, parts = replace(config, name="whole"), replace(config, name="parts")
    train(whole)
    train(replace(parts, updates=2))
    train(parts, resume=True)
    assert metrics(parts) == metrics(whole) and torch.equal(weights(parts), weights(whole))
    assert (parts.directory / "trees.jsonl").read_bytes() == (whole.directory / "trees.jsonl").read_bytes()
    assert any(r.get("predictor/brier") for r in metrics(whole)), "too short: the predictor never came into play"


def interrupt_at(monkeypatch, update):
    real = Trainer.train_step

    def step(self):
        if self.update + 1 == update:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", step)


def test_an_interrupt_leaves_a_checkpoint_to_resume_from(config, monkeypatch, tmp_path, capsys):
    config = replace(config, updates=4, checkpoint_every=100)
    train(replace(config, name="whole"))
    saved = tmp_path / "given.yaml"
    saved.write_text(yaml.safe_dump(to_dict(config)))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main(["train", "--config", str(saved)]) == 130
    out = " ".join(capsys.readouterr().out.split())
    assert "interrupted after update 2" in out and "--resume" in out
    checkpoints = list_checkpoints(config.directory / "checkpoints")
    assert load_checkpoint(checkpoints[-1]).update == 2
    assert main(["train", "--config", str(config.directory / "config.yaml"), "--resume"]) == 0
    assert metrics(config) == metrics(replace(config, name="whole"))
    assert torch.equal(weights(config), weights(replace(config, name="whole")))


@pytest.mark.parametrize("where", ["sampling", "learning"])
def test_an_interrupt_in_the_middle_of_an_update_can_be_resumed_exactly(config, monkeypatch, where):
    import agents.trainer

    config = replace(config, updates=4, checkpoint_every=100)
    whole = replace(config, name="whole")
    train(whole)
    calls = 0
    owner, name = (agents.trainer, "collect") if where == "sampling" else (Learner, "update")
    real = getattr(owner, name)

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = real(*args, **kwargs)
        if calls == 3:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    assert metrics(config) == metrics(whole) and torch.equal(weights(config), weights(whole))


def test_an_interrupt_before_the_first_update_is_done_does_not_block_the_run(config, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    assert [r["update"] for r in metrics(config) if "train/success" in r] == [1, 2, 3]


def test_resuming_a_finished_run_reports_its_gain(config):
    config = replace(config, updates=2)
    train(config)
    trainer = Trainer(config, resume=True)
    before, after = trainer.run()
    trainer.close()
    assert before["update"] == 0 and after["update"] == 2


def at_evaluation(monkeypatch, number, what):
    """Does something at the start of an evaluation; 1 is the first."""
    real, calls = Trainer._evaluate, []

    def evaluate(self):
        calls.append(self.update)
        if len(calls) == number:
            what()
        return real(self)

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)


def stop_at_once():
    raise KeyboardInterrupt


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("what", [stop_at_once, ctrl_c])
def test_a_run_stopped_in_an_evaluation_goes_on_exactly(config, monkeypatch, capsys, number, what):
    config = replace(config, updates=3, eval_every=2, checkpoint_every=100)
    whole = replace(config, name="whole")
    train(whole)
    with monkeypatch.context() as patch:
        at_evaluation(patch, number, what)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    said = "interrupted: finishing this evaluation; its checkpoint is written; again to stop at once"
    assert (said in " ".join(capsys.readouterr().out.split())) == (what is ctrl_c)
    update = [0, 2, 3][number - 1]
    assert load_checkpoint(list_checkpoints(config.directory / "checkpoints")[-1]).update == update
    assert [r["update"] for r in metrics(config) if "eval/accuracy" in r] == [0, 2, 3][
        : number - (what is stop_at_once)
    ]
    train(config, resume=True)
    assert metrics(config) == metrics(whole) and torch.equal(weights(config), weights(whole))


def test_what_is_logged_of_a_task_does_not_move_the_generator(config):
    few, many = replace(config, name="few", log_trees=0), replace(config, name="many", log_trees=9)
    draws = EchoEnv.pick_task
    try:
        EchoEnv.pick_task = lambda self, rng, task_id: (rng.random(), draws(self, rng, task_id))[1]
        train(few)
        train(many)
    finally:
        EchoEnv.pick_task = draws
    assert metrics(few) == metrics(many)


def test_environments_and_log_are_closed_whatever_happens(config, monkeypatch):
    opened = []
    made, shut = EchoEnv.__init__, EchoEnv.close

    def init(self, *args, **kwargs):
        opened.append(self)
        made(self, *args, **kwargs)

    def close(self):
        if self in opened:
            opened.remove(self)
        shut(self)

    monkeypatch.setattr(EchoEnv, "__init__", init)
    monkeypatch.setattr(EchoEnv, "close", close)
    train(replace(config, updates=1))
    assert not opened
    with pytest.raises(FileExistsError):
        Trainer(config)
    assert not opened
    with monkeypatch.context() as patch:
        patch.setattr(agents.evaluate, "collect", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(replace(config, name="two"))
    assert not opened
    logs = []
    real = RunLog.close
    monkeypatch.setattr(RunLog, "close", lambda self: (logs.append(self), real(self))[1])
    last = list_checkpoints(config.directory / "checkpoints")[-1]
    state = read_state(last)
    del state["allocator"]
    write_state(last, state)
    write_manifest(last, read_manifest(last).header)
    with pytest.raises(CheckpointError, match=r"update-000001 does not fit the settings .*KeyError: 'allocator'"):
        Trainer(replace(config, updates=1), resume=True)
    assert logs and not opened


def test_figures_of_a_batch_sum_rewards_once_a_tree(config, monkeypatch):
    trainer = Trainer(config)
    with closing(trainer):
        forest = collect(trainer.envs, trainer.policy, seed=0)
    calls = []
    real = Tree.returns
    monkeypatch.setattr(Tree, "returns", lambda self: (calls.append(self), real(self))[1])
    figures = batch_figures(forest, 0)
    assert len(calls) == len(forest)
    rewards = [sum(n.reward for n in t.path(leaf)) for t in forest for leaf in t.leaves("root")]
    assert figures["train/reward"] == pytest.approx(np.mean(rewards))


def test_a_saved_config_runs_again(config):
    train(replace(config, updates=2))
    again = replace(load_config(config.directory / "config.yaml"), name="two")
    train(again)
    assert metrics(again) == metrics(config)


@pytest.mark.parametrize(
    "options", [{"estimator": "grpo", "advantage_std": True}, {"aggregation": "token", "epochs": 2}]
)
def test_other_settings_run_too(config, options):
    train(replace(config, updates=1, **options))
    assert metrics(config)[-1]["update"] == 1


def test_the_deck_deals_every_task_before_it_deals_one_again():
    deck, rng = TaskDeck([f"t{i}" for i in range(7)]), np.random.default_rng(0)
    dealt = [r.options["task_id"] for _ in range(7) for r in deck(rng, 5)]
    for start in range(0, 35, 7):
        assert sorted(dealt[start : start + 7]) == [f"t{i}" for i in range(7)]
    deck(rng, 3)
    other = TaskDeck([f"t{i}" for i in range(7)])
    other.load_state_dict(deck.state_dict())
    same = [[r.options["task_id"] for r in d(np.random.default_rng(1), 4)] for d in (deck, other)]
    assert same[0] == same[1]


@pytest.mark.parametrize("count", [1, 3, 5, 7, 20])
def test_the_deck_never_deals_a_task_twice_in_one_call(count):
    deck, rng = TaskDeck([f"t{i}" for i in range(7)]), np.random.default_rng(0)
    for _ in range(50):
        dealt = [r.options["task_id"] for r in deck(rng, count)]
        assert len(dealt) == len(set(dealt)) == min(count, 7)
