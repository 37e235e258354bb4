import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocation import make_predictor
from allocation.beliefs import KAPPA_BOUNDS
from allocation.calibration import auc
from allocation.predictor import Anchor
from allocation.predictors import PREDICTORS, CountsPredictor, EnsemblePredictor, HiddenStatePredictor, TextPredictor
from allocation.predictors.ensemble import kappa_of_spread
from allocation.predictors.hashing import word_ids
from allocation.predictors.replay import Replay

DIM = 4


def batch(seed, n=40):
    """Prefixes whose last observation tells how they end, and roots whose prompt does."""
    rng = np.random.default_rng(seed)
    anchors, values = [], []
    for _ in range(n):
        depth, good = int(rng.integers(0, 3)), bool(rng.integers(2))
        names = [f"name{rng.integers(50)}" for _ in range(4)]
        prompt = f"Who knows {names[0]}{' easily' if depth == 0 and good else ''}?"
        turns = []
        for turn in range(depth):
            last = turn == depth - 1
            turns += [f"search {names[turn]}", f"found {names[3]}" if not last or good else "nothing was found"]
        features = rng.normal(size=DIM).astype(np.float32)
        features[0] = 1.0 if good else -1.0
        text = (prompt, *turns)
        anchors.append(
            Anchor(features, depth, 3 - depth, 0, 2.0 * good, 2.0 * (not good), prompt=prompt, render=lambda t=text: t)
        )
        values.append(float(good))
    return anchors, np.array(values)


def taught(predictor, batches=15):
    for seed in range(batches):
        anchors, values = batch(seed)
        predictor.update(anchors, values, np.ones(len(values)))
    return predictor


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_learns_what_it_can_read(name):
    predictor = make_predictor(name, feature_dim=DIM, seed=1)
    assert not predictor.ready
    taught(predictor)
    anchors, values = batch(1000, 300)
    predicted = predictor.predict(anchors)
    assert predictor.ready and predicted.shape == (300,) and predicted.dtype == np.float64
    assert ((predicted > 0) & (predicted < 1)).all() and auc(predicted, values) > 0.9
    assert predictor.predict([]).shape == (0,)


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_restored_predictor_goes_on_bit_for_bit(name):
    first = taught(make_predictor(name, feature_dim=DIM, seed=1), batches=3)
    second = make_predictor(name, feature_dim=DIM, seed=9)
    second.load_state_dict(first.state_dict())
    assert second.ready == first.ready
    for seed in (50, 51):
        anchors, values = batch(seed)
        assert np.array_equal(first.predict(anchors), second.predict(anchors))
        assert first.update(anchors, values, np.ones(40)) == second.update(anchors, values, np.ones(40))
    assert np.array_equal(first.predict(anchors), second.predict(anchors))


@pytest.mark.parametrize("name", ["hidden_state", "text", "ensemble"])
def test_a_seed_decides_everything(name):
    anchors, _ = batch(7)
    one, same, other = (
        taught(make_predictor(name, feature_dim=DIM, seed=s), 3).predict(anchors).tolist() for s in (1, 1, 2)
    )
    assert one == same != other


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown predictor 'gpt'; known: hidden_state, logistic, text, counts, ensemble"
    ):
        make_predictor("gpt")


def test_the_text_encoder_reads_text_alone():
    predictor = taught(TextPredictor(seed=1))
    anchors, values = batch(1000, 300)
    blind = [a._replace(features=None, successes=0.0, failures=0.0) for a in anchors]
    plain = taught_without_counts()
    assert auc(plain.predict(blind), values) > 0.9
    assert np.array_equal(predictor.predict(anchors), predictor.predict([a._replace(features=None) for a in anchors]))


def taught_without_counts():
    predictor = TextPredictor(seed=1)
    for seed in range(25):
        anchors, values = batch(seed)
        blind = [a._replace(features=None, successes=0.0, failures=0.0) for a in anchors]
        predictor.update(blind, values, np.ones(40))
    return predictor


def test_the_text_encoder_keeps_the_latest_turns_in_bounded_rows():
    predictor = TextPredictor(turns=2, words=3, buckets=100)
    text = ("a b c d e", "one", "two", "three", "four", "five", "six")
    ids = predictor._columns([Anchor(None, 3, 0, 0, render=lambda: text), Anchor(None, 0, 0, 0)])[0]
    assert ids.shape == (2, 5, 3) and ids.dtype == np.int16 and not ids[1].any()
    expected = [word_ids(t, 100)[:3] + 1 for t in (text[0], *text[3:])]
    assert [row[row > 0].tolist() for row in ids[0]] == [e.tolist() for e in expected]
    short = predictor._columns([Anchor(None, 1, 0, 0, render=lambda: text[:3])])[0][0]
    assert not short[1:3].any() and short[3, 0] == expected_bucket("one") and short[4, 0] == expected_bucket("two")
    with pytest.raises(ValueError, match="buckets must be between 1 and 32767"):
        TextPredictor(buckets=40_000)


def expected_bucket(word):
    return word_ids(word, 100)[0] + 1


