"""What a person sees while a run goes on, on a terminal and without one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from agents.display import TrainingDisplay, before_after_table, compare_by_level, sparkline

BEFORE = {"eval/accuracy": 0.5} | {f"eval/accuracy_by_level/{h}": v for h, v in {"1": 0.9, "2": 0.5, "10": 0.1}.items()}
AFTER = {f"eval/accuracy_by_level/{h}": v for h, v in {"1": 0.95, "2": 0.7, "10": 0.05}.items()}
QUESTIONS = {f"eval/questions_by_level/{h}": 100 for h in (1, 2, 10)}


def record(update: int, **more: Any) -> dict[str, Any]:
    return {
        "update": update,
        "train/success": 0.4,
        "effective_ratio/roots": 0.3,
        "effective_ratio/tree": 0.5,
        "ledger/generated_tokens": 3000,
        "predictor/skill": 0.12,
        "time/rollout": 1.0,
        "time/update": 0.5,
    } | more


def console(width: int = 100, terminal: bool = False, height: int = 30) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=terminal,
        legacy_windows=False,
        _environ={"TERM": "xterm"},
    )


def written(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_plain_lines_are_few_but_miss_no_evaluation() -> None:
    now = iter(range(100))
    out = console(width=20)
    with TrainingDisplay(9, console=out, every=3.0, clock=lambda: float(next(now))) as display:
        assert display.plain
        for update in range(1, 10):
            display.update(record(update, **({"eval/accuracy": 0.61} if update == 5 else {})))
        display.message("[done] 100%")
    lines = written(out).splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [f"update {u}/9" for u in (1, 4, 5, 8, 9)]
    assert "tokens 15.0k  tokens/s 2000  accuracy 61.0%  predictor skill 0.12" in lines[2]
    assert lines[-1] == "[done] 100%"
    assert "\x1b" not in written(out)


@pytest.mark.parametrize("width", [8, 20, 40, 80, 120, 300])
@pytest.mark.parametrize("height", [4, 30])
def test_the_live_panel_fits_any_terminal(width: int, height: int) -> None:
    out = console(width, terminal=True, height=height)
    with TrainingDisplay(9, console=out) as display:
        assert not display.plain
        for update in range(3):
            display.update({"update": update})
            display.update(record(update, **{"eval/accuracy": 0.2 * update, "train/reward": None}))
        display.message("a message")
        frame = Console(file=io.StringIO(), width=width, height=height)
        frame.print(display)
    assert all(len(line) <= width for line in written(frame).splitlines())
    if width >= 80 and height == 30:
        assert "3/9" not in written(frame) and "2/9" in written(frame) and "40.0%" in written(frame)
        assert "a message" in written(out)


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    out = console(terminal=True)
    with pytest.raises(KeyboardInterrupt), TrainingDisplay(9, console=out) as display:
        display.update(record(1))
        raise KeyboardInterrupt
    text = written(out)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor, hidden and shown again
    display.update(record(2))  # afterwards an update is silent, not an error
    assert written(out) == text


def test_a_resumed_run_goes_on_from_its_history() -> None:
    out = console()
    history = [record(update) for update in range(1, 5)]
    with TrainingDisplay(9, console=out, history=history) as display:
        display.update(record(5))
    assert "update 5/9" in written(out) and "tokens 15.0k" in written(out)


def test_training_and_evaluation_of_one_update_share_a_row() -> None:
    out = console(terminal=True)
    with TrainingDisplay(9, console=out) as display:
        display.update(record(1))
        display.update({"update": 1, "eval/accuracy": 0.5})
        assert len(display._rows) == 1
        row = display._rows[0]
    assert (row["accuracy"], row["success"], row["tokens/s"]) == ("50.0%", "40.0%", "2000")


def test_before_and_after_line_up_by_level() -> None:
    rows = compare_by_level(BEFORE | QUESTIONS, AFTER)
    assert [row.level for row in rows] == ["1", "2", "10", "mean"]
    assert [row.gain for row in rows] == pytest.approx([5.0, 20.0, -5.0, 100 * (1.7 - 1.5) / 3])
    assert [row.questions for row in rows] == [100, 100, 100, 300]
    out = console()
    out.print(before_after_table(BEFORE | QUESTIONS, AFTER))
    text = written(out)
    for expected in (
        "level",
        "tasks",
        "warm start",
        "after training",
        "90.0%",
        "95.0%",
        "+20.0",
        "-5.0",
        "+6.7",
        "300",
    ):
        assert expected in text


def test_a_one_sided_or_empty_comparison_is_shown_as_such() -> None:
    assert compare_by_level({}, {}) == []
    rows = compare_by_level(BEFORE, {"eval/accuracy_by_level/2": 0.6, "eval/accuracy_by_level/3": None})
    assert [(row.level, row.gain is None) for row in rows] == [("1", True), ("2", False), ("10", True), ("mean", False)]
    for width in (10, 30, 80):
        out = console(width)
        out.print(before_after_table({}, {}), before_after_table(BEFORE, {}))
        assert written(out)


def test_sparklines_stay_in_range_and_width() -> None:
    assert sparkline([-1.0, 0.0, 0.5, 1.0, 2.0], 10) == "▁▁▅██"
    assert sparkline([0.0, 1.0, 0.0], 2) == "█▁"
    assert sparkline([], 5) == ""
