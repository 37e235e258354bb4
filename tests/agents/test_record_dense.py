import numpy as np
import pytest
import torch

from agents.models import load_model
from allocation.arena.dense import DenseForest
from benchmarks import record_dense
from benchmarks.dense_scores import CountSketch, Reference, Scorer, Weighted, path_ids
from benchmarks.record_dense import Args, record, reduce


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small record, and the trees that it was made of: those of the reference first."""
    trees = []
    original = record_dense.trees_of

    def spy(*args):
        for tree in original(*args):
            trees.append(tree)
            yield tree

    patch = pytest.MonkeyPatch()
    patch.setattr(record_dense, "trees_of", spy)
    path = tmp_path_factory.mktemp("dense") / "quick.npz"
    dense = record(Args(path, label="test", quick=True, seed=3))
    patch.undo()
    dense.save(path)
    return DenseForest.load(path), trees[:3], trees[3:]


@pytest.fixture(scope="module")
def scorer():
    return Scorer(load_model("tiny", dtype="float32")[0])


def gradient_of(scorer, ids, positions, weight=1.0):
    """The obvious way: one sequence, the model's own logits, autograd."""
    scorer.model.zero_grad(set_to_none=True)
    logprobs = torch.log_softmax(scorer.model(input_ids=torch.from_numpy(ids)[None]).logits[0], -1)
    (weight * sum(logprobs[p - 1, ids[p]] for p in positions)).backward()
    return torch.cat([p.grad.flatten() for p in scorer.model.parameters()])


def close(a, b):
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_what_is_recorded_is_what_was_collected(recorded):
    dense, reference, trees = recorded
    assert (dense.num_prompts, dense.features.shape[1], dense.sketch.shape[1]) == (3, 4, 16)
    assert [t.key for t in reference] == [t.key for t in trees] == dense.keys.tolist()
    assert dense.reference_count.tolist() == [8, 8, 8]
    assert dense.reference_successes.tolist() == [t.outcome_counts()[0] for t in reference]
    for prompt, tree in enumerate(trees):
        rows = np.flatnonzero(dense.prompt == prompt)
        assert len(rows) == len(tree.nodes) - 1
        first = rows[0] - 1
        for row, node in zip(rows.tolist(), tree.nodes[1:], strict=True):
            assert dense.depth[row] == node.depth and dense.rollout[row] == node.rollout
            assert dense.parent[row] == (first + node.parent if node.parent else -1)
            assert dense.is_correct[row] == bool(node.is_correct) and dense.terminal[row] == node.terminal
            assert dense.action_tokens[row] == len(node.sample.action_ids)
            assert dense.tool_errors[row] == node.tool_errors
        inner = [n for n in tree.nodes[1:] if n.origin == "root" and not n.terminal]
        assert len(tree.leaves("root")) == 4 and len(tree.leaves("continuation")) == 2 * len(inner)


def test_the_scores_of_a_path_sum_to_the_gradient_of_its_log_prob(recorded, scorer):
    tree = max(recorded[2], key=lambda t: max(n.depth for n in t.leaves()))
    leaf = max(tree.leaves(), key=lambda n: n.depth)
    total = torch.zeros(scorer.size)
    for node in tree.path(leaf)[1:]:
        ids, positions = path_ids(tree, node)
        assert ids[positions[-1]].tolist() == node.sample.action_ids.tolist()
        score, entropy = scorer.score(ids, positions[-1])
        total += score
        assert 0 <= entropy < np.log(scorer.model.config.vocab_size)
    ids, positions = path_ids(tree, leaf)
    whole = gradient_of(scorer, ids, np.concatenate(positions))
    assert leaf.depth > 1 and close(total, whole)
    assert close(scorer.gradient([Weighted(ids, np.concatenate(positions), -0.5)]), -0.5 * whole)


def test_the_reference_is_the_mean_leave_one_out_gradient_of_both_halves(recorded, scorer):
    dense, reference, _ = recorded
    obvious = []
    for half in range(2):
        total = torch.zeros(scorer.size)
        for tree in reference:
            leaves = tree.leaves()[half::2]
            for leaf in leaves:
                others = [float(other.is_correct) for other in leaves if other is not leaf]
                advantage = float(leaf.is_correct) - np.mean(others)
                ids, positions = path_ids(tree, leaf)
                if advantage:
                    total += gradient_of(
                        scorer, ids, np.concatenate(positions), advantage / len(leaves) / len(reference)
                    )
        obvious.append(total)
    mean = (obvious[0] + obvious[1]) / 2
    assert mean.norm() > 0 and dense.meta["gradient_norm2"] == pytest.approx(float(mean @ mean), rel=1e-3)
    assert dense.meta["gradient_norm2_unbiased"] == pytest.approx(float(obvious[0] @ obvious[1]), rel=1e-2, abs=1e-2)
    again = Reference(scorer, len(reference))
    for tree in reference:
        again.add(tree)
    assert close(again.gradient(), mean)

    # The stored figures of an edge are those of its score.
    tree, sketch = recorded[2][0], CountSketch(scorer.size, 16, 3)
    for number in (1, len(tree.nodes) // 2, len(tree.nodes) - 1):
        ids, positions = path_ids(tree, tree.nodes[number])
        score, entropy = scorer.score(ids, positions[-1])
        row = dense.edge_row[number - 1]
        assert dense.dot[row] == pytest.approx(
            float(score @ mean), rel=1e-2, abs=1e-3 * float(score.norm() * mean.norm())
        )
        assert dense.norm2[row] == pytest.approx(float(score @ score), rel=1e-3)
        assert float(dense.entropy[row]) == pytest.approx(entropy, rel=1e-2, abs=1e-3)
        stored = dense.sketch[row].astype(float) * dense.sketch_scale[row]
        assert np.allclose(stored, sketch(score).numpy(), atol=float(dense.sketch_scale[row]))


def test_sketches_keep_inner_products_on_average():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=301).astype(np.float32)) for _ in range(2))
    b += a
    inner = [float(s(a) @ s(b)) for s in (CountSketch(301, 32, seed) for seed in range(2000))]
    # The standard deviation of one is about sqrt((|a|^2 |b|^2 + (a.b)^2) / 32).
    spread = np.sqrt((float(a @ a) * float(b @ b) + float(a @ b) ** 2) / 32)
    assert abs(np.mean(inner) - float(a @ b)) < 4 * spread / np.sqrt(len(inner)) and np.std(inner) < 1.3 * spread


def test_components_keep_what_varies_most():
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(40, 6)) * [8, 4, 0, 0, 0, 0] + 3
    roots, nodes, explained = reduce(list(hidden[:10]), [None, *hidden[10:], None], 3)
    assert roots.shape == (10, 3) and nodes.shape == (32, 3) and explained == pytest.approx(1)
    assert not nodes[[0, -1]].any()
    kept = np.concatenate([roots, nodes[1:-1]]).astype(float)
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (hidden, kept)]
    ratio = distances[1][distances[0] > 0] / distances[0][distances[0] > 0]
    assert ratio.std() < 0.01 * ratio.mean()
