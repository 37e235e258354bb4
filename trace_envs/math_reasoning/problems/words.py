"""Word problems: who has how many, told in sentences of which each leans on another.

Invariant: every number that comes up is whole and at least one.
"""

from __future__ import annotations

from trace_envs.math_reasoning.problems.problem import Draw, Problem, calculate

ITEMS = ("apples", "books", "cards", "coins", "shells", "stamps")
_MOST = 999


def word_problem(draw: Draw, level: int) -> Problem:
    """Returns a problem of `level` steps, with somebody beside the point from level 3 on, and out of order from 5 on."""
    item = draw.pick(ITEMS)
    person, amount = draw.name(), draw.number(4, 40)
    essence = [str(amount)]
    sentences, steps, known = [f"{person} has {amount} {item}."], [], {person: amount}
    for _ in range(level):
        kind, sentence, expression, who, value = _next(draw, item, known, person)
        sentences.append(sentence)
        steps.append(calculate(expression, f"{who}:"))
        essence.append(f"{kind}{expression}")
        known[who] = amount = value
        person = who
    if level >= 3:
        bystander = draw.name()
        sentence = f"{bystander} has {draw.number(4, 40)} {item}."
        sentences.insert(draw.number(0, len(sentences)), sentence)
    if level >= 5:
        sentences = draw.shuffled(sentences)
    prompt = f"{' '.join(sentences)} How many {item} does {person} have?"
    return Problem(prompt, str(amount), tuple(steps), f"word {' '.join(essence)}")


def _next(draw: Draw, item: str, known: dict[str, int], last: str) -> tuple[str, str, str, str, int]:
    """Returns the kind of a new sentence, the sentence, its expression, of whom it tells, and how many they have."""
    who, before = draw.name(), known[last]
    while True:
        kind = draw.pick(("more", "fewer", "times", "part", "together"))
        if kind == "more":
            n = draw.number(2, 30)
            return kind, f"{who} has {n} more {item} than {last}.", f"{before} + {n}", who, before + n
        if kind == "fewer" and before > 3:
            n = draw.number(2, min(30, before - 1))
            return kind, f"{who} has {n} fewer {item} than {last}.", f"{before} - {n}", who, before - n
        if kind == "times":
            n = draw.number(2, 9)
            if before * n <= _MOST:
                return kind, f"{who} has {n} times as many {item} as {last}.", f"{before} * {n}", who, before * n
        if kind == "part":
            divisors = [n for n in range(2, 10) if before % n == 0 and before > n]
            if divisors:
                n = draw.pick(divisors)
                sentence = f"{last} has {n} times as many {item} as {who}."
                return kind, sentence, f"{before} / {n}", who, before // n
        if kind == "together" and len(known) > 1:
            other = draw.pick([name for name in known if name != last])
            total = before + known[other]
            if total <= _MOST:
                sentence = f"{who} has as many {item} as {last} and {other} together."
                return kind, sentence, f"{before} + {known[other]}", who, total
