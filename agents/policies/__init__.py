"""Policies: what turns prefixes into actions."""

from agents.policies.base import EncodingPolicy, Policy, collect
from agents.policies.scripted import SCRIPTS, ScriptedPolicy
from agents.policies.transformers_policy import TransformersPolicy

__all__ = ["SCRIPTS", "EncodingPolicy", "Policy", "ScriptedPolicy", "TransformersPolicy", "collect"]
