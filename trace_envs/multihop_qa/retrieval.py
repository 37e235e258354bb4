"""BM25 search over passages.

Invariant: an index is immutable, and its scores are those of `rank_bm25.BM25Okapi` over the same tokens, bit for bit:
every weight is computed by the same operations and summed in the order of the query's words. Sums in single precision
only choose which documents are scored so, and never miss one of the top k.
"""

from __future__ import annotations

import math
import re
import threading
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trace_envs.multihop_qa.data import Passage
from trace_envs.multihop_qa.index_cache import content_hash, load_or_build

_WORD = re.compile(r"\w+")
_FREQUENT = 1 / 64  # a term in a larger share of the documents is kept as a full row, cheaper to add than a list ...
_ROW_BYTES = 128 << 20  # ... as long as the rows take no more memory than this
_GROUP = 32  # values from which `_floor` takes the greatest
_LEAST_IDF = 1e-20  # less might vanish in single precision
_CACHE_FROM = 5_000  # passages; a smaller index is built as quickly as it is read


def tokenize(text: str) -> list[str]:
    r"""Returns the lower-cased runs of word characters (`\w+`) of a text."""
    return _WORD.findall(text.lower())


class Retriever(Protocol):
    """Finds documents for a query; immutable and safe to share between threads."""

    def search(self, query: str, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns positions [<=k] and scores [<=k] of the best documents, best first."""
        ...


class BM25Index:
    """An inverted index with precomputed BM25 weights (Okapi, idf floored at `epsilon` times the average idf).

    Args:
        texts: The documents; their positions are what `search` returns.
        k1: Saturation of term frequency.
        b: Strength of length normalisation.
        epsilon: Terms in more than half of the documents get this share of the average idf instead of a negative idf.

    Raises:
        ValueError: There is no document, `k1` is not positive or `b` is not in [0, 1].
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75, epsilon: float = 0.25):
        _check(texts, k1, b)
        self._assemble(_count(texts), content_hash(texts, k1, b, epsilon), k1, b, epsilon)

    @classmethod
    def cached(
        cls,
        texts: Sequence[str],
        directory: str | Path | None = None,
        *,
        k1: float = 1.5,
        b: float = 0.75,
        epsilon: float = 0.25,
    ) -> BM25Index:
        """Reads the index of these texts from disk, or builds and writes it.

        Args:
            texts: The documents.
            directory: Where cache files lie; by default `$TRACE_CACHE_DIR` or `~/.cache/trace-envs`.
            k1: As in the constructor.
            b: As in the constructor.
            epsilon: As in the constructor.

        Returns:
            An index equal to `BM25Index(texts, ...)`. A damaged file is rebuilt with a warning; where nothing can be
            written, the index is still returned, with a warning.
        """
        _check(texts, k1, b)
        digest = content_hash(texts, k1, b, epsilon)
        counts = load_or_build(digest, len(texts), lambda: _count(texts), directory)
        index = cls.__new__(cls)
        index._assemble(counts, digest, k1, b, epsilon)
        return index

    def _assemble(self, counts: dict[str, Any], digest: str, k1: float, b: float, epsilon: float) -> None:
        """Derives weights from counts. The formulas keep rank_bm25's order of operations, hence its rounding."""
        terms, indptr, lengths = counts["terms"], counts["indptr"], counts["lengths"]
        docs, tf = counts["docs"].astype(np.intp), counts["tf"]
        self.content_hash, self.k1, self.b, self.epsilon = digest, k1, b, epsilon
        self.size = n = len(lengths)
        self._vocabulary = {term: i for i, term in enumerate(terms)}
        df = np.diff(indptr)
        self._idf = _idf(df.tolist(), n, epsilon)
        total = int(lengths.sum())
        self._norm = k1 * (1 - b + b * lengths.astype(np.int64) / (total / n)) if total else np.zeros(n)
        self._filled = np.flatnonzero(lengths)
        weights = self._weight(np.repeat(self._idf, df), tf, self._norm[docs]).astype(np.float32)
        bounds = np.maximum.reduceat(weights, indptr[:-1]) if len(terms) else np.zeros(0)
        tf_type = np.min_scalar_type(int(tf.max(initial=0)))
        most_rows = _ROW_BYTES // (n * (4 + tf_type.itemsize))
        frequent = np.zeros(len(terms), bool)
        frequent[np.argsort(-df, kind="stable")[:most_rows]] = True
        frequent &= df > max(1, n * _FREQUENT)
        self._row_tf = np.zeros((int(frequent.sum()), n), tf_type)
        self._row_weights = np.zeros((len(self._row_tf), -(-n // _GROUP) * _GROUP), np.float32)
        for row, term in enumerate(np.flatnonzero(frequent).tolist()):
            part = slice(indptr[term], indptr[term + 1])
            self._row_tf[row, docs[part]] = tf[part]
            self._row_weights[row, docs[part]] = weights[part]
        rare = np.repeat(~frequent, df)
        self._docs, self._tf, self._weights = docs[rare], tf[rare], weights[rare]
        starts = np.zeros(len(terms) + 1, np.int64)
        np.cumsum(np.where(frequent, 0, df), out=starts[1:])
        # Plain lists: they are read one element at a time.
        self._starts, self._bounds = starts.tolist(), bounds.tolist()
        self._row = np.where(frequent, np.cumsum(frequent) - 1, -1).tolist()
        self._not_positive = frozenset(np.flatnonzero(self._idf < _LEAST_IDF).tolist())
        tables = (
            self._idf,
            self._norm,
            self._filled,
            self._row_tf,
            self._row_weights,
            self._docs,
            self._tf,
            self._weights,
        )
        for table in tables:
            table.flags.writeable = False
        self._local = threading.local()

    def search(self, query: str, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Finds the best documents.

        Args:
            query: Free text; words that no document holds are ignored, repeated words count repeatedly.
            k: The most documents to return.

        Returns:
            Positions (int64, [<=k]) and scores (float64, [<=k]), best first, ties by lower position. Documents that
            share no word with the query are never returned, so there may be fewer than k.

        Raises:
            ValueError: `k` is less than 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        terms = self._terms(query)
        if not terms:
            return np.empty(0, np.int64), np.empty(0, np.float64)
        lists = _Lists(self, terms)
        # Where a weight is not positive (a term in half of the documents, a tiny corpus) no bound holds.
        bounded = self._not_positive.isdisjoint(terms)
        documents = self._candidates(lists, k) if bounded else self._sharing(lists)
        scores = self._exact(lists, documents)
        order = np.argsort(-scores, kind="stable")[:k]
        return documents[order], scores[order]

    def scores(self, query: str) -> NDArray[np.float64]:
        """Returns the scores of all documents, `BM25Okapi.get_scores` of the tokenized query."""
        scores = np.zeros(self.size)
        if terms := self._terms(query):
            scores[self._filled] = self._exact(_Lists(self, terms), self._filled)
        return scores

    def __len__(self) -> int:
        return self.size

    def __deepcopy__(self, memo: dict[int, Any]) -> BM25Index:
        """Returns the index itself: it is immutable, so copies of an environment share it."""
        return self

    def __copy__(self) -> BM25Index:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def _terms(self, query: str) -> list[int]:
        lookup = self._vocabulary.get
        return [term for word in tokenize(query) if (term := lookup(word)) is not None]

    def _weight(self, idf: NDArray[Any], tf: NDArray[Any], norm: NDArray[Any]) -> NDArray[np.float64]:
        return idf * (tf * (self.k1 + 1) / (tf + norm))

    def _sharing(self, lists: _Lists) -> NDArray[np.int64]:
        """Returns all documents that share a word with the query, sorted."""
        shares = np.zeros(self.size, bool)
        shares[lists.docs] = True
        for row in lists.rows:
            shares |= self._row_tf[row] > 0
        return np.flatnonzero(shares)

    def _candidates(self, lists: _Lists, k: int) -> NDArray[np.int64]:
        """Returns a sorted superset of the top k, by sums in single precision; all weights are positive.

        A document without any of the rare words scores at most the sum of the frequent words' greatest weights. If k
        documents are above that for their rare words alone, the frequent words' rows need not be read.
        """
        slack = 1 - 1.2e-7 * (len(lists.order) + 2)  # float32's rounding, a sum's and a weight's
        partial = self._scratch()
        docs = lists.docs
        rows_used = False
        try:
            if len(docs):
                np.add.at(partial, docs, lists.weights)
                found = partial[docs]
                least = 0.0
                if not lists.rows or found.max() > lists.row_bound:
                    # A document stands once in each list, so that its k-th may be the (k * lists)-th of all entries.
                    least = _floor(found, k * lists.number) * slack - lists.row_bound / slack
                if least > 0 or not lists.rows:
                    return np.unique(docs[found >= least])
            rows_used = True
            for row, count in zip(lists.rows, lists.row_counts, strict=True):
                weights = self._row_weights[row]
                partial += weights if count == 1 else weights * np.float32(count)
            least = _floor(partial, k) * slack
            return (partial >= least if least > 0 else partial > 0).nonzero()[0]
        finally:
            if rows_used:
                partial.fill(0)
            else:
                partial[docs] = 0

    def _exact(self, lists: _Lists, documents: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the exact scores of some documents that hold words, summed in the order of the query."""
        tf = np.zeros((lists.number + len(lists.rows), len(documents)))
        if lists.number:
            slot = np.full(self.size, -1) if len(documents) > self.size // 8 else self._slots()
            slot[documents] = np.arange(len(documents))
            at = slot[lists.docs]
            hits = (at >= 0).nonzero()[0]
            of = lists.offsets.searchsorted(hits, "right") - 1
            tf[of, at[hits]] = self._tf[hits + lists.shifts[of]]
            slot[documents] = -1
        if lists.rows:
            tf[lists.number :] = self._row_tf[np.array(lists.rows)[:, None], documents]
        weights = self._weight(self._idf[lists.terms][:, None], tf, self._norm[documents])
        return weights[lists.order].cumsum(axis=0)[-1]

    def _scratch(self) -> NDArray[np.float32]:
        """Returns this thread's accumulator, all zeros; whoever takes it clears what it has touched."""
        try:
            return self._local.partial
        except AttributeError:
            self._local.partial = np.zeros(self._row_weights.shape[1], np.float32)
            return self._local.partial

    def _slots(self) -> NDArray[np.int64]:
        """Returns this thread's table from document to column, all -1; whoever takes it clears what it has touched."""
        try:
            return self._local.slots
        except AttributeError:
            self._local.slots = np.full(self.size, -1)
            return self._local.slots


class _Lists:
    """What an index holds on the distinct words of a query: posting lists of rare words, rows of frequent ones."""

    __slots__ = ("docs", "number", "offsets", "order", "row_bound", "row_counts", "rows", "shifts", "terms", "weights")

    def __init__(self, index: BM25Index, terms: list[int]):
        counts: dict[int, int] = {}
        for term in terms:
            counts[term] = counts.get(term, 0) + 1
        rare = [term for term in counts if index._row[term] < 0]
        frequent = [term for term in counts if index._row[term] >= 0]
        self.terms = rare + frequent  # rare ones first; `order` leads from the query's words to these
        place = {term: i for i, term in enumerate(self.terms)}
        self.order = [place[term] for term in terms]
        self.rows = [index._row[term] for term in frequent]
        self.row_counts = [counts[term] for term in frequent]
        self.row_bound = sum(index._bounds[term] * counts[term] for term in frequent)
        self.number = len(rare)
        if not rare:
            self.docs, self.weights = np.empty(0, np.intp), np.empty(0, np.float32)
            self.offsets = self.shifts = np.empty(0, np.intp)
            return
        starts = index._starts
        parts = [slice(starts[term], starts[term + 1]) for term in rare]
        self.docs = np.concatenate([index._docs[part] for part in parts])
        weights = [index._weights[part] for part in parts]
        for i, term in enumerate(rare):
            if counts[term] > 1:
                weights[i] = weights[i] * np.float32(counts[term])
        self.weights = np.concatenate(weights)
        # Entry i of `docs` is in the last list whose offset is <= i, and stands at i + shift in the index.
        offsets = [0, *accumulate(part.stop - part.start for part in parts)][:-1]
        self.offsets = np.array(offsets)
        self.shifts = np.array([part.start - offset for part, offset in zip(parts, offsets, strict=True)])


def _floor(values: NDArray[np.float32], k: int) -> float:
    """Returns a number that at least k of the values reach, close to the k-th greatest; 0 if there are fewer.

    The k-th greatest of the maxima of disjoint groups is one, and cheaper than a selection among all values.
    """
    groups = len(values) // _GROUP
    if groups > 4 * k:
        values = values[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
    if len(values) < k:
        return 0.0
    return float(np.partition(values, len(values) - k)[len(values) - k])


def _check(texts: Sequence[str], k1: float, b: float) -> None:
    if len(texts) == 0:
        raise ValueError("an index needs at least one text, got none")
    if not k1 > 0 or not 0 <= b <= 1:
        raise ValueError(f"k1 must be positive and b in [0, 1], got k1={k1} and b={b}")


def _count(texts: Sequence[str]) -> dict[str, Any]:
    """Counts words: the terms in order of first appearance, their posting lists, and the documents' lengths."""
    vocabulary: defaultdict[str, int] = defaultdict()
    vocabulary.default_factory = vocabulary.__len__
    flat, lengths = array("q"), np.empty(len(texts), np.int32)
    for i, text in enumerate(texts):
        words = tokenize(text)
        lengths[i] = len(words)
        flat.extend(map(vocabulary.__getitem__, words))
    keys = np.array(flat, np.int64)
    keys *= len(texts)
    keys += np.repeat(np.arange(len(texts)), lengths)
    keys, tf = np.unique(keys, return_counts=True)
    terms, docs = np.divmod(keys, len(texts))
    indptr = np.zeros(len(vocabulary) + 1, np.int64)
    np.cumsum(np.bincount(terms, minlength=len(vocabulary)), out=indptr[1:])
    return {
        "terms": list(vocabulary),
        "indptr": indptr,
        "docs": docs.astype(np.int32),
        "tf": tf.astype(np.int32),
        "lengths": lengths,
    }


def _idf(df: list[int], n: int, epsilon: float) -> NDArray[np.float64]:
    """Returns rank_bm25's idf, summed in its order: terms by first appearance."""
    if not df:
        return np.zeros(0)
    known = {freq: math.log(n - freq + 0.5) - math.log(freq + 0.5) for freq in set(df)}
    total = 0.0
    for freq in df:
        total += known[freq]
    idf = np.array([known[freq] for freq in df])
    idf[idf < 0] = epsilon * (total / len(df))
    return idf


RETRIEVERS: dict[str, Callable[[Sequence[str]], Retriever]] = {
    "bm25": lambda texts: BM25Index(texts) if len(texts) < _CACHE_FROM else BM25Index.cached(texts),
}


def make_retriever(name: str, texts: Sequence[str]) -> Retriever:
    """Returns the retriever of that name over some texts.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    try:
        build = RETRIEVERS[name]
    except KeyError:
        raise ValueError(f"unknown retriever {name!r}; known: {', '.join(sorted(RETRIEVERS))}") from None
    return build(texts)


def format_passages(passages: Iterable[Passage]) -> str:
    """Returns what an agent sees of some passages: one numbered line each, `[1] Title: text`."""
    # A text's own line breaks would let it pass for several passages.
    lines = (f"[{i}] {passage.title}: {passage.text}" for i, passage in enumerate(passages, 1))
    return "\n".join(line.replace("\r", " ").replace("\n", " ") for line in lines)
