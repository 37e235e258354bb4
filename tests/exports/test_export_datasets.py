"""Datasets and Parquet files: what is read back is what was written."""

import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
from export_forests import advantages_of, search_forest, token_forests
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.export import (
    read_parquet,
    records_from_dataset,
    rollout_records,
    to_dataset,
    write_parquet,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"])},
    optional={
        "content": st.none() | TEXTS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})),
        "tool_calls": st.lists(
            st.dictionaries(TEXTS, st.integers() | st.none() | st.booleans(), max_size=2), max_size=2
        ),
        "more": TEXTS,
    },
)


@settings(max_examples=50, deadline=None)
@given(token_forests(rewards=("dense",)), st.booleans(), st.lists(st.lists(MESSAGES), max_size=3), st.data())
def test_datasets_give_back_what_went_in(forest, with_advantages, conversations, data):
    records = forest.rollouts(advantages_of(forest) if with_advantages else None)
    told = zip(records, conversations, strict=False)
    records[: len(conversations)] = [replace(record, messages=tuple(messages)) for record, messages in told]
    dataset = to_dataset(records)
    assert records_from_dataset(dataset) == records
    order = data.draw(st.permutations(range(len(records))))[: len(records) // 2 + 1]
    assert records_from_dataset(dataset.select(order)) == [records[i] for i in order]


@pytest.fixture(scope="module")
def searched():
    return search_forest()


@pytest.mark.parametrize("name", ["sampled", "searched"])
def test_files_give_back_what_went_in(name, request, tmp_path):
    forest = request.getfixturevalue(name)
    records, file = forest.rollouts(), tmp_path / "rollouts.parquet"
    write_parquet(forest, file)
    assert read_parquet(file) == records
    again = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert records_from_dataset(again) == records
    assert again.features == forest.to_dataset().features


def test_columns_are_what_trainers_look_for(searched, sampled):
    dataset = searched.to_dataset()
    row = next(row for row in dataset if len(row["messages"]) > 2)
    assert [m["role"] for m in row["messages"][:3]] == ["system", "user", "assistant"]
    assert set(row["messages"][0]) == {"role", "content"} and row["prompt_ids"] == [] and not row["has_ids"]
    right = searched.to_dataset().filter(lambda row: row["is_correct"], load_from_cache_file=False)
    assert 0 < len(right) < len(dataset)
    assert all(record.is_correct for record in records_from_dataset(right))
    for row in sampled.to_dataset(np.zeros(sum(len(t.nodes) for t in sampled))):
        assert len(row["completion_ids"]) == len(row["loss_mask"]) == len(row["logprobs"]) == len(row["turn_ids"])
        assert len(row["rewards"]) == len(row["advantages"]) == len(row["finish_reasons"]) == len(row["nodes"]) - 1


def test_no_rollouts_are_an_empty_dataset(tmp_path):
    dataset = to_dataset(rollout_records([]))
    assert len(dataset) == 0 and records_from_dataset(dataset) == []
    write_parquet([], tmp_path / "none.parquet")
    assert read_parquet(tmp_path / "none.parquet") == []


def test_other_data_is_refused(sampled, tmp_path):
    dataset = sampled.to_dataset()
    with pytest.raises(
        ValueError, match=r"no rollouts as forest.to_dataset\(\) gives them: no column turn_ids, rewards"
    ):
        records_from_dataset(dataset.remove_columns(["turn_ids", "rewards"]))
    file = tmp_path / "rollouts.parquet"
    dataset.remove_columns("logprobs").to_parquet(file)
    with pytest.raises(ValueError, match="no column logprobs"):
        read_parquet(file)
    write_parquet(sampled, file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is no whole Parquet file"):
        read_parquet(file)


def test_a_missing_package_is_named(sampled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for use in (sampled.to_dataset, lambda: read_parquet(tmp_path / "file")):
        with pytest.raises(ImportError, match=r"pip install 'trace-envs\[datasets\]'"):
            use()
