"""Multi-hop question answering through search."""

from trace_envs.multihop_qa.data import Passage, QADataset, QATask, Step
from trace_envs.multihop_qa.env import DATASETS, MultiHopQAEnv

__all__ = ["DATASETS", "MultiHopQAEnv", "Passage", "QADataset", "QATask", "Step"]
