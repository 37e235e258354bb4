"""What a person sees while a run goes on: a live panel on a terminal, plain lines anywhere else.

Invariant: the display only reads. It never changes a record, never raises because an entry is missing, and leaves the
terminal as it found it, whatever ends the run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]
_BARS = "▁▂▃▄▅▆▇█"
_DASH = "–"
_WIDE = 88
"""Terminal columns from which the last updates fit side by side; below, the latest one is shown as a list."""


@dataclass(frozen=True, slots=True)
class LevelRow:
    """One line of the before/after table.

    Attributes:
        level: How hard the tasks are (number of hops, of calls), or "mean".
        questions: Questions asked, where the records say so.
        before: Accuracy in [0, 1] from the warm start.
        after: Accuracy in [0, 1] after training.
    """

    level: str
    questions: int | None
    before: float | None
    after: float | None

    @property
    def gain(self) -> float | None:
        """Gain in percentage points; None where one side is missing."""
        return None if self.before is None or self.after is None else 100 * (self.after - self.before)


def natural(name: str) -> tuple[int, float, str]:
    """Sort key that puts 2 before 10 and numbers before names."""
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)


def by_group(record: Record, prefix: str) -> dict[str, float]:
    """Picks the entries `prefix/<name>` out of a record.

    Args:
        record: A record of metrics.jsonl.
        prefix: For instance `eval/accuracy_by_level`.

    Returns:
        The numbers by name, in natural order; nulls are left out.
    """
    start = prefix + "/"
    found = {key[len(start) :]: value for key, value in record.items() if key.startswith(start)}
    return {name: found[name] for name in sorted(found, key=natural) if _number(found[name]) is not None}


def compare_by_level(before: Record, after: Record) -> list[LevelRow]:
    """Lines two evaluations up by level.

    Args:
        before: Record with `eval/accuracy_by_level/<level>` and, if known, `eval/questions_by_level/<level>`.
        after: The same, later.

    Returns:
        One row for each level, then the mean over those that both have, each level weighing the same.
    """
    old, new = (by_group(record, "eval/accuracy_by_level") for record in (before, after))
    asked = by_group(before, "eval/questions_by_level") | by_group(after, "eval/questions_by_level")
    rows = [
        LevelRow(level, int(asked[level]) if level in asked else None, old.get(level), new.get(level))
        for level in sorted(old.keys() | new.keys(), key=natural)
    ]
    both = [(row.before, row.after) for row in rows if row.before is not None and row.after is not None]
    if both:
        means = [sum(side) / len(both) for side in zip(*both, strict=True)]
        rows.append(LevelRow("mean", sum(int(n) for n in asked.values()) if asked else None, means[0], means[1]))
    return rows


def before_after_table(before: Record, after: Record, level_name: str = "level") -> Table:
    """Makes the table that ends a run.

    Args:
        before: Evaluation of the warm start; see :func:`compare_by_level`.
        after: Evaluation after training.
        level_name: What levels count, in one word.

    Returns:
        A rich table with a row for each level and a row for their mean.
    """
    table = Table(title="Accuracy on unseen tasks", title_justify="left", title_style="bold")
    for name in (level_name, "tasks", "warm start", "after training", "gain"):
        table.add_column(name, justify="right", no_wrap=name == level_name)
    for row in compare_by_level(before, after):
        if row.level == "mean":
            table.add_section()
        gain = Text(_DASH) if row.gain is None else Text(f"{row.gain:+.1f}")
        gain.stylize("" if row.gain is None or abs(row.gain) < 0.05 else "green" if row.gain > 0 else "red")
        cells = (_count(row.questions), _percent(row.before), _percent(row.after))
        table.add_row(Text(row.level), *cells, gain, style="bold" if row.level == "mean" else None)
    if not table.row_count:
        table.caption = "no evaluation by level was recorded"
    elif any(row.gain is not None for row in compare_by_level(before, after)):
        table.caption = "gain in percentage points"
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Draws numbers in [0, 1] as a line of bars.

    Args:
        values: The numbers; those outside [0, 1] are drawn at the edge.
        width: Most characters to use; the latest values are kept.

    Returns:
        One character for each value.
    """
    return "".join(_BARS[min(7, max(0, int(value * 8)))] for value in list(values)[-max(width, 0) or len(values) :])


