"""`trace-envs train`: its settings, its mistakes, its files."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import metrics, train

from agents.cli import main
from agents.config import EnvConfig, TrainConfig, from_dict, load_config, resolve, to_dict
from agents.trainer import Trainer

DATA = Path(os.environ.get("TRACE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


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
    assert not caplog.text and config.ignored == []
    compiled = replace(config, compile=True)
    assert compiled.ignored == []
    assert replace(compiled, policy="vllm").ignored == [
        "compile is ignored: the policy is vllm, whose compilation is engine.eager"
    ]


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
