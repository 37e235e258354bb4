"""What the generation benchmark counts, against counting by hand."""

import numpy as np
import torch
from echo_env import echo_forest

from agents.policies import TransformersPolicy
from benchmarks.generation import RATIO_BAR, cells
from benchmarks.generation_forest import Asked, unique_tokens
from benchmarks.generation_peer import generate_calls


def test_different_tokens_are_those_that_an_engine_has_to_compute(model, tokenizer):
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=8, max_context=40)
    asked = Asked(policy)
    forest = echo_forest(model, tokenizer, policy=asked)
    assert forest.ledger.unacted
    # By prefix: what was shown where an action followed, and what was sampled.
    total = 0
    for tree in forest:
        shown = {n.parent for n in tree.nodes[1:] if n.sample.acted}
        total += sum(len(tree.nodes[i].context_ids) for i in shown)
        total += sum(len(n.sample.action_ids) for n in tree.nodes[1:])
    assert unique_tokens(forest) == total
    assert sum(map(len, asked.calls)) == sum(len(t.nodes) - 1 for t in forest) and asked.seconds > 0


def test_the_peer_counts_what_it_samples_and_computes(model, tokenizer):
    calls = [[np.array([5, 6, 7]), np.array([8])], [np.array([9, 10])]]
    end = tokenizer.eos_token_id
    state = torch.get_rng_state()
    found = generate_calls(model, calls, end_id=end, max_new_tokens=4, seed=0)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator stays where it was"
    assert 3 <= found.tokens <= 12 and found.seconds > 0
    assert 2 * 3 + 2 <= found.computed <= 2 * (3 + 3) + (2 + 3)
    again = generate_calls(model, calls, end_id=end, max_new_tokens=4, seed=0)
    assert (again.tokens, again.computed) == (found.tokens, found.computed)


def test_the_table_says_what_missed_its_bar():
    row = {
        "engine": "transformers",
        "model": "tiny",
        "workload": "trees",
        "unique_tokens": 100,
        "computed": {"prefill": 100, "decode": 20},
        "ratio": 1.2,
        "ratio_bar": RATIO_BAR,
        "tokens_per_second": 10.0,
        "times": 1.6,
        "times_bar": 1.5,
    }
    assert cells([row])[1][5:8] == ["1.200", "<= 1.1", "MISSED"] and cells([row])[1][-3:] == ["1.60 x", ">= 1.5", "met"]
