import dataclasses

import numpy as np
import pytest
import torch

from agents.models import load_model
from agents.policies.chat import ChatCodec
from agents.renaming import Renamer
from agents.tiny import build_model, build_tokenizer
from agents.trajectories import oracle_trajectory, supervised_loss
from agents.warm_start import Phase, WarmStartConfig, tokenizer_texts, warm_start
from trace_envs.multihop_qa import MultiHopQAEnv
from trace_envs.multihop_qa.synthetic.names import split_countries, split_words


@pytest.fixture(scope="module")
def env():
    return MultiHopQAEnv(split="train", top_k=2, system_prompt="")


@pytest.fixture(scope="module")
def codec(env):
    return ChatCodec(build_tokenizer(tokenizer_texts(env.dataset)))


@pytest.fixture(scope="module")
def trajectories(env, codec):
    rng = np.random.default_rng(0)
    tasks = [env.dataset.tasks[int(i)] for i in rng.choice(len(env.dataset.tasks), 25, replace=False)]
    return [(t, oracle_trajectory(env, codec, t.task_id, rng, 0.2)) for t in tasks]


def words_of(text, words):
    """The name words of a text in order, however they are joined to what stands around them."""
    found = []
    for i, word in ((i, text[i : i + n]) for i in range(len(text)) for n in (7, 6, 5, 4)):
        if word in words and not text[i + len(word) : i + len(word) + 1].isalpha():
            found.append((i, word))
    return [w for _, w in found]


def test_any_text_survives_the_tokenizer(codec, trajectories):
    texts = [
        "",
        " ",
        "naïve \n\t\x00 日本語 🙂",
        '<answer>"}}</answer>',
        "Belan Belan's 1987",
        *[t.prompt for t, _ in trajectories],
    ]
    for text in texts:
        assert codec.tokenizer.decode(codec.tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_mask_covers_exactly_what_the_oracle_said(env, codec, trajectories):
    for task, trajectory in trajectories:
        ids, mask = trajectory.ids, trajectory.mask
        assert len(ids) == len(mask) and not mask[0] and mask[-1] and ids[-1] == codec.end_id
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        env.reset(options={"task_id": task.task_id})
        for start, stop in spans:
            assert codec.tokenizer.decode(ids[:start]) == codec.tokenizer.apply_chat_template(
                env.messages(), tools=env.tools, tokenize=False, add_generation_prompt=True
            )
            assert ids[stop - 1] == codec.end_id and codec.end_id not in ids[start : stop - 1]
            *_, terminated, truncated, info = env.step(codec.text_of(ids[start:stop]))
        assert terminated and not truncated and info["is_correct"] and info["tool_errors"] == 0


def test_renaming_keeps_to_the_words_of_the_split_and_is_consistent(codec, trajectories):
    rename = Renamer(codec.tokenizer)
    words, countries = set(split_words("train")), set(split_countries("train"))
    changed = 0
    for seed, (_, trajectory) in enumerate(trajectories):
        ids = trajectory.ids
        new = rename(ids, np.random.default_rng(seed))
        assert new.shape == ids.shape and np.array_equal(new, rename(ids, np.random.default_rng(seed)))
        before, after = (words_of(codec.tokenizer.decode(i), words | countries) for i in (ids, new))
        assert len(before) == len(after) > 0
        mapping = dict(zip(before, after, strict=True))
        assert [mapping[w] for w in before] == after, "one name was given two others"
        assert len(set(mapping.values())) == len(mapping), "two names were given one"
        assert all((a in countries) == (b in countries) for a, b in mapping.items())
        changed += sum(a != b for a, b in mapping.items())
        kept = new == ids
        assert trajectory.mask[~kept].any() and (~trajectory.mask)[~kept].any()
        # Nothing but the words was touched.
        blank = codec.tokenizer.decode(ids), codec.tokenizer.decode(new)
        for w in sorted(mapping, key=len):
            blank = (blank[0].replace(w, "#"), blank[1])
        for w in sorted(mapping.values(), key=len):
            blank = (blank[0], blank[1].replace(w, "#"))
        assert blank[0] == blank[1]
    assert changed > 100


def test_renaming_never_makes_a_name_of_another_split(codec, trajectories):
    rename = Renamer(codec.tokenizer)
    others = {w for split in ("validation", "test") for w in (*split_words(split), *split_countries(split))}
    for seed, (_, trajectory) in enumerate(trajectories):
        assert not words_of(codec.tokenizer.decode(rename(trajectory.ids, np.random.default_rng(seed))), others)


def test_a_tokenizer_that_cuts_names_elsewhere_is_refused():
    class Letters:
        def __len__(self):
            return 256

        def encode(self, text, add_special_tokens=False):
            return [ord(c) for c in text]

    with pytest.raises(ValueError, match="spells the name chunk 'Bal' with more than one token"):
        Renamer(Letters())


@torch.no_grad()
def test_the_supervised_loss_is_that_of_each_trajectory_alone(trajectories, codec):
    model = build_model(len(codec.tokenizer), width=32, layers=1).eval()
    batch = [t for _, t in trajectories[:4]]
    total = 0.0
    for t in batch:
        ids = torch.from_numpy(t.ids)
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(-1, ids[1:, None])[:, 0]
        total -= logprobs[torch.from_numpy(t.mask[1:])].sum().item()
    assert supervised_loss(model, batch).item() == pytest.approx(total, rel=1e-4)


def small(**changes):
    config = WarmStartConfig(
        phases=(Phase(14, (1, 1), 1e-2), Phase(6, (1,), 3e-3)), batch_size=8, width=32, layers=1, heads=2
    )
    return dataclasses.replace(config, **changes)


def test_a_short_warm_start_lowers_the_loss_and_saves_a_model(tmp_path):
    losses = []
    model, tokenizer = warm_start(small(), tmp_path / "a", progress=lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, 21))
    first, last = np.mean([v for _, v in losses[:3]]), np.mean([v for _, v in losses[-3:]])
    assert first == pytest.approx(np.log(len(tokenizer)), rel=0.1) and last < first - 1.0
    loaded, words = load_model(str(tmp_path / "a"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert words.get_vocab() == tokenizer.get_vocab()
    again = []
    warm_start(small(), tmp_path / "b", progress=lambda step, loss: again.append((step, loss)))
    assert again == losses
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
