"""What a run leaves on disk: `config.yaml`, `metrics.jsonl`, `trees.jsonl`, `checkpoints/`, `tensorboard/`.

Invariant: every line that ends in a newline is one whole JSON object with an integer `update`, and nothing but the
`time/` entries depends on the clock. So a crash costs at most the last line, and two runs with one seed differ in
`time/` alone. What is in `metrics.jsonl` is in TensorBoard's files too, whenever the process is killed.
"""

from __future__ import annotations

import importlib
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from trace_envs.jsonl import DamagedLogError, drop_torn_line, excerpt, iter_jsonl, parse_line, read_jsonl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["CONFIG", "METRICS", "REPORT", "TREES", "DamagedLogError", "RunLog", "iter_jsonl", "read_jsonl"]

METRICS = "metrics.jsonl"
TREES = "trees.jsonl"
CONFIG = "config.yaml"
REPORT = "report.html"
_INSTALL = {"wandb": "pip install 'trace-envs[wandb]'", "trackio": "pip install trackio"}


class RunLog:
    """Writes the files of one run, a line at a time.

    Example:
        >>> with RunLog("runs/first") as log:  # doctest: +SKIP
        ...     log.write_config({"seed": 0})
        ...     log.log({"update": 1, "train/success": 0.41, "time/total": 0.6})

    Attributes:
        directory: The run's directory; made when missing.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, resume: bool = False, trackers: Sequence[str] = ()
    ) -> None:
        """Opens the run's files.

        Args:
            directory: Where the run lives, usually `runs/<name>`.
            resume: Continue what is there. A last line that is cut short is removed first.
            trackers: Services to report to besides TensorBoard: `wandb`, `trackio`. Imported only when named.

        Raises:
            FileExistsError: `directory` holds a run already and `resume` is false.
            ValueError: A tracker is not known.
            ImportError: A tracker is not installed.
        """
        self.directory = Path(directory)
        # Before anything is written: a name that cannot be imported must not leave a half-made run behind.
        self._trackers = [_import_tracker(name) for name in dict.fromkeys(trackers)]
        paths = [self.directory / METRICS, self.directory / TREES]
        if not resume and any(path.exists() and path.stat().st_size for path in paths):
            raise FileExistsError(
                f"{self.directory} already holds a run. Pass --resume to continue it or another --name to start afresh."
            )
        (self.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._resume = resume
        self._purge_step: int | None = None
        self._config: Any = {}
        self._tracking = False
        self._writer: SummaryWriter | None = None
        self._closed = False
        if resume:
            for path in paths:
                drop_torn_line(path)
        self._metrics, self._trees = _appending(paths[0]), _appending(paths[1])

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`: one record for each policy update or evaluation."""
        return self.directory / METRICS

    @property
    def trees_path(self) -> Path:
        """`trees.jsonl`: one record for each tree that was kept."""
        return self.directory / TREES

    @property
    def checkpoints(self) -> Path:
        """The directory for checkpoints; it exists."""
        return self.directory / "checkpoints"

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """Writes the resolved configuration, which `--config` reads back.

        Args:
            config: Plain data; tuples become lists and paths become strings.

        Returns:
            The path of `config.yaml`.
        """
        self._config = _plain(config, "config", finite=False)
        path = self.directory / CONFIG
        text = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True, width=120)
        _replace(path, [text.encode("utf-8")])
        return path

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl` and sends its numbers to TensorBoard and the trackers.

        Args:
            record: `update` (int) and any number of entries such as `train/success`. Values that are NaN or infinite
                are stored as null.
        """
        plain = _record(record)
        step = plain["update"]
        scalars = {
            key: value
            for key, value in plain.items()
            if key != "update" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        writer = self._tensorboard()
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)
        # The writer collects points for a while. A record that a resumed run will not repeat must have its points on disk; the
        # other way round, a kill between the two costs nothing: what is repeated falls on the same points.
        writer.flush()
        _append(self._metrics, plain)
        self._start_trackers()
        for tracker in self._trackers:
            tracker.log(scalars, step=step)

    def log_tree(self, record: Mapping[str, Any]) -> None:
        """Appends one tree to `trees.jsonl`.

        Args:
            record: `update` (int), the task and its `nodes`, as agents/report.py reads them.
        """
        _append(self._trees, _record(record))

    def truncate_after(self, update: int) -> None:
        """Forgets what was logged after an update, for resuming from the checkpoint made then.

        It may be killed at any moment and done again.

        Args:
            update: The last update to keep. TensorBoard hides later points as well.

        Raises:
            DamagedLogError: A line is no record; both files are as they were.
        """
        self._metrics.close()
        self._trees.close()
        for path in (self.metrics_path, self.trees_path):
            for _ in _lines_until(path, update):  # before either file is touched
                pass
        for path in (self.metrics_path, self.trees_path):
            _replace(path, _lines_until(path, update))
        self._metrics, self._trees = _appending(self.metrics_path), _appending(self.trees_path)
        self._purge_step = update + 1
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def sync(self) -> None:
        """Flushes both logs to disk. Before a checkpoint is written: it must never be ahead of them, whatever fails."""
        for file in (self._metrics, self._trees):
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files, TensorBoard and the trackers; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._metrics.close()
        self._trees.close()
        if self._writer is not None:
            self._writer.close()
        if self._tracking:
            for tracker in self._trackers:
                tracker.finish()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tensorboard(self) -> SummaryWriter:
        if self._writer is None:
            # Imported here because it takes a second and readers of a run do not need it. Opened at the first record,
            # so that `truncate_after` can say from which step on older event files are void.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(self.directory / "tensorboard"), purge_step=self._purge_step, flush_secs=15
            )
        return self._writer

    def _start_trackers(self) -> None:
        if self._tracking:
            return
        self._tracking = True
        for tracker in self._trackers:
            options: dict[str, Any] = {"project": "trace-envs", "name": self.directory.name, "config": self._config}
            if tracker.__name__ == "wandb":
                options |= {"dir": str(self.directory), "resume": "auto" if self._resume else None}
            else:
                options |= {"resume": "allow" if self._resume else "never"}
            tracker.init(**options)


def _import_tracker(name: str) -> ModuleType:
    if name not in _INSTALL:
        raise ValueError(f"Unknown tracker {name!r}; known: {', '.join(_INSTALL)}. TensorBoard is always on.")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # installed, but broken inside: that message is the useful one
            raise
        raise ImportError(f"Tracker {name!r} is not installed: {_INSTALL[name]}, or leave it out.") from error


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(record, "", finite=True)
    update = plain.get("update")
    if not isinstance(update, int) or isinstance(update, bool):
        raise ValueError(f"A record needs an integer 'update'; got {update!r} (entries: {', '.join(plain)}).")
    return plain


def _plain(value: Any, where: str, *, finite: bool) -> Any:
    """Returns `value` as JSON and YAML know it; with `finite`, null stands for NaN and infinities."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):  # numpy's integers register here; torch's tensors do not, on purpose
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return None if finite and not math.isfinite(number) else number
    if type(value).__name__ == "bool":  # numpy's bool is neither a bool nor a number
        return bool(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}/{key}".lstrip("/"), finite=finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, finite=finite) for item in value]
    raise TypeError(
        f"Entry {where!r} holds a {type(value).__name__}; expected a number, text, list or mapping. "
        "Convert it first, for instance with .item() or .tolist()."
    )


def _encode(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (half of an emoji that a model was cut off in) has no UTF-8; `backslashreplace` writes it as
    # \udxxx, which inside a JSON string is the valid escape for the same character.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _appending(path: Path) -> BinaryIO:
    return open(path, "ab")


def _append(file: BinaryIO, record: Mapping[str, Any]) -> None:
    file.write(_encode(record))
    file.flush()


def _lines_until(path: Path, update: int) -> Iterator[bytes]:
    """Yields the lines of a log whose records are of no later update, byte for byte."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            at = (parse_line(line) or {}).get("update")
            if not isinstance(at, int) or isinstance(at, bool):
                raise DamagedLogError(
                    f"{path}, line {number}: no record with an integer 'update' ({excerpt(line)}). Delete or mend it."
                )
            if at <= update:
                yield line


def _replace(path: Path, chunks: Sequence[bytes] | Iterator[bytes]) -> None:
    """Writes `path` anew, so that a crash, even of the machine, leaves either the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
