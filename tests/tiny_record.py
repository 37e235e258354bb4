"""A world so small that all of it is known: a tabular policy on a few binary trees, and a dense forest recorded from it.

Sketches are the scores themselves, the value of every prefix comes from enumeration, and the stored gradient is the true one.
"""

from itertools import product

import numpy as np

from allocation.arena.dense import DenseForest

TURNS = 3


class TinyPolicy:
    """A softmax over two actions at every state of every prompt; a state is the prompt and the actions so far.

    Action 1 at the first turn ends the episode at once for every other prompt.
    """

    def __init__(self, seed=0, prompts=4):
        rng = np.random.default_rng(seed)
        paths = [path for depth in range(TURNS) for path in product((0, 1), repeat=depth)]
        self.prompts = prompts
        self.states = {(p, path): i for i, (p, path) in enumerate(product(range(prompts), paths))}
        self.probability = 1 / (1 + np.exp(-rng.normal(size=len(self.states))))  # of action 1
        self.success = {(p, path): rng.random() < 0.5 for p in range(prompts) for path in self.ends(p)}
        self.dim = 2 * len(self.states)

    def over(self, prompt, path):
        return len(path) == TURNS or (prompt % 2 == 1 and path == (1,))

    def ends(self, prompt):
        every = [path for depth in range(1, TURNS + 1) for path in product((0, 1), repeat=depth)]
        return [p for p in every if self.over(prompt, p) and not any(self.over(prompt, p[:i]) for i in range(len(p)))]

    def score(self, prompt, path):
        """Gradient of the log-probability of the last action of a path, float [dim]."""
        state = self.states[prompt, path[:-1]]
        score = np.zeros(self.dim)
        score[2 * state : 2 * state + 2] = -(1 - self.probability[state]), -self.probability[state]
        score[2 * state + path[-1]] += 1
        return score

    def value(self, prompt, path=()):
        """Chance of success from a path on."""
        if self.over(prompt, path):
            return float(self.success[prompt, path])
        p = self.probability[self.states[prompt, path]]
        return p * self.value(prompt, (*path, 1)) + (1 - p) * self.value(prompt, (*path, 0))

    def gradient(self):
        """Gradient of the mean over prompts of the chance of success, float [dim]."""
        total = np.zeros(self.dim)
        for prompt in range(self.prompts):
            for end in self.ends(prompt):
                chance, score = 1.0, np.zeros(self.dim)
                for turn in range(len(end)):
                    p = self.probability[self.states[prompt, end[:turn]]]
                    chance *= p if end[turn] else 1 - p
                    score += self.score(prompt, end[: turn + 1])
                total += chance * self.success[prompt, end] * score / self.prompts
        return total

    def rollout(self, rng, prompt, path=()):
        """Paths from the next one after `path` to an end."""
        paths = []
        while not self.over(prompt, path):
            path = (*path, int(rng.random() < self.probability[self.states[prompt, path]]))
            paths.append(path)
        return paths


def record(policy, spines=4, continuations=3, seed=0):
    """A dense forest of rollouts of the policy; features tell the prompt and the depth, actions grow by a token each turn."""
    rng = np.random.default_rng(seed)
    columns = {name: [] for name in ("prompt", "parent", "rollout", "continuation", "over", "correct", "path")}

    def add(prompt, rollout, continuation, parent, paths):
        nodes = []
        for path in paths:
            for name, value in zip(
                columns,
                (
                    prompt,
                    parent,
                    rollout,
                    continuation,
                    policy.over(prompt, path),
                    policy.success.get((prompt, path), False),
                    path,
                ),
                strict=True,
            ):
                columns[name].append(value)
            parent = len(columns["path"]) - 1
            nodes.append(parent)
        return nodes

    for prompt in range(policy.prompts):
        chains = [add(prompt, i, False, -1, policy.rollout(rng, prompt)) for i in range(spines)]
        rollout = spines
        for node in [n for chain in chains for n in chain[:-1]]:
            for _ in range(continuations):
                add(prompt, rollout, True, node, policy.rollout(rng, prompt, columns["path"][node]))
                rollout += 1
    edges = sorted({(p, path) for p, path in zip(columns["prompt"], columns["path"], strict=True)})
    scores = np.array([policy.score(*edge) for edge in edges])
    scale = np.abs(scores).max(axis=1) / 127
    gradient = policy.gradient()
    n, depth = len(columns["path"]), np.array([len(path) for path in columns["path"]])
    inner = ~np.array(columns["over"])
    features = np.eye(policy.prompts + 1)[columns["prompt"]] * inner[:, None]
    features[:, -1] = depth * inner
    norm2 = float(gradient @ gradient)
    return DenseForest(
        meta={
            "gradient_norm2": norm2,
            "gradient_norm2_unbiased": norm2,
            "gradient_reliability": 1.0,
            "label": "tiny record",
        },
        keys=np.array([f"prompt {p}" for p in range(policy.prompts)]),
        hops=np.zeros(policy.prompts, dtype=np.int64),
        prompt_tokens=np.arange(policy.prompts) + 5,
        reference_successes=np.array([round(1000 * policy.value(p)) for p in range(policy.prompts)]),
        reference_count=np.full(policy.prompts, 1000),
        root_features=np.eye(policy.prompts + 1)[: policy.prompts].astype(np.float32),
        prompt=np.array(columns["prompt"]),
        parent=np.array(columns["parent"]),
        rollout=np.array(columns["rollout"]),
        continuation=np.array(columns["continuation"], dtype=bool),
        terminated=np.array(columns["over"], dtype=bool),
        truncated=np.zeros(n, dtype=bool),
        is_correct=np.array(columns["correct"], dtype=bool),
        tool_error=depth == 2,
        reward=np.array(columns["correct"], dtype=np.float32),
        action_tokens=2 + depth,
        context_tokens=np.where(inner, 3, 0),
        edge_row=np.array([edges.index(e) for e in zip(columns["prompt"], columns["path"], strict=True)]),
        features=features.astype(np.float32),
        dot=(scores @ gradient).astype(np.float32),
        norm2=(scores**2).sum(axis=1).astype(np.float32),
        entropy=np.linspace(0.1, 0.6, len(edges), dtype=np.float32),
        sketch=np.rint(scores / scale[:, None]).astype(np.int8),
        sketch_scale=scale.astype(np.float32),
    )
