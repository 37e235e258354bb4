"""Makes a conversation of a given level.

Invariant: a task is a function of the seed, the split, the category, the level and its number; names of one split never occur
in another. The way that comes with it solves it.

    level   what makes it hard
    1       one request of one call
    2       one request of two calls or more, of which one needs what another returned
    3       two requests, or one that lacks something the agent has to ask for
    4       two requests; one lacks something, or needs a tool that is there only later
    5       three requests, one of them of either kind, and more in the world that is beside the point
    6       four requests, two of them of either kind, and still more
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trace_envs.functions import FunctionTools
from trace_envs.multihop_qa.synthetic.names import split_words
from trace_envs.schemas import dumps
from trace_envs.tool_use.embedded.calendar import CALENDAR
from trace_envs.tool_use.embedded.files import FILES
from trace_envs.tool_use.embedded.messages import MESSAGES
from trace_envs.tool_use.embedded.records import Data, Domain, EmbeddedTask, Names, Request, UserTurn
from trace_envs.tool_use.embedded.shop import SHOP

VERSION = 1
"""Of the generator: another one makes other tasks of the same names."""

DOMAINS: Mapping[str, Domain] = {domain.name: domain for domain in (FILES, MESSAGES, CALENDAR, SHOP)}
TOOLS: Mapping[str, FunctionTools] = {name: FunctionTools(domain.functions) for name, domain in DOMAINS.items()}
SPLITS = ("train", "validation", "test")
LEVELS = (1, 2, 3, 4, 5, 6)

_REQUESTS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 4}
_INCOMPLETE = {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 2}
_NOISE = {1: 0, 2: 0, 3: 0, 4: 1, 5: 3, 6: 5}
_ASK, _NO_TOOL, _NOW = "What is missing?", "I have no tool for that.", "You can now. Please go on."


def make_task(seed: int, split: str, category: str, level: int, number: int) -> EmbeddedTask:
    """Returns a task."""
    domain = DOMAINS[category]
    rng = np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(category.encode()), level, number])
    names = Names(split_words(split), rng)
    data = domain.data(names, _NOISE[level])
    turns = _turns(domain, data, level, names)
    prompt = f"{domain.policy}\n{turns[0].message}" if domain.policy else turns[0].message
    task_id = f"{category}-{level}-{number}"
    return EmbeddedTask(task_id, prompt, category, level, tuple(turns), data)


def _turns(domain: Domain, data: Data, level: int, names: Names) -> list[UserTurn]:
    count, incomplete = _REQUESTS[level], _INCOMPLETE[level]
    if level == 3 and names.number(0, 1):
        count, incomplete = 1, 1
    which = set(names.rng.permutation(count)[:incomplete].tolist())
    turns: list[UserTurn] = []
    for i in range(count):
        request = _request(domain, data, level, names, i in which)
        turns += _incomplete(domain, request, level, names, turns) if i in which else [_turn(request)]
        for step in request.steps:
            data, _, _ = TOOLS[domain.name].call(data, step.call)
    # A tool that comes later is not there before, either.
    for i in reversed(range(len(turns) - 1)):
        if turns[i + 1].withheld:
            turns[i] = replace(turns[i], withheld=tuple(sorted({*turns[i].withheld, *turns[i + 1].withheld})))
    return turns


def _request(domain: Domain, data: Data, level: int, names: Names, incomplete: bool) -> Request:
    """Draws a request that the data allows; level 1 wants one call, level 2 more."""
    kinds = [k for k in domain.kinds if (k.calls == 1 if level == 1 else k.calls > 1 if level == 2 else True)]
    while True:
        request = names.pick(kinds).make(data, names)
        # A tool can be withheld only where one is needed, and something be left out only where that can be said.
        if request is not None and (not incomplete or request.vague):
            return request


def _turn(request: Request) -> UserTurn:
    return UserTurn(request.message, request.steps, request.reply, request.mention)


def _incomplete(
    domain: Domain, request: Request, level: int, names: Names, before: Sequence[UserTurn]
) -> list[UserTurn]:
    """Divides a request in two turns, in the first of which it cannot be met."""
    tool = request.steps[-1].call.name
    needed = {step.call.name for turn in before for step in turn.steps}
    if level == 3 or tool in needed or names.number(0, 1):
        return [UserTurn(request.vague, (), _ASK), replace(_turn(request), message=request.detail)]
    given = next(s["function"] for s in TOOLS[domain.name].schemas if s["function"]["name"] == tool)
    first = UserTurn(request.message, (), _NO_TOOL, withheld=(tool,))
    return [first, replace(_turn(request), message=f"{_NOW}\n{dumps(given)}")]


def tools_without(category: str, withheld: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns a domain's schemas without some."""
    return [s for s in TOOLS[category].schemas if s["function"]["name"] not in withheld]
