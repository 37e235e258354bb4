"""Tool use: conversations with a user, in worlds that tools act on."""

from trace_envs.tool_use.env import ToolUseEnv
from trace_envs.tool_use.suite import Suite, ToolUseTask, World

__all__ = ["Suite", "ToolUseEnv", "ToolUseTask", "World"]
