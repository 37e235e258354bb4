"""Records of rollouts as a `datasets.Dataset` and as Parquet, and back.

Invariant: what is read back equals what was written, field by field and type by type.

One row is one rollout; its columns are the fields of `RolloutRecord`. `messages` is a column of `{"role", "content"}`, as
trainers on conversations take it, and `tools` a JSON text, since schemas have no schema in common. Where messages hold more
than two texts there is a third field, `more`, with the rest as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from allocation.export.rows import RolloutRecord, records_of
from allocation.tree import Forest

if TYPE_CHECKING:
    import datasets

_ARRAYS = {
    "nodes": "int64",
    "prompt_ids": "int64",
    "completion_ids": "int64",
    "loss_mask": "int8",
    "logprobs": "float32",
    "turn_ids": "int64",
    "rewards": "float64",
    "advantages": "float64",
    "versions": "int64",
}
_VALUES = {
    "task_id": "string",
    "tree": "int64",
    "rollout": "int64",
    "origin": "string",
    "has_ids": "bool",
    "is_correct": "bool",
    "terminated": "bool",
    "truncated": "bool",
}


def to_dataset(rollouts: Forest | Sequence[RolloutRecord]) -> datasets.Dataset:
    """Returns rollouts as a dataset in memory, a row each.

    Raises:
        ImportError: The package `datasets` is not installed.
    """
    library = _library()
    records = records_of(rollouts)
    more = any(not _is_plain(message) for record in records for message in record.messages)
    value, sequence = library.Value, library.Sequence
    message = {"role": value("string"), "content": value("string")} | ({"more": value("string")} if more else {})
    kinds = {
        **{name: value(kind) for name, kind in _VALUES.items()},
        **{name: sequence(value(kind)) for name, kind in _ARRAYS.items()},
        "finish_reasons": sequence(value("string")),
        "components": [{"name": value("string"), "value": value("float64")}],
        "messages": [message],
        "tools": value("string"),
    }
    names = [f.name for f in fields(RolloutRecord)]
    rows = [_row(record, more) for record in records]
    columns = {name: [row[name] for row in rows] for name in names}
    return library.Dataset.from_dict(columns, features=library.Features({name: kinds[name] for name in names}))


def records_from_dataset(dataset: datasets.Dataset) -> list[RolloutRecord]:
    """Returns the records that a dataset was made from; rows may have been selected, sorted or joined since.

    Raises:
        ValueError: The dataset lacks a column.
    """
    _check_columns(dataset.column_names)
    return [
        _record(row)
        for table in dataset.with_format("arrow").iter(batch_size=256)
        for row in table.select([f.name for f in fields(RolloutRecord)]).to_pylist()
    ]


def write_parquet(rollouts: Forest | Sequence[RolloutRecord], path: str | os.PathLike[str]) -> None:
    """Writes rollouts to a Parquet file, which `datasets.load_dataset("parquet", ...)` and any other reader takes.

    Raises:
        ImportError: The package `datasets` is not installed.
    """
    dataset = to_dataset(rollouts)
    from pyarrow.parquet import write_table  # which the package brings

    write_table(dataset.data.table, path)  # as Dataset.to_parquet does, without its progress bar


def read_parquet(path: str | os.PathLike[str]) -> list[RolloutRecord]:
    """Returns the records of a Parquet file that `write_parquet` wrote.

    Raises:
        ImportError: The package `datasets` is not installed.
        ValueError: The file is not Parquet, or lacks a column.
    """
    _library()
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no whole Parquet file: {error}") from error
    with file:
        _check_columns(file.schema_arrow.names)
        batches = file.iter_batches(batch_size=256, columns=[f.name for f in fields(RolloutRecord)])
        return [_record(row) for batch in batches for row in batch.to_pylist()]


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("datasets and Parquet need a package: pip install 'trace-envs[datasets]'") from error
    return datasets


def _check_columns(names: Iterable[str]) -> None:
    missing = [f.name for f in fields(RolloutRecord) if f.name not in set(names)]
    if missing:
        raise ValueError(f"these are no rollouts as forest.to_dataset() gives them: no column {', '.join(missing)}")


def _is_plain(message: Mapping[str, Any]) -> bool:
    return message.keys() == {"role", "content"} and all(isinstance(x, str) for x in message.values())


def _row(record: RolloutRecord, more: bool) -> dict[str, Any]:
    row = {f.name: getattr(record, f.name) for f in fields(record)}
    row["finish_reasons"] = list(record.finish_reasons)
    row["components"] = [{"name": name, "value": x} for name, x in record.components.items()]
    row["messages"] = [_to_struct(message, more) for message in record.messages]
    row["tools"] = json.dumps(list(record.tools), ensure_ascii=False)
    return row


def _to_struct(message: Mapping[str, Any], more: bool) -> dict[str, Any]:
    if not more:
        return dict(message)
    texts = {name: x for name, x in message.items() if name in ("role", "content") and isinstance(x, str)}
    rest = {name: x for name, x in message.items() if name not in texts}
    return {"role": None, "content": None, **texts, "more": json.dumps(rest, ensure_ascii=False) if rest else None}


def _from_struct(message: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: x for name, x in message.items() if name != "more" and x is not None}
    return texts | json.loads(message.get("more") or "{}")


def _record(row: dict[str, Any]) -> RolloutRecord:
    arrays = {name: None if row[name] is None else np.array(row[name], dtype=kind) for name, kind in _ARRAYS.items()}
    rest = {
        "finish_reasons": tuple(row["finish_reasons"]),
        "components": {x["name"]: x["value"] for x in row["components"]},
        "messages": tuple(map(_from_struct, row["messages"])),
        "tools": tuple(json.loads(row["tools"])),
    }
    return RolloutRecord(**row | arrays | rest)