def test_nothing_is_rendered_for_predictors_that_do_not_read():
    def refuse():
        raise AssertionError("rendered")

    anchors = [Anchor(None, 0, 1, 0, prompt="who?", render=refuse)]
    for name in ("hidden_state", "counts"):
        predictor = make_predictor(name, feature_dim=DIM)
        predictor.predict(anchors)
        predictor.update(anchors, np.ones(1), np.ones(1))
    with pytest.raises(AssertionError, match="rendered"):
        TextPredictor().predict(anchors)


count = st.floats(0, 50)


@given(st.lists(st.tuples(count, count, count, count), max_size=6), st.floats(0.1, 20))
def test_counts_give_the_mean_of_a_beta(rows, prior):
    anchors = [Anchor(None, 0, 1, 0, *row) for row in rows]
    expected = [(prior / 2 + s + ts) / (prior + s + f + ts + tf) for s, f, ts, tf in rows]
    assert CountsPredictor(prior).predict(anchors) == pytest.approx(expected)


def test_counts_by_hand():
    predictor = CountsPredictor()
    assert not predictor.ready
    assert predictor.predict([Anchor(None, 0, 1, 0), Anchor(None, 1, 1, 0, 3.0, 1.0, 0.0, 2.0)]).tolist() == [0.5, 0.5]
    assert predictor.predict([Anchor(None, 0, 1, 0, 3.0, 1.0)])[0] == pytest.approx(4 / 6)
    predictor.update([Anchor(None, 0, 1, 0)], np.ones(1), np.ones(1))
    assert predictor.ready
    with pytest.raises(ValueError, match="prior must be positive"):
        CountsPredictor(0.0)


probability = st.floats(0.01, 0.99)


@given(st.lists(st.lists(probability, min_size=3, max_size=3), min_size=2, max_size=5))
def test_spread_gives_the_concentration_of_a_beta(members):
    p = np.array(members)
    for column, kappa in zip(p.T, kappa_of_spread(p), strict=True):
        mean = sum(column) / len(column)
        variance = sum((v - mean) ** 2 for v in column) / len(column)
        expected = KAPPA_BOUNDS[1] if variance < 1e-9 else mean * (1 - mean) / variance - 1
        assert kappa == pytest.approx(np.clip(expected, *KAPPA_BOUNDS), rel=1e-6)


def test_an_ensemble_is_the_mean_of_its_members_and_agreement_counts():
    members = [HiddenStatePredictor(DIM, seed=s) for s in range(3)]
    alone = [HiddenStatePredictor(DIM, seed=s) for s in range(3)]
    ensemble = taught(EnsemblePredictor(members), 3)
    for member in alone:
        taught(member, 3)
    anchors, _ = batch(30)
    each = np.stack([m.predict(anchors) for m in alone])
    mean, kappa = ensemble.predict_with_kappa(anchors)
    assert np.array_equal(mean, each.mean(axis=0)) and np.array_equal(ensemble.predict(anchors), mean)
    assert np.array_equal(kappa, kappa_of_spread(each))
    assert kappa_of_spread(np.array([[0.3], [0.3]]))[0] == KAPPA_BOUNDS[1]
    assert kappa_of_spread(np.array([[0.25], [0.75]]))[0] == pytest.approx(0.25 / 0.0625 - 1)
    with pytest.raises(ValueError, match="at least two"):
        EnsemblePredictor(members[:1])
    with pytest.raises(ValueError, match="an ensemble of 3 members, this one has 2"):
        EnsemblePredictor(alone[:2]).load_state_dict(ensemble.state_dict())


def test_a_member_that_is_not_ready_holds_the_ensemble_back():
    ensemble = EnsemblePredictor([CountsPredictor(), HiddenStatePredictor(0, warmup_roots=3)])
    root = [Anchor(None, 0, 1, 0)]
    for expected in (False, False, True):
        ensemble.update(root, np.ones(1), np.ones(1))
        assert ensemble.ready is expected


def test_words_are_the_same_numbers_everywhere():
    assert word_ids("The City, the city!", 1000).tolist() == word_ids("the city THE CITY", 1000).tolist()
    assert word_ids("zlib", 2**31).tolist() == [0x73887D3A]
    assert word_ids("", 10).shape == (0,)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(1, 9), st.sampled_from([0.3, 0.9, 1.0]))
def test_rows_are_drawn_by_age(sizes, capacity, decay):
    replay = Replay(capacity, decay)
    made = []
    for clock, size in enumerate(sizes):
        x = np.full((size, 2), clock, np.float32)
        replay.add((x,), x[:, 0], x[:, 0], clock)
        made = (made + [clock] * size)[-capacity:]
    assert replay.made.tolist() == made == replay.target.tolist()
    drawn = replay.draw(np.random.default_rng(0), 4000)
    if not made:
        assert not len(drawn) and replay.mean_age(clock) == 0.0
        return
    chance = decay ** (clock - np.array(made, float))
    share = np.bincount(drawn, minlength=len(made)) / 4000
    assert share == pytest.approx(chance / chance.sum(), abs=0.05)
    assert replay.mean_age(clock) == pytest.approx(np.average(clock - np.array(made), weights=chance))
