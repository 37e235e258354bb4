"""Policies: what turns prefixes into actions."""

from agents.policies.base import Policy, collect
from agents.policies.scripted import SCRIPTS, ScriptedPolicy
from agents.policies.transformers_policy import TransformersPolicy

__all__ = ["SCRIPTS", "Policy", "ScriptedPolicy", "TransformersPolicy", "collect"]
