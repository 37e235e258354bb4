"""TRL's own trainer on environments of this package: what it samples, what it trains on, and what it is told of rewards."""

import copy
import itertools

import numpy as np
import pytest
import torch
import trl_games
from transformers.utils import get_json_schema

trl = pytest.importorskip("trl")

from agents.models import load_model  # noqa: E402
from agents.trl import environment_factory, environment_reward, episode_reward, rollout_func, trl_dataset  # noqa: E402
from agents.trl.rollouts import GROUPED  # noqa: E402

GROUP = 4
BATCH = 4 * GROUP


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    trl_games.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield


@pytest.fixture(scope="module")
def tokenizer(_quiet):
    return trl_games.small_tokenizer()


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A model that mostly plays by the rules; not to be changed."""
    return trl_games.player(tokenizer)


class Trainer(trl.GRPOTrainer):
    """The trainer as it is; it keeps the batches that it trains on."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("batches", []).append(batch)
        return batch


@pytest.fixture
def make(taught, tokenizer, tmp_path):
    def make(reward, env_id="Place-v0", data=None, settings=(), **source):
        settings = {
            "max_steps": 1,
            "per_device_train_batch_size": BATCH,
            "num_generations": GROUP,
            "learning_rate": 1e-3,
            "max_completion_length": 100,
            "bf16": False,
        } | dict(settings)
        fixed = {
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 0,
        }
        return Trainer(
            copy.deepcopy(taught),
            reward,
            trl.GRPOConfig(output_dir=str(tmp_path), **settings, **fixed),
            trl_dataset(env_id) if data is None else data,
            processing_class=copy.deepcopy(tokenizer),
            **source,
        )

    return make


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def rows(batch, key, mask):
    return [ids[kept.bool()].tolist() for ids, kept in zip(batch[key], batch[mask], strict=True)]


def shown(batch, tokenizer):
    """What of each completion is not trained on."""
    masked = batch["completion_mask"] * (1 - batch["tool_mask"])
    return [tokenizer.decode(ids[kept.bool()]) for ids, kept in zip(batch["completion_ids"], masked, strict=True)]


