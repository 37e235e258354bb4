"""From a forest to the advantage and weight of every edge; estimators by name."""

from agents.advantages.actor_critic import gae_credit, valued_prefixes
from agents.advantages.base import ESTIMATORS, STD_FLOOR, Credit, CreditConfig, Estimator, estimate, register
from agents.advantages.published import grpo_credit
from agents.advantages.unbiased import tree_credit

__all__ = [
    "ESTIMATORS",
    "STD_FLOOR",
    "Credit",
    "CreditConfig",
    "Estimator",
    "estimate",
    "gae_credit",
    "grpo_credit",
    "register",
    "tree_credit",
    "valued_prefixes",
]
