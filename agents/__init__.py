"""Agents that learn from trees of rollouts."""
