"""The dictionary for `rollout_func`, through TRL's own code up to the loss."""

import pytest
import torch
from echo_env import echo_forest, random_model

pytest.importorskip("trl")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from agents.evaluate import make_vector
from agents.policies import TransformersPolicy
from allocation import TreeAllocationWrapper, UniformAllocator
from allocation.export import environment_reward, to_trl

GROUP, PROMPTS = 4, 2


@pytest.fixture(scope="module")
def forest(model, tokenizer):
    for seed in range(20):  # until some prompt has both outcomes and some rollout no room
        envs = TreeAllocationWrapper(
            make_vector("Echo-v0", 4, {}), allocator=UniformAllocator(GROUP), budget=GROUP * PROMPTS
        )
        policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, max_context=28, seed=seed)
        forest = echo_forest(model, tokenizer, policy=policy, envs=envs)
        if forest.ledger.unacted and forest.effective_ratio():
            break
    assert [len(tree.leaves()) for tree in forest] == [GROUP] * PROMPTS and forest.ledger.unacted
    return forest


@pytest.fixture(scope="module")
def prepared(forest, tokenizer, tmp_path_factory):
    """What the trainer makes of the forest, and what its reward functions were given."""
    tokenizer.pad_token = tokenizer.eos_token if tokenizer.pad_token is None else tokenizer.pad_token
    seen = {}

    def correctness(is_correct, task_id, **rest):
        seen.update(rest, task_id=task_id)
        return [float(x) for x in is_correct]

    prompts = [tree.root.observation for tree in forest for _ in range(GROUP)]
    trainer = GRPOTrainer(
        model=random_model(tokenizer),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=GROUP * PROMPTS,
            num_generations=GROUP,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        reward_funcs=[environment_reward, correctness],
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        rollout_func=lambda prompts, trainer: to_trl(forest, pad_token_id=tokenizer.pad_token_id),
    )
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts]), seen


def test_trl_scores_the_tokens_that_were_sampled(forest, prepared):
    batch, seen = prepared
    for i, record in enumerate(forest.rollouts()):
        n = len(record.completion_ids)
        assert batch["prompt_ids"][i][batch["prompt_mask"][i] == 1].tolist() == record.prompt_ids.tolist()
        assert batch["completion_ids"][i][batch["completion_mask"][i] == 1].tolist() == record.completion_ids.tolist()
        loss_mask = batch["completion_mask"][i] * batch["tool_mask"][i]
        assert loss_mask[:n].tolist() == record.loss_mask.tolist() and not loss_mask[n:].any()
        assert seen["task_id"][i] == record.task_id and seen["total_reward"][i] == record.total_reward
    assert batch["num_items_in_batch"] == sum(record.loss_mask.sum() for record in forest.rollouts())


def test_trls_advantages_are_those_of_the_trees(forest, prepared):
    batch, _ = prepared
    rewards = torch.tensor([record.total_reward + record.is_correct for record in forest.rollouts()]).view(-1, GROUP)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert expected.any()
    torch.testing.assert_close(batch["advantages"], expected.flatten(), rtol=1e-3, atol=1e-4)
