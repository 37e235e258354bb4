"""How an episode is shown: as chat messages, and as text for people.

Invariant: both are functions of the state; a message, once shown, stays as it is in every state that follows.
"""

from __future__ import annotations

from typing import Any

from trace_envs.state import EpisodeState, ToolCall, ToolCalls


def messages_of(state: EpisodeState, system_prompt: str, native_results: bool) -> list[dict[str, Any]]:
    """Returns the conversation as OpenAI-style chat messages.

    Args:
        state: The moment up to which it is shown.
        system_prompt: First message; none if it is empty.
        native_results: Show what tools return in the role `tool`, a message for each call; otherwise it is the user's.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": state.task.prompt})
    for turn in state.turns():
        messages.append({"role": "assistant", "content": turn.text})
        if native_results and turn.results:
            messages += [{"role": "tool", "content": result} for result in turn.results]
        elif turn.observation:
            is_result = native_results and isinstance(turn.action, ToolCall | ToolCalls)
            messages.append({"role": "tool" if is_result else "user", "content": turn.observation})
    return messages


def text_of(state: EpisodeState) -> str:
    """Returns the episode so far as plain text, with the verdict at its end."""
    lines = [f"[{state.task.task_id}] {state.task.prompt}"]
    for number, turn in enumerate(state.turns(), 1):
        lines.append(f"--- turn {number}\n{turn.text}")
        if turn.observation:
            lines.append(f">>> {turn.observation}")
    if state.outcome is not None:
        verdict = "correct" if state.outcome.is_correct else "wrong"
        lines.append(f"=== {verdict}, reward {state.outcome.reward:g}")
    return "\n".join(lines)


def cut(texts: list[str], limit: int) -> list[str]:
    """Cuts texts that are together longer than a limit, the last ones first, with a note where something is missing."""
    kept = []
    for text in texts:
        if len(text) > limit:
            text, missing = text[:limit], len(text) - limit
            limit = 0
            text = f"{text}\n[{missing} more characters were cut]"
        else:
            limit -= len(text)
        kept.append(text)
    return kept
