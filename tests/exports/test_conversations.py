"""Conversations that environments of others report: examples in the prompt, several messages a turn, forgetting."""

import gymnasium as gym
import pytest
from gymnasium.vector import SyncVectorEnv

from allocation import TreeAllocationWrapper
from trace_envs.spaces import UnicodeText


def said(role, content):
    return {"role": role, "content": content}


OPENING = [said("user", "2 + 2?"), said("assistant", "4"), said("user", "Count.")]


class Counter(gym.Env):
    """Counts turns; how it tells them is up to the test."""

    observation_space = action_space = UnicodeText()

    def __init__(self, tell):
        self.tell = tell

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turns = []
        return "Count.", {"messages": self.tell(self.turns)}

    def step(self, action):
        self.turns.append(action)
        done = len(self.turns) == 3
        return str(len(self.turns)), 1.0, done, False, {"messages": self.tell(self.turns), "is_correct": True}


def whole(turns):
    messages = list(OPENING)
    for number, text in enumerate(turns, start=1):
        messages += [said("assistant", text), said("tool", str(number)), said("user", "Go on.")]
    return messages


AS_TEXT = [said("user", "Count."), *(said(r, t) for n in "123" for r, t in (("assistant", "next"), ("user", n)))]


@pytest.mark.parametrize(
    ("tell", "expected"),
    [
        (whole, whole(["next"] * 3)),
        (lambda turns: OPENING + whole(turns)[-2:], AS_TEXT),
        (lambda turns: ["Count.", *turns], AS_TEXT),
        (lambda turns: 7, AS_TEXT),
    ],
    ids=["whole", "forgetful", "not messages", "not a list"],
)
def test_conversations_are_told_whole_or_made_from_texts(tell, expected):
    envs = TreeAllocationWrapper(SyncVectorEnv([lambda: Counter(tell)] * 2), budget=6)
    envs.reset(seed=0)
    while envs.active.any():
        envs.step(["next"] * 2)
    records = envs.forest.rollouts()
    assert len(records) == 6 and all(list(record.messages) == expected for record in records)
