"""Answer scores: the official scripts' behaviour, by hand-worked cases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_envs.multihop_qa.metrics import exact_match, f1, normalize_answer, supporting_recall


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's\tMeow!", "cats meow"),
        ("An apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("3,496", "3496"),
        ("Kraków-Płaszów", "krakówpłaszów"),
        ("Zoe\u0308", "zoë"),
        ("東京", "東京"),
        ("the", ""),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "score"),
    [
        ("the Eiffel Tower", ["Eiffel Tower"], True, 1.0),
        ("Eiffel", ["Eiffel Tower"], False, 2 / 3),
        ("Stanley Hall", ["G. Stanley Hall", "Stanley Hall"], True, 1.0),
        ("tower tower", ["tower"], False, 2 / 3),
        ("yes", ["Yes."], True, 1.0),
        ("yes it is", ["yes"], False, 0.0),
        ("no", ["no reason"], False, 0.0),
        ("noanswer", ["no"], False, 0.0),
        ("", ["x"], False, 0.0),
        ("", ["A"], False, 0.0),
        ("the", ["A"], False, 0.0),
        ("a", ["A"], True, 1.0),
        ("!", ["!"], True, 1.0),
        ("anything", [], False, 0.0),
        ("Лев Толстой", ["лев толстой"], True, 1.0),
    ],
)
def test_scores(prediction, answers, em, score):
    assert exact_match(prediction, answers) is em
    assert f1(prediction, answers) == pytest.approx(score)


@given(st.text(), st.text())
def test_bounds(prediction, answer):
    score = f1(prediction, [answer])
    assert 0 <= score <= 1
    if exact_match(prediction, [answer]):
        assert score == 1
    assert score == pytest.approx(f1(answer, [prediction]))


def test_supporting_recall():
    assert supporting_recall(["A", "C", "A"], ("A", "B")) == 0.5
    assert supporting_recall([], ("A",)) == 0.0
    assert supporting_recall(["A"], ()) == 1.0
