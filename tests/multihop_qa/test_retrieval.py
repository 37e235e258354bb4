"""BM25 search: rank_bm25's scores and ranking, at any corpus, from any thread, from any state of the cache."""

import copy
import json
import pickle
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from trace_envs.multihop_qa import retrieval
from trace_envs.multihop_qa.data import Passage
from trace_envs.multihop_qa.retrieval import BM25Index, format_passages, make_retriever, tokenize

WORDS = [f"w{i}" for i in range(12)]


def expected(oracle, tokens, query, k):
    """Returns what a stable sort of rank_bm25's scores gives among the documents that share a word."""
    words = tokenize(query)
    scores = oracle.get_scores(words)
    shares = np.array([not set(words).isdisjoint(doc) for doc in tokens])
    order = [i for i in np.argsort(-scores, kind="stable") if shares[i]][:k]
    return order, scores[order], scores


def check(texts, query, k, **parameters):
    tokens = [tokenize(text) for text in texts]
    index = BM25Index(texts, **parameters)
    if not any(tokens):  # rank_bm25 divides by zero
        assert len(index.search(query, k)[0]) == 0
        return
    order, scores, everything = expected(BM25Okapi(tokens, **parameters), tokens, query, k)
    found, got = index.search(query, k)
    assert found.dtype == np.int64 and got.dtype == np.float64
    assert found.tolist() == order
    np.testing.assert_array_equal(got, scores)
    np.testing.assert_array_equal(index.scores(query), everything)


documents = st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=60)
queries = st.lists(st.sampled_from([*WORDS, "unknown"]), max_size=10).map(" ".join)


@given(documents, queries, st.integers(1, 70))
@settings(max_examples=300, deadline=None)
def test_equals_rank_bm25(texts, query, k):
    check(texts, query, k)


