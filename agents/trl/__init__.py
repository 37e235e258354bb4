"""Training with TRL's own `GRPOTrainer` on the environments of this package.

Invariant: TRL is handed what it asks for and nothing of it is changed; importing this package imports neither TRL nor datasets.

Either TRL samples and calls the tools (`environment_factory`), or rollouts are collected here as trees and TRL learns from them
(`rollout_func`):

    GRPOTrainer(model, episode_reward, args, trl_dataset(env_id), environment_factory=environment_factory(env_id))
    GRPOTrainer(model, environment_reward, args, trl_dataset(env_id), rollout_func=rollout_func(env_id))
"""

from agents.trl.environments import Episode, environment_factory, episode_reward, trl_dataset
from agents.trl.rollouts import rollout_func
from allocation.export.trl import environment_reward

__all__ = ["Episode", "environment_factory", "environment_reward", "episode_reward", "rollout_func", "trl_dataset"]
