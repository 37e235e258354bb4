"""Word counts of a corpus on disk.

Invariant: a cache file is read as plain arrays, never unpickled, and used only if it proves to be whole and to belong
to the very texts and parameters that it is asked for; anything else is rebuilt.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

_FORMAT = 1
_ARRAYS = ("terms", "indptr", "docs", "tf", "lengths")


def content_hash(texts: Iterable[str], *parameters: float) -> str:
    """Returns the SHA-256 of texts, parameters and the file format's version, in hex."""
    digest = hashlib.sha256(f"trace-envs bm25 {_FORMAT} {[float(p) for p in parameters]!r}".encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def cache_directory(directory: str | Path | None = None) -> Path:
    """Returns the directory given, or `$TRACE_CACHE_DIR`, or `~/.cache/trace-envs`."""
    if directory is not None:
        return Path(directory)
    return Path(os.environ.get("TRACE_CACHE_DIR") or Path("~/.cache/trace-envs").expanduser())


def load_or_build(
    digest: str, size: int, build: Callable[[], dict[str, Any]], directory: str | Path | None = None
) -> dict[str, Any]:
    """Returns the counts stored under a digest, or builds and stores them.

    Args:
        digest: Of the texts, as `content_hash` gives it.
        size: Number of texts.
        build: Makes the counts: `terms` (list of words), `indptr`, `docs`, `tf`, `lengths` (integer arrays).
        directory: See `cache_directory`.
    """
    path = cache_directory(directory) / f"bm25-{digest}.npz"
    try:
        return _load(path, digest, size)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        warnings.warn(f"the cached index {path} is damaged ({error}); building it anew", stacklevel=3)
    counts = build()
    try:
        _store(path, digest, counts)
    except OSError as error:
        warnings.warn(f"cannot cache the index at {path} ({error}); set TRACE_CACHE_DIR", stacklevel=3)
    return counts


def _load(path: Path, digest: str, size: int) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        if file["digest"].tobytes().decode("ascii") != digest:
            raise ValueError("it is of another corpus")
        arrays = {name: file[name] for name in _ARRAYS}
    if any(value.ndim != 1 or value.dtype.kind not in "iu" for value in arrays.values()):
        raise ValueError("its arrays are not one-dimensional integers")
    terms: list[str] = bytes(arrays["terms"].astype(np.uint8)).decode("utf-8", "surrogatepass").split("\n")
    if terms == [""]:
        terms = []
    indptr, docs, tf, lengths = (arrays[name] for name in _ARRAYS[1:])
    if (
        len(indptr) != len(terms) + 1
        or len(set(terms)) != len(terms)
        or len(lengths) != size
        or indptr[0] != 0
        or indptr[-1] != len(docs)
        or len(tf) != len(docs)
        or (np.diff(indptr) < 1).any()
        or (len(docs) > 0 and (docs.min() < 0 or docs.max() >= size or tf.min() < 1))
        or not np.array_equal(np.bincount(docs, weights=tf, minlength=size), lengths)
    ):
        raise ValueError("its arrays contradict each other")
    return {"terms": terms, "indptr": indptr, "docs": docs, "tf": tf, "lengths": lengths}


def _store(path: Path, digest: str, counts: dict[str, Any]) -> None:
    """Writes to a temporary file beside the target and renames it: readers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(counts["terms"]).encode("utf-8", "surrogatepass")
    arrays = {**counts, "terms": np.frombuffer(text, np.uint8)}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, digest=np.frombuffer(digest.encode("ascii"), np.uint8), **arrays)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
