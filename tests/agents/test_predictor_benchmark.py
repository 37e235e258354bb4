import numpy as np
import pytest

from allocation import Forest, Sample, Tree
from allocation.predictor import anchors_of, training_set
from allocation.predictors import MeanPredictor
from benchmarks.predictor import Judged, figures, groups, judge
from benchmarks.predictor_rows import DenseAllocator, Rows, _Recorder

DIM = 3


def tree(index, ends, seed=0):
    """Root rollouts of two turns, one a given end."""
    rng = np.random.default_rng([seed, index])
    made = Tree(f"q{index}", index, f"prompt {index}", {"max_turns": 4})
    made.root.features = rng.normal(size=DIM).astype(np.float16)
    for rollout, good in enumerate(ends):
        sample = Sample("", np.zeros(2, np.int64), -rng.random(2).astype(np.float32), np.zeros(0, np.int64))
        state = rng.normal(size=DIM).astype(np.float16)
        first = made.add(made.root, rollout, "root", f"act {rollout}", "seen", sample, features=state)
        made.add(first, rollout, "root", terminated=True, is_correct=good)
    return made


def recorded(updates=3):
    recorder, forests = _Recorder(DIM), {}
    for update in range(updates):
        for source in (1, 0):
            # The prompts of one update come again in the next.
            trees = [tree(i, [True, False, update > 0], seed=10 * update + source) for i in range(2)]
            forests[update, source] = Forest(trees)
            recorder.add(forests[update, source], update, source)
    recorder.add_dense(Forest([tree(0, [True, False])]), 0, 2)
    return recorder.rows(2), forests


def test_rows_give_back_what_predictors_saw(tmp_path):
    rows, forests = recorded()
    rows.save(tmp_path / "rows.npz")
    rows = Rows.load(tmp_path / "rows.npz")
    for (update, source), forest in forests.items():
        at = np.flatnonzero((rows.update == update) & (rows.source == source))
        training = training_set(forest)
        expected = anchors_of(
            [r[0] for r in training], [r[1] for r in training], lambda key: (float(len(key)), 1.0), tree_outcomes=True
        )
        found = list(rows.anchors(at, lambda key: (float(len(key)), 1.0), tree_outcomes=True))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            for name in set(one._fields) - {"features", "path_features", "render"}:
                assert getattr(one, name) == pytest.approx(getattr(other, name)), name
            assert one.text == other.text
            assert one.path_features == pytest.approx(other.path_features, abs=1e-6)
        assert rows.value[at].tolist() == [r[2] for r in training] and rows.weight[at].tolist() == [
            r[3] for r in training
        ]
    blind = next(rows.anchors(np.array([1]), lambda key: (0.0, 0.0)))
    assert (blind.tree_successes, blind.tree_failures) == (0.0, 0.0)


def test_chance_is_the_unbiased_variance_of_outcomes_from_one_anchor():
    rows, _ = recorded()
    assert rows.chance[0, 0] == 0.5 and np.isnan(rows.chance[0, 1]) and np.isnan(rows.chance[1]).all()


class Watching(MeanPredictor):
    """Notes how much it had learned when it was asked."""

    def __init__(self):
        super().__init__()
        self.learned, self.asked = 0, []

    def predict(self, anchors):
        self.asked.append((self.learned, [a.successes + a.failures for a in anchors]))
        return np.full(len(anchors), 0.5)

    def update(self, anchors, values, weights):
        self.learned += 1
        return {}


def test_predictions_come_before_learning_and_counts_from_earlier_updates_alone():
    rows, _ = recorded()
    watching = Watching()
    judged = judge(rows, watching, 0)
    assert [learned for learned, _ in watching.asked] == [0, 0, 1, 1, 2, 2] and watching.learned == 3
    assert not any(watching.asked[0][1] + watching.asked[1][1]) and all(watching.asked[2][1])
    mean = MeanPredictor()
    for update in range(3):
        at = (rows.update == update) & (rows.source == 0)
        assert np.allclose(judged.base[at], mean.predict([None])[0])
        mean.update([], rows.value[at], rows.weight[at])
    assert judged.age[rows.update == 0].max() == -1 and (judged.age[rows.update == 1] == 1).all()


def test_the_ceiling_is_the_skill_of_knowing_every_value():
    rows, _ = recorded()
    n = len(rows.value)
    judged = Judged(rows.value.copy(), np.full(n, 0.5), np.full(n, -1), (0.0, 0.0))
    at = groups(rows, judged, 0)["depth_0"] & (rows.source == 0)
    found = figures(rows, judged, at)
    assert found["skill"] == 1.0 and found["brier"] == 0.0 and found["rows"] == 6
    # Three outcomes behind each root: chance is a third of V (1 - V), which `recorded` measured as one half.
    reference = np.average((rows.value[at] - 0.5) ** 2, weights=rows.weight[at])
    assert found["ceiling"] == pytest.approx(1 - 0.5 / 3 / reference)
    assert figures(rows, judged, np.zeros(n, bool)) == {"rows": 0}


def test_dense_forests_branch_at_every_prefix():
    allocator = DenseAllocator(2, 3, 4)
    made = tree(0, [True, False, True])
    planned = allocator.allocate_prefixes(made, 12, np.random.default_rng(0))
    assert planned == [(n.id, 4) for n in made.nodes if n.depth == 1]
    assert len(allocator.allocate_prefixes(made, 11, np.random.default_rng(0))) == 2
    assert allocator.allocate_prefixes(made, 12, np.random.default_rng(0), wave=1) == []
