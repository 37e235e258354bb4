import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from echo_env import EchoEnv, random_model

import agents.evaluate
from agents.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from agents.cli import main
from agents.config import EnvConfig, TrainConfig, from_dict, load_config, resolve, to_dict
from agents.figures import batch_figures
from agents.learner import Learner
from agents.manifest import read_manifest, write_manifest
from agents.models import load_model
from agents.policies import collect
from agents.runlog import RunLog, read_jsonl
from agents.state_file import read_state, write_state
from agents.tasks import TaskDeck
from agents.trainer import Trainer
from allocation import TracePlusConfig, Tree

DATA = Path(os.environ.get("TRACE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    random_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def config(folder, tmp_path):
    return TrainConfig(
        env_id="Echo-v0",
        model=str(folder),
        trace_plus=TracePlusConfig(pool_factor=2.0),
        budget=16,
        updates=3,
        lr=3e-3,
        max_new_tokens=6,
        num_envs=6,
        eval_per_level=2,
        checkpoint_every=1,
        runs=tmp_path / "runs",
        name="one",
        threads=1,
    )


def train(config, resume=False):
    trainer = Trainer(config, resume=resume)
    with closing(trainer):
        trainer.run()
    return trainer


def metrics(config):
    """The run's records without what depends on the clock."""
    records = read_jsonl(config.directory / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def weights(config):
    model, _ = load_model(str(list_checkpoints(config.directory / "checkpoints")[-1]))
    return torch.cat([p.flatten() for p in model.parameters()])


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


# The command line.


def command(config, tmp_path, *words):
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    return main(["train", "--config", str(file), *words])


def one_line(capsys):
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("error: "), err
    return err[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"allocator": "tracy"}, "unknown allocator 'tracy'; known: grpo, "),
        ({"estimator": "vapo"}, "unknown estimator 'vapo'; known: gae, grpo"),
        ({"aggregation": "sum"}, "unknown aggregation 'sum'; known: prompt"),
        ({"model": "/no/such/folder"}, "/no/such/folder is no model folder"),
        ({"budget": 2}, "budget 2 is smaller than one group of m_min=4"),
        ({"updates": 0}, "updates must be at least 1, got 0"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"eval_per_level": -1}, "eval_per_level must not be negative, got -1"),
        ({"eval_every": -1}, "eval_every must not be negative, got -1"),
        ({"log_trees": -1}, "log_trees must not be negative, got -1"),
        ({"lr_warmup": -1}, "lr_warmup must not be negative, got -1"),
        ({"threads": -1}, "threads must not be negative, got -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, got 0.0"),
        ({"lr_schedule": "step"}, "unknown lr_schedule 'step'; known: linear, cosine, constant"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here (Expected one of cpu, cuda"),
        ({"env_id": "Ecko-v0"}, "there is no environment 'Ecko-v0'; known: TraceMath-v0, TraceMultiHopQA-v0"),
        ({"env_id": "CartPole-v1"}, "environment 'CartPole-v1' has no task_ids()"),
        ({"env": {"top_k": 3}}, "environment 'Echo-v0' does not take argument 'top_k'"),
        ({"learning_rate": 1}, "unknown settings learning_rate; known: advantage_clip, advantage_std, aggregation"),
        ({"trace": {"N": 2}}, "trace: unknown settings N; known: band, cap_per_rollout"),
    ],
)
def test_mistakes_end_in_one_line(config, tmp_path, capsys, setting, message):
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(to_dict(config) | setting))
    assert main(["train", "--config", str(file)]) == 2
    assert message in one_line(capsys)


def test_a_run_that_exists_is_not_written_over(config, tmp_path, capsys):
    train(replace(config, updates=1))
    before = (config.directory / "metrics.jsonl").read_bytes()
    assert command(config, tmp_path) == 2
    assert "already holds a run. Pass --resume" in one_line(capsys)
    assert (config.directory / "metrics.jsonl").read_bytes() == before