@given(documents, queries, st.floats(0.1, 3), st.floats(0, 0.99), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_equals_rank_bm25_with_other_parameters(texts, query, k1, b, epsilon):
    check(texts, query, 5, k1=k1, b=b, epsilon=epsilon)


@pytest.mark.parametrize("row_bytes", [0, 20_000, 128 << 20])
def test_equals_rank_bm25_on_a_skewed_corpus(row_bytes, monkeypatch):
    """Frequent and rare words, kept as rows or as lists, with and without the early end."""
    monkeypatch.setattr(retrieval, "_ROW_BYTES", row_bytes)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{z}" for z in rng.zipf(1.3, rng.integers(0, 60)) % 5000) for _ in range(1500)]
    tokens = [tokenize(text) for text in texts]
    oracle, index = BM25Okapi(tokens), BM25Index(texts)
    for _ in range(60):
        query = " ".join(f"w{z}" for z in rng.zipf(1.3, rng.integers(1, 20)) % 5000)
        k = int(rng.choice([1, 5, 100, 2000]))
        order, scores, _ = expected(oracle, tokens, query, k)
        found, got = index.search(query, k)
        assert found.tolist() == order
        np.testing.assert_array_equal(got, scores)


def test_a_word_in_more_than_half_of_the_documents_keeps_the_floored_idf():
    check(["a b", "a c", "a d e", "f g", "a h i j"], "a b", 5)


def test_an_idf_too_small_for_single_precision():
    check(["a b", "a c", "a d", "e"], "a", 5, epsilon=1e-60)


def test_documents_that_share_no_word_are_not_returned():
    index = BM25Index(["red apple", "green pear", "", "red plum"])
    assert index.search("RED", 10)[0].tolist() == [0, 3]
    assert [len(part) for part in index.search("nothing known", 3)] == [0, 0]
    assert len(index.search("  !? ", 3)[0]) == 0


def test_ties_go_to_the_lower_position():
    assert BM25Index(["x y"] * 50 + ["z"] * 100).search("y", 7)[0].tolist() == list(range(7))


def test_unicode_words():
    assert BM25Index(["Ångström é", "Straße", "東京 タワー"]).search("ångström", 1)[0].tolist() == [0]
    assert BM25Index(["Ångström é", "Straße", "東京 タワー"]).search("東京", 1)[0].tolist() == [2]


@pytest.mark.parametrize(
    ("texts", "k", "parameters", "message"),
    [([], 1, {}, "at least one text"), (["a"], 0, {}, "k must be"), (["a"], 1, {"k1": 0}, "k1 must be")],
)
def test_bad_arguments(texts, k, parameters, message):
    with pytest.raises(ValueError, match=message):
        BM25Index(texts, **parameters).search("a", k)


def test_an_index_is_shared_by_copies_and_survives_pickling():
    index = BM25Index(["red apple", "green pear"])
    assert copy.deepcopy({"index": index})["index"] is index and copy.copy(index) is index
    again = pickle.loads(pickle.dumps(index))
    assert again.search("pear", 1)[0].tolist() == [1] and again.content_hash == index.content_hash


def test_the_content_hash_depends_on_texts_and_parameters():
    hashes = {
        BM25Index(texts, k1=k1).content_hash for texts in (["ab", "c"], ["a", "bc"], ["ab c"]) for k1 in (1.2, 1.5)
    }
    assert len(hashes) == 6


def test_threads_share_an_index():
    rng = np.random.default_rng(1)
    texts = [" ".join(f"w{z}" for z in rng.zipf(1.4, 30) % 500) for _ in range(2000)]
    asked = [" ".join(f"w{z}" for z in rng.zipf(1.4, 6) % 500) for _ in range(200)]
    index = BM25Index(texts)
    truth = [index.search(query, 5)[0].tolist() for query in asked]
    wrong: list[int] = []

    def work():
        wrong.extend(i for i, query in enumerate(asked) if index.search(query, 5)[0].tolist() != truth[i])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


TEXTS = ["red apple", "", "green pear and red plum", "straße 東京"]


def test_the_cache_gives_the_same_index(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_CACHE_DIR", str(tmp_path / "new" / "folder"))
    plain, first = BM25Index(TEXTS), BM25Index.cached(TEXTS)
    monkeypatch.setattr(retrieval, "_count", None)  # the second time it must be read
    second = BM25Index.cached(TEXTS)
    assert plain.content_hash == first.content_hash == second.content_hash
    for query in ("red", "pear straße", "東京 red red"):
        for index in (first, second):
            for got, wanted in zip(index.search(query, 3), plain.search(query, 3), strict=True):
                np.testing.assert_array_equal(got, wanted)
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".npz"]


def overwrite(**arrays):
    def damage(path):
        with np.load(path) as file:
            content = dict(file)
        np.savez(path, **{**content, **arrays})

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive at all"),
        lambda path: path.write_bytes(bytes([*path.read_bytes()[:400], 255, *path.read_bytes()[401:]])),
        overwrite(tf=np.array([7] * 8, np.int32)),
        overwrite(docs=np.array([99] * 8, np.int32)),
        overwrite(docs=np.array([{}], object)),
        overwrite(indptr=np.zeros(0, np.int64)),
        overwrite(digest=np.frombuffer(b"another", np.uint8)),
    ],
)
def test_a_damaged_cache_file_is_rebuilt_with_a_warning(tmp_path, damage):
    BM25Index.cached(TEXTS, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damage(path)
    if path.read_bytes() == whole:
        pytest.skip("the damage hit padding")
    with pytest.warns(UserWarning, match="damaged"):
        index = BM25Index.cached(TEXTS, tmp_path)
    assert index.search("plum", 1)[0].tolist() == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BM25Index.cached(TEXTS, tmp_path)


def test_an_unwritable_cache_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="TRACE_CACHE_DIR"):
        assert BM25Index.cached(TEXTS, tmp_path / "file").search("plum", 1)[0].tolist() == [2]


def test_make_retriever():
    assert make_retriever("bm25", TEXTS).search("pear", 2)[0].tolist() == [2]
    with pytest.raises(ValueError, match="unknown retriever 'dense'; known: bm25"):
        make_retriever("dense", TEXTS)


def test_format_passages():
    passages = [Passage("Ann", "was born."), Passage("Bob (poet)", "wrote:\n[3] Fake: x")]
    assert format_passages(passages) == "[1] Ann: was born.\n[2] Bob (poet): wrote: [3] Fake: x"
    assert format_passages([]) == ""


@pytest.mark.data
def test_equals_rank_bm25_on_real_passages(data_dir):
    folder = data_dir / "musique"
    passages = json.loads((folder / "musique_train_corpus.json").read_text(encoding="utf-8"))
    texts = [f"{passage['title']} {passage['text']}" for passage in passages]
    tokens = [tokenize(text) for text in texts]
    index, oracle = BM25Index(texts), BM25Okapi(tokens)
    for record in json.loads((folder / "musique_train.json").read_text(encoding="utf-8")):
        order, scores, _ = expected(oracle, tokens, record["question"], 5)
        found, got = index.search(record["question"], 5)
        assert found.tolist() == order
        np.testing.assert_allclose(got, scores, rtol=0, atol=1e-9)
