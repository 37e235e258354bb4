"""Greedy actions are those of `model.generate` on the whole prefix, for every family of decoders that is tried."""

import pytest
import torch
import transformers
from echo_env import echo_forest

from agents.policies import TransformersPolicy

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WINDOW = {"sliding_window": 16, "max_window_layers": 0}
EAGER = {"attn_implementation": "eager"}
FAMILIES = {
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 2}),
    "llama": ("Llama", SMALL | {"num_key_value_heads": 1}),
    "mistral": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": None}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", SMALL),
    "phi3": ("Phi3", SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "olmo2": ("Olmo2", SMALL | {"num_key_value_heads": 2}),
    "granite": ("Granite", SMALL | {"num_key_value_heads": 2}),
    "qwen2_window": ("Qwen2", SMALL | WINDOW | {"num_key_value_heads": 2, "use_sliding_window": True}),
    "mistral_window": ("Mistral", SMALL | {"num_key_value_heads": 2, "sliding_window": 16}),
    "gemma2": ("Gemma2", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}),
    "gemma3": ("Gemma3", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}),
    # Attention that is computed step by step, with caps, sinks or biases.
    "qwen3_eager": ("Qwen3", SMALL | EAGER | {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt2_eager": ("GPT2", EAGER | {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gemma2_eager": ("Gemma2", SMALL | EAGER | {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 2.0}),
    "gpt_oss": (
        "GptOss",
        SMALL
        | EAGER
        | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mpt": ("Mpt", EAGER | {"d_model": 32, "n_layers": 2, "n_heads": 4}),
}


def family(name, kind, settings, tokenizer):
    config_class = {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    model_class = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = getattr(transformers, config_class)(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
        **({"attn_implementation": "sdpa"} | settings),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
    return model.eval()


def before(tree, node):
    ids = []
    for n in tree.path(tree.nodes[node.parent]):
        ids += [] if n.sample is None else n.sample.action_ids.tolist()
        ids += n.context_ids.tolist()
    return ids


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_actions_are_those_of_generate(name, tokenizer):
    model = family(name, *FAMILIES[name], tokenizer)
    policy = TransformersPolicy(model, tokenizer, max_new_tokens=10, temperature=0)
    forest = echo_forest(model, tokenizer, policy=policy)
    assert forest.ledger.continuations > 0
    checked = {}
    for tree in forest:
        for node in tree.nodes[1:]:
            prefix = before(tree, node)
            if tuple(prefix) not in checked:
                ids = torch.tensor([prefix])
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=10,
                    eos_token_id=sorted(policy.codec.stop_ids),
                    pad_token_id=policy.codec.end_id,
                )
                checked[tuple(prefix)] = out[0, len(prefix) :].tolist()
            assert node.sample.action_ids.tolist() == checked[tuple(prefix)]
    assert len(checked) > 8


REFUSED = {
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1} | EAGER, "keys and values by position"),
    "qwen3_next": ("Qwen3Next", SMALL | {"num_key_value_heads": 2, "head_dim": 8}, "linear_attention"),
    "gpt_neo": ("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4} | EAGER, "local"),
    "bart": ("Bart", {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 64}, "its logits differ"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4} | EAGER, "of different lengths together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_computed_exactly_is_refused(name, tokenizer):
    kind, settings, why = REFUSED[name]
    if name == "gpt_neo":
        settings = settings | {"attention_types": [[["global", "local"], 1]]}
    model = family(name, kind, settings, tokenizer)
    with pytest.raises(ValueError, match=rf"{kind}.*{why}.*--policy vllm"):
        TransformersPolicy(model, tokenizer)


def test_an_attention_function_without_masks_is_refused(tokenizer):
    kind, settings = FAMILIES["qwen3"]
    model = family("qwen3", kind, settings | {"attn_implementation": "flex_attention"}, tokenizer)
    with pytest.raises(
        ValueError, match=r"attn_implementation='flex_attention'.*load it with attn_implementation='sdpa'"
    ):
        TransformersPolicy(model, tokenizer)