def group_advantages(rewards):
    """Those of GRPO, as TRL's documentation has them."""
    groups = torch.tensor(rewards, dtype=torch.float32).view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def test_the_trainer_plays_the_environment(make, taught, tokenizer):
    """It samples and calls the tools; rewards are the environment's, and what tools answer is not trained on."""
    scored = []

    def reward(**given):
        found = episode_reward(**given)
        scored.append((found, given["completions"], [e.info for e in given["environments"]], given["task_id"]))
        return found

    trainer = make(reward, environment_factory=environment_factory("Place-v0"))
    assert [get_json_schema(t) for t in trainer.tools] == [trl_games.LOOKUP]
    trainer.train()
    assert (weights(trainer.model) - weights(taught)).abs().max() > 1e-5
    [(rewards, completions, infos, task_ids)], [batch] = scored, trainer.batches
    assert len(set(rewards)) > 1 and sum(len(messages) == 3 for messages in completions) > BATCH / 2
    texts = shown(batch, tokenizer)
    for index, (messages, info) in enumerate(zip(completions, infos, strict=True)):
        assert info["task_id"] == task_ids[index] == task_ids[index // GROUP * GROUP]
        results = [m["content"] for m in messages if m["role"] == "tool"]
        assert info["tool_calls"] == len(results)
        assert texts[index] == "".join(
            f"\n<|im_start|>user\n<tool_response>\n{result}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            for result in results
        )
        right = f"<answer>{trl_games.PLACES[info['task_id']]}</answer>" == messages[-1]["content"]
        assert info.get("is_correct", False) == right and (rewards[index] == 1.0) == right
    assert torch.allclose(batch["advantages"], group_advantages(rewards), atol=1e-4)
    logged = trainer.state.log_history[0]
    assert logged["reward"] == pytest.approx(np.mean(rewards))
    assert logged["is_correct"] == pytest.approx(np.mean([r == 1.0 for r in rewards]))
    assert logged["tools/failure_frequency"] == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_learns_from_trees(make, taught, tokenizer, bf16):
    """Each group is one tree, and every token that is trained on is one that was sampled, id for id."""
    forests = []
    rollouts = rollout_func("Place-v0", allocator="treepo", num_envs=5, done=forests.append)
    trainer = make(environment_reward, rollout_func=rollouts, settings={"bf16": bf16, "max_steps": 2})
    trainer.train()
    assert (weights(trainer.model) - weights(taught)).abs().max() > 1e-5
    assert len(forests) == len(trainer.batches) == 2
    for version, (forest, batch) in enumerate(zip(forests, trainer.batches, strict=True)):
        prompts, completions = (
            rows(batch, "prompt_ids", "prompt_mask"),
            rows(batch, "completion_ids", "completion_mask"),
        )
        rewards, index = [], 0
        assert forest.ledger.continuations > 0 and len(forest) == BATCH // GROUP
        for tree in forest:
            for leaf in sorted(tree.leaves(), key=lambda n: n.id):
                path = tree.path(leaf)
                assert prompts[index] == path[0].context_ids.tolist()
                mask, ids, logprobs = [], [], []
                for node in path[1:]:
                    assert node.sample.version == version
                    follows = [] if node is leaf else node.context_ids.tolist()
                    ids += [*node.sample.action_ids.tolist(), *follows]
                    logprobs += [*node.sample.logprobs.tolist(), *[0.0] * len(follows)]
                    mask += [1] * len(node.sample.action_ids) + [0] * len(follows)
                assert completions[index] == ids
                assert batch["tool_mask"][index, : len(ids)].tolist() == mask
                assert batch["sampling_per_token_logps"][index, : len(ids)].tolist() == pytest.approx(
                    logprobs, abs=1e-6
                )
                rewards.append(tree.returns()[leaf.id])
                index += 1
        assert index == BATCH
        assert torch.allclose(batch["advantages"], group_advantages(rewards), atol=1e-4)
        assert trainer.state.log_history[version]["reward"] == pytest.approx(np.mean(rewards))
        forest.verify()
        assert len(set(rewards)) > 1


def test_the_model_of_the_moment_is_sampled(make, taught, tokenizer):
    """Before the second step the weights have moved, and log-probs are those of the moved weights."""
    trainer = make(environment_reward, rollout_func=rollout_func("Place-v0"), settings={"max_steps": 1})
    for model in (taught, trainer.model):
        prompts = [row["prompt"] for row in trl_dataset("Place-v0") for _ in range(GROUP)]
        output = trainer.rollout_func(prompts, trainer)
        for prompt, completion, mask, logprobs in zip(
            output["prompt_ids"], output["completion_ids"], output["env_mask"], output["logprobs"], strict=True
        ):
            with torch.no_grad():
                logits = model.eval()(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            kept = torch.tensor(mask).bool()
            assert torch.allclose(torch.tensor(logprobs)[kept], expected[kept], atol=1e-4)
        if model is taught:
            trainer.train()
    assert (weights(trainer.model) - weights(taught)).abs().max() > 1e-5


def test_both_ways_show_the_same_prompt(make):
    one = make(episode_reward, environment_factory=environment_factory("Place-v0"))
    two = make(environment_reward, rollout_func=rollout_func("Place-v0"))
    for trainer in (one, two):
        trainer.train()
    prompts = [{tuple(ids) for ids in rows(t.batches[0], "prompt_ids", "prompt_mask")} for t in (one, two)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == len(trl_games.PLACES)


def test_evaluation_has_groups_of_its_own_size(make):
    trainer = make(
        environment_reward,
        rollout_func=rollout_func("Place-v0"),
        eval_dataset=trl_dataset("Place-v0", task_ids=["Dag", "Ada"]),
        settings={"num_generations_eval": 3, "per_device_eval_batch_size": 6},
    )
    figures = trainer.evaluate()
    assert 0 <= figures["eval_reward"] <= 1 and len(trainer.batches) == 1
    assert len(trainer.batches[0]["prompt_ids"]) == 6


@pytest.mark.parametrize("allocator", GROUPED)
def test_every_prompt_gets_a_row_whatever_part_of_a_group_is_wanted(make, allocator):
    """A process may be given some of a group, and a prompt may stand in a batch twice."""
    forests = []
    rollouts = rollout_func("Place-v0", allocator=allocator, num_envs=3, done=forests.append)
    trainer = make(
        environment_reward, rollout_func=rollouts, settings={"num_generations": 6, "per_device_train_batch_size": 6}
    )
    by_task = {row["task_id"]: row["prompt"] for row in trl_dataset("Place-v0")}
    wanted = ["Ada"] * 1 + ["Bob"] * 6 + ["Cem"] * 8 + ["Dag"] * 6 + ["Ada"] * 2
    output = rollouts([by_task[name] for name in wanted], trainer)
    assert output["task_id"] == wanted
    assert {len(values) for values in output.values()} == {len(wanted)}
    sizes = [[len(tree.leaves()) for tree in forest] for forest in forests]
    assert sorted(itertools.chain(*sizes)) == [1, 2, 2, 6, 6, 6]
    assert all(len(set(same)) == 1 for same in sizes)


def test_processes_do_not_repeat_each_other(make):
    trainer = make(environment_reward, rollout_func=rollout_func("Place-v0"))
    prompts = [row["prompt"] for row in trl_dataset("Place-v0") for _ in range(GROUP)]

    def sampled(process):
        class Accelerator:
            process_index = process
            unwrap_model = staticmethod(trainer.accelerator.unwrap_model)

        trainer.accelerator, before = Accelerator(), trainer.accelerator
        try:
            return rollout_func("Place-v0")(prompts, trainer)["completion_ids"]
        finally:
            trainer.accelerator = before

    assert sampled(0) == sampled(0) != sampled(1)


def test_what_cannot_be_followed_is_refused(make):
    with pytest.raises(ValueError, match="which allocator 'trace' does not give; use one of grpo"):
        rollout_func("Place-v0", allocator="trace")
    rollouts = rollout_func("Place-v0", max_turns=2)
    trainer = make(environment_reward, rollout_func=rollouts)
    with pytest.raises(ValueError, match="no task of 'Place-v0' has the prompt 'Where is Eve"):
        rollouts([[{"role": "user", "content": "Where is Eve?"}]], trainer)
    twin = rollout_func("Twin-v0")
    with pytest.raises(ValueError, match="tasks 'Ada' and 'Bob' of 'Twin-v0' are asked in the same words"):
        twin([[{"role": "user", "content": "Where?"}]], trainer)
    for setting, value in (("min_p", 0.1), ("repetition_penalty", 1.2)):
        other = make(environment_reward, rollout_func=rollouts, settings={setting: value})
        with pytest.raises(ValueError, match=f"does not know {setting}"):
            rollouts([trl_dataset("Place-v0")[0]["prompt"]], other)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP and DeepSpeed"):
        rollout_func("Place-v0")([trl_dataset("Place-v0")[0]["prompt"]], trainer)


def test_data_without_tasks_are_refused(make):
    trainer = make(
        episode_reward,
        data=trl_dataset("Place-v0").remove_columns("task_id"),
        environment_factory=environment_factory("Place-v0"),
    )
    with pytest.raises(ValueError, match="no column task_id"):
        trainer.train()


def test_a_data_set_of_task_ids_alone_will_do(make):
    data = trl_dataset("Place-v0").remove_columns("prompt")
    trainer = make(episode_reward, data=data, environment_factory=environment_factory("Place-v0"))
    trainer.train()
    text = trainer.processing_class.decode(trainer.batches[0]["prompt_ids"][0])
    assert text.endswith("?<|im_end|>\n<|im_start|>assistant\n") and "<|im_start|>user\nWhere is " in text


def test_tools_of_every_kind_are_the_trainers_tools(make):
    trainer = make(episode_reward, "Trip-v0", environment_factory=environment_factory("Trip-v0"))
    assert {t.__name__ for t in trainer.tools} == {t["function"]["name"] for t in trl_games.TOOLS}


def test_conversations_with_tools_are_learned_through_rollouts(tmp_path):
    """The shipped agent, whose episodes go on over several messages of a user."""
    settings = {"system_prompt": "", "calls_per_turn": 1, "split": "validation"}
    model, tokenizer = load_model("tiny-tools")
    forests = []
    options = {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 512}
    trainer = trl.GRPOTrainer(
        model,
        environment_reward,
        trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", seed=0, **options),
        trl_dataset("TraceToolUse-v0", task_ids=["shop-3-0", "files-3-1", "messages-3-2", "calendar-3-3"], **settings),
        processing_class=tokenizer,
        rollout_func=rollout_func("TraceToolUse-v0", done=forests.append, num_envs=8, **settings),
    )
    before = weights(trainer.model)
    trainer.train()
    ends = [leaf for forest in forests for tree in forest for leaf in tree.leaves()]
    assert len(ends) == 8 and any(leaf.is_correct for leaf in ends) and max(leaf.depth for leaf in ends) > 2
    assert (weights(trainer.model) - before).abs().max() > 0