class TrainingDisplay:
    """Shows a run as it goes.

    Example:
        >>> with TrainingDisplay(200) as display:  # doctest: +SKIP
        ...     display.update({"update": 1, "train/success": 0.41})
    """

    def __init__(
        self,
        total_updates: int,
        *,
        console: Console | None = None,
        plain: bool | None = None,
        history: Iterable[Record] = (),
        every: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the display; nothing is shown before it is entered.

        Args:
            total_updates: Updates of the whole run, those before a resume included.
            console: Where to write; standard output by default.
            plain: Lines instead of a live panel; by default, whether the console is no terminal.
            history: Records of a run that is being resumed, so that totals and history go on from there.
            every: Plain lines come at most this often, in seconds; evaluations and the last update always.
            clock: Where those seconds come from.
        """
        self.console = console or Console()
        self.plain = not self.console.is_terminal or self.console.is_dumb_terminal if plain is None else plain
        self._total = total_updates
        self._every = every
        self._clock = clock
        self._shown_at: float | None = None
        self._tokens = 0
        self._done = 0
        self._rows: deque[dict[str, str]] = deque(maxlen=5)
        self._accuracy: deque[float] = deque(maxlen=400)
        self._success: deque[float] = deque(maxlen=400)
        for record in history:
            self._take(record)
        # A long window: evaluations now and then would make a short one jump. What a resumed run did before counts as
        # done, not as done in no time.
        self._progress = Progress(
            TextColumn("[bold]update"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
            speed_estimate_period=300.0,
        )
        self._task = self._progress.add_task("update", total=total_updates, completed=self._done)
        self._live: Live | None = None

    def __enter__(self) -> TrainingDisplay:
        if not self.plain:
            self._live = Live(self, console=self.console, refresh_per_second=2, vertical_overflow="crop")
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def update(self, record: Record) -> None:
        """Takes in one record of metrics.jsonl; entries that it lacks keep their last value.

        Args:
            record: The record; only `update` has to be there.
        """
        self._take(record)
        if self._live is not None:
            self._progress.update(self._task, completed=self._done)
            self._live.refresh()
        elif self.plain:
            self._print_line(record)

    def message(self, text: str) -> None:
        """Prints a sentence above the panel, or as a line of its own.

        Args:
            text: Shown as it is; square brackets are not markup.
        """
        self.console.print(Text(text))

    def _take(self, record: Record) -> None:
        tokens = _number(record.get("ledger/generated_tokens"))
        self._tokens += int(tokens or 0)
        self._done = record["update"]
        if (accuracy := _number(record.get("eval/accuracy"))) is not None:
            self._accuracy.append(accuracy)
        if (success := _number(record.get("train/success"))) is not None:
            self._success.append(success)
        seconds = sum(_number(record.get(key)) or 0.0 for key in ("time/rollout", "time/update"))
        row = {
            "update": str(record["update"]),
            "success": _percent(record.get("train/success")),
            "mixed roots": _percent(record.get("effective_ratio/roots")),
            "mixed trees": _percent(record.get("effective_ratio/tree")),
            "tokens": _short(self._tokens),
            "tokens/s": _short(tokens / seconds) if tokens and seconds > 0 else _DASH,
            "accuracy": _percent(record.get("eval/accuracy")),
            "predictor skill": _decimal(record.get("predictor/skill")),
        }
        if self._rows and self._rows[-1]["update"] == row["update"]:  # training and evaluation came apart
            old = self._rows.pop()
            row = {name: old[name] if row[name] == _DASH else row[name] for name in row}
        self._rows.append(row)

    def _print_line(self, record: Record) -> None:
        now = self._clock()
        evaluated = "eval/accuracy" in record
        due = self._shown_at is None or now - self._shown_at >= self._every or record["update"] >= self._total
        if not evaluated and not due:
            return
        self._shown_at = now
        parts = [f"update {record['update']}/{self._total}"]
        parts += [f"{name} {text}" for name, text in list(self._rows[-1].items())[1:] if text != _DASH]
        # No wrapping and no markup: a line stays a line for whatever reads the log.
        self.console.print(Text("  ".join(parts)), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        body = Table.grid(expand=True)
        body.add_column(overflow="fold")
        body.add_row(self._progress)
        if options.max_width >= _WIDE:
            body.add_row(self._wide_table(max(1, min(5, console.height - 9))))
        else:
            body.add_row(self._narrow_table())
        room = max(4, options.max_width - 24)
        for name, values in (("success", self._success), ("accuracy", self._accuracy)):
            if values:
                body.add_row(Text(f"{name:<9}{sparkline(values, room)} {_percent(values[-1])}", no_wrap=True))
        yield Panel(body, title="trace-envs", title_align="left", border_style="dim")

    def _wide_table(self, count: int) -> Table:
        table = Table(box=None, expand=True, header_style="dim", padding=(0, 1))
        rows = list(self._rows)[-count:]
        for name in rows[-1] if rows else ("waiting for the first update",):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values(), style="bold" if row is rows[-1] else "dim")
        return table

    def _narrow_table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        row = self._rows[-1] if self._rows else {"waiting for the first update": ""}
        for name, text in row.items():
            table.add_row(Text(name, style="dim"), text)
        return table


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _percent(value: Any) -> str:
    number = _number(value)
    return _DASH if number is None else f"{100 * number:.1f}%"


def _decimal(value: Any) -> str:
    number = _number(value)
    return _DASH if number is None else f"{number:.2f}"


def _count(value: int | None) -> str:
    return _DASH if value is None else f"{value:,}"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.1f}{letter}"
    return f"{value:.0f}"
