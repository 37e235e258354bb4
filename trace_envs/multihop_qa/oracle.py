"""What an agent that knows the way would do next.

Invariant: the next action is a function of the task, the turns taken and the generator. Where the agent stands is read
off the turns, so the oracle can take over at any node of a tree, after mistakes too. Without noise it answers every
synthetic question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trace_envs.multihop_qa.data import QATask, Step
from trace_envs.multihop_qa.synthetic.relations import FIRST, NOT_FOUND, RELATIONS
from trace_envs.state import FinalAnswer, ToolCall, Turn

_WORDS_OF_QUESTION = 6  # of a real question, added to a title that alone did not bring its passage back


def oracle_action(
    task: QATask, turns: Sequence[Turn], rng: np.random.Generator, *, noise: float = 0.0
) -> tuple[str, ToolCall | FinalAnswer]:
    """Returns the next thought and action.

    Args:
        task: The question. With `steps` the oracle follows them; without, it looks up the supporting passages by title.
        turns: The turns so far, oldest first, whoever took them.
        rng: Source of the mistakes.
        noise: Chance of a bad query at each step, put right one turn later. With any noise at all the oracle also
            begins, as an agent would, with the natural query ("<subject> <relation>") where that one is known to fail.

    Returns:
        The thought (short and regular) and the search call or final answer.
    """
    if not task.answers:
        raise ValueError(f"task {task.task_id!r} has no answer for the oracle to give")
    if task.steps:
        return _follow_steps(task, turns, rng, noise)
    return _look_up_titles(task, turns)


def _follow_steps(
    task: QATask, turns: Sequence[Turn], rng: np.random.Generator, noise: float
) -> tuple[str, ToolCall | FinalAnswer]:
    done, tried = 0, list[str]()
    for turn in turns:
        if done < len(task.steps) and _states(task.steps[done], turn.observation):
            done, tried = done + 1, []
        else:
            tried.append(_query_of(turn))
    if tried:
        thought = NOT_FOUND
    elif done:
        thought = task.steps[done - 1].finding
    else:
        thought = FIRST.format(relation=task.steps[0].relation, subject=task.steps[0].subject)
    if done == len(task.steps):
        return task.steps[-1].finding, FinalAnswer(task.answers[0])
    step = task.steps[done]
    if not tried and noise > 0:
        natural = f"{step.subject} {step.relation}"
        if natural not in step.queries:
            return thought, _search(natural)
        if rng.random() < noise:
            bad = _bad_queries(task, done)
            return thought, _search(bad[rng.integers(len(bad))])
    fresh = [query for query in step.queries if query not in tried]
    return thought, _search(fresh[0] if fresh else step.queries[len(tried) % len(step.queries)])


def _states(step: Step, observation: str) -> bool:
    # Line by line: the other half of a divided article has nearly the same title, and a value may stand anywhere.
    return any(step.title in line and step.value in line for line in observation.splitlines())


def _query_of(turn: Turn) -> str:
    if isinstance(turn.action, ToolCall):
        return str(turn.action.arguments.get("query", ""))
    return ""


def _bad_queries(task: QATask, done: int) -> list[str]:
    """Returns searches that an inattentive agent might try: none is known to work, some may by luck."""
    step = task.steps[done]
    asked = [other.relation for other in task.steps if other.relation != step.relation]
    words = step.subject.split()
    bad = [step.relation, f"{words[-1]} {step.relation}"]
    if len(words) > 1:
        bad += [words[-1], f"{words[0]} {step.relation}"]
    sections = {RELATIONS[relation].section for relation in asked} - {RELATIONS[step.relation].section}
    bad += [f"{step.subject} {word}" for word in (*asked, *sorted(sections))]
    if done:
        # One step behind: the entity before, asked for what is wanted of this one.
        bad.append(f"{task.steps[done - 1].subject} {step.relation}")
    return [query for query in dict.fromkeys(bad) if query not in step.queries] or [step.relation]


def _look_up_titles(task: QATask, turns: Sequence[Turn]) -> tuple[str, ToolCall | FinalAnswer]:
    titles = list(dict.fromkeys(task.supporting))
    # As the head of a passage: other passages mention the title too.
    seen = [any(f"] {title}: " in turn.observation for turn in turns) for title in titles]
    tried = {_query_of(turn) for turn in turns}
    words = task.prompt.split()[:_WORDS_OF_QUESTION]
    for title, found in zip(titles, seen, strict=True):
        if found:
            continue
        for query in (title, " ".join([title, *words]), f"{title} {task.prompt}"):
            if query not in tried:
                return f"Next the passage {title}." if query == title else NOT_FOUND, _search(query)
        # Every wording failed: leave this one, the answer does not depend on it.
    return "That is all.", FinalAnswer(task.answers[0])


def _search(query: str) -> ToolCall:
    return ToolCall("search", {"query": query})