def test_unknown_names_are_found_before_anything_is_loaded():
    for name in ("allocator", "estimator", "aggregation"):
        with pytest.raises(ValueError, match=f"unknown {name} 'x'; known: "):
            TrainConfig(**{name: "x"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can be used here")
def test_cuda_where_there_is_none(config, tmp_path, capsys):
    assert command(config, tmp_path, "--device", "cuda") == 2
    assert "device 'cuda' cannot be used here" in one_line(capsys)


def test_a_run_is_resumed_under_its_own_settings(config, capsys):
    train(replace(config, updates=2, name=None))
    assert Trainer(replace(config, name=None)).config.name == "trace-2"
    assert main(["train", "--resume", "--runs", str(config.runs), "--name", "trace", "--updates", "3"]) == 0
    assert load_config(config.runs / "trace" / "config.yaml") == resolve(replace(config, name="trace"))
    assert [r["update"] for r in metrics(replace(config, name="trace")) if "train/success" in r] == [1, 2, 3]
    out = "".join(capsys.readouterr().out.split())
    assert str(config.runs / "trace") in out, "the directory is not printed"
    assert main(["train", "--resume", "--runs", str(config.runs), "--name", "tarce"]) == 2
    assert "tarce is no run (no config.yaml); runs in " in one_line(capsys)
    assert main(["train", "--resume", "--runs", str(config.runs / "none")]) == 2
    assert "holds no run named trace*; name one with --name" in one_line(capsys)


def test_the_first_free_name_is_taken_and_the_latest_run_resumed(config, tmp_path, capsys):
    config = replace(config, updates=1, name=None)
    for name in ("trace", "trace-2", "trace-3"):
        assert command(config, tmp_path) == 0
        assert load_config(config.runs / name / "config.yaml").name == name
    train(replace(config, name="trace-2", updates=2), resume=True)
    assert main(["train", "--resume", "--runs", str(config.runs), "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--runs", str(config.runs), "--updates", "3"]) == 0
    assert load_config(config.runs / "trace-2" / "config.yaml").updates == 3
    assert command(config, tmp_path, "--name", "trace-3") == 2
    assert "trace-3 already holds a run. Pass --resume" in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--allocator", "grpo"], "cannot change allocator: allocator is 'trace_plus' in the run, 'grpo' was given"),
        (["--env.max-turns", "3"], "cannot change env.max_turns: env.max_turns is None in the run, 3 was given"),
        (["--seed", "1", "--model", "tiny"], "cannot change model, seed: model is '"),
        (["--env-id", "Other-v0"], "cannot change env_id"),
    ],
)
def test_what_makes_another_run_is_refused_on_resuming(config, capsys, words, message):
    train(replace(config, updates=1))
    before = (config.directory / "config.yaml").read_bytes()
    assert main(["train", "--resume", "--runs", str(config.runs), "--name", "one", *words]) == 2
    assert message in one_line(capsys)
    assert (config.directory / "config.yaml").read_bytes() == before


def test_a_shipped_model_brings_the_way_it_is_asked(tmp_path):
    assert EnvConfig().kwargs() == {}
    runs = {"runs": tmp_path, "name": "x"}
    tiny = resolve(TrainConfig(**runs)).env
    assert tiny.kwargs() == {"top_k": 2, "system_prompt": ""}
    tools = resolve(TrainConfig(**runs, env_id="TraceToolUse-v0")).env
    assert tools.kwargs() == {"system_prompt": "", "calls_per_turn": 1}
    given = resolve(TrainConfig(**runs, env=EnvConfig(top_k=5))).env
    assert given.kwargs() == {"top_k": 5, "system_prompt": ""}
    assert resolve(TrainConfig(**runs, model="./other")).env.kwargs() == {}
    assert resolve(TrainConfig(**runs, env_id="Echo-v0")).env.kwargs() == {}


def test_nothing_to_resume_and_no_config(config, tmp_path, capsys):
    assert command(config, tmp_path, "--resume") == 2
    assert "start the run anew, without --resume" in one_line(capsys)
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in one_line(capsys)
    assert main(["tarin"]) == 2
    assert "unknown command 'tarin'; known: train, evaluate" in one_line(capsys)
    assert main(["show", str(tmp_path)]) == 2
    assert "is no run" in one_line(capsys)


def test_a_dry_run_prints_the_settings_and_writes_nothing(config, tmp_path, capsys):
    config = replace(config, name="long-" * 40)
    assert command(config, tmp_path, "--dry-run", "--lr", "0.5") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert from_dict(TrainConfig, printed, "printed") == resolve(replace(config, lr=0.5))
    assert not config.directory.exists()


def test_settings_that_are_ignored_are_named(config, caplog):
    Trainer(replace(config, allocator="grpo")).close()
    assert "settings of trace_plus are ignored: the allocator is grpo" in caplog.text
    caplog.clear()
    Trainer(replace(config, name="two")).close()
    assert not caplog.text


def test_settings_go_through_yaml(config):
    assert from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(config))), "x") == config
    assert from_dict(TrainConfig, {}, "x") == TrainConfig()
    with pytest.raises(ValueError, match=r"given.yaml: expected settings of TrainConfig as a mapping, got list"):
        from_dict(TrainConfig, [], "given.yaml")


def test_a_run_from_the_command_line_ends_with_a_report(config, tmp_path, capsys):
    assert command(config, tmp_path) == 0
    assert (config.directory / "report.html").stat().st_size > 1000
    out = " ".join(capsys.readouterr().out.split())
    assert "48 rollouts" in out and "3 updates of 16 rollouts, seed 0" in out
    assert main(["show", str(config.directory)]) == 0


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
