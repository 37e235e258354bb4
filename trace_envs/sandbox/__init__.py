"""Python that somebody else wrote, in another process, within limits."""

from trace_envs.sandbox.limits import Isolation, Limits, Result, SandboxError
from trace_envs.sandbox.sandbox import Sandbox, shared

__all__ = ["Isolation", "Limits", "Result", "Sandbox", "SandboxError", "shared"]
