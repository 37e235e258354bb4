"""The check of every batch: layouts that are right pass, and whatever is changed in one is found."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from token_trees import asked

from agents.exactness import assert_exact
from agents.flat import flat_layout
from agents.layout import Layout
from agents.learner import Learner
from agents.learner_config import LearnerConfig
from agents.packing import packed_layout

LAYOUTS = {"flat": flat_layout, "packed": packed_layout}
limits = st.sampled_from([1, 7, 20, 60, 10**6])


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(what=asked(), limit=limits)
def test_what_the_layouts_make_is_exact(name, what, limit):
    tokens, prefixes = what
    assert_exact(LAYOUTS[name](tokens, prefixes, limit), tokens, prefixes, tokens.ids)


def read(micro):
    """By row: the places that something is read from."""
    found = {}
    for row, at in [*zip(micro.row, micro.before, strict=True), *zip(micro.value_row, micro.value_at, strict=True)]:
        found.setdefault(int(row), []).append(int(at))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("field", ["ids", "positions"])
@settings(max_examples=60, deadline=None)
@given(what=asked(), limit=limits, data=st.data())
def test_any_id_or_position_that_is_changed_is_found(name, field, what, limit, data):
    """Every token that a layout holds is seen by something that is read: otherwise it would not be there."""
    tokens, prefixes = what
    layout = LAYOUTS[name](tokens, prefixes, limit)
    assume(layout.micro_batches)
    number = data.draw(st.integers(0, len(layout.micro_batches) - 1))
    micro = layout.micro_batches[number]
    row = data.draw(st.sampled_from(sorted(read(micro))))
    seen = sorted(
        {j for at in read(micro)[row] for j in range(at + 1) if micro.ends is None or at < micro.ends[row, j]}
    )
    at = data.draw(st.sampled_from(seen))
    changed = getattr(micro, field).copy()
    changed[row, at] += data.draw(st.sampled_from([1, 7, 100_000]))
    batches = list(layout.micro_batches)
    batches[number] = replace(micro, **{field: changed})
    with pytest.raises(RuntimeError, match=r"tree .*, node \d+ .*position \d+ .*id"):
        assert_exact(Layout(tuple(batches), 0, 0), tokens, prefixes, tokens.ids)


@settings(max_examples=60, deadline=None)
@given(what=asked(), data=st.data())
def test_a_packed_token_that_sees_too_much_or_too_little_is_found(what, data):
    tokens, prefixes = what
    layout = packed_layout(tokens, prefixes, 10**6)
    places = [
        (m, row, j)
        for m, micro in enumerate(layout.micro_batches)
        for row, ats in read(micro).items()
        for j in range(max(ats) + 1)
        # Ending a subtree here takes the token from some place that is read, or shows it to one.
        if any(j <= at < micro.ends[row, j] for at in ats)
    ]
    assume(places)
    m, row, j = data.draw(st.sampled_from(places))
    micro = layout.micro_batches[m]
    ends = micro.ends.copy()
    ends[row, j] = j  # nobody sees it, itself not either
    batches = list(layout.micro_batches)
    batches[m] = replace(micro, ends=ends)
    with pytest.raises(RuntimeError, match="the model is shown"):
        assert_exact(Layout(tuple(batches), 0, 0), tokens, prefixes, tokens.ids)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(what=asked(), data=st.data())
def test_tokens_that_are_scored_as_another_or_twice_or_not_at_all_are_found(name, what, data):
    tokens, prefixes = what
    assume(len(tokens) > 1)
    layout = LAYOUTS[name](tokens, prefixes, 10**6)
    (micro,) = layout.micro_batches if len(layout.micro_batches) == 1 else layout.micro_batches[-1:]
    assume(len(micro.token) > 0)
    j = data.draw(st.integers(0, len(tokens) - 1))
    ids = tokens.ids.copy()
    ids[j] += 1
    with pytest.raises(RuntimeError, match=f"is scored as id {ids[j]}, {tokens.ids[j]} was sampled"):
        assert_exact(layout, tokens, prefixes, ids)
    for twice in (np.append(micro.token, micro.token[-1]), micro.token[:-1]):
        keep = np.append(np.arange(len(micro.token)), len(micro.token) - 1)[: len(twice)]
        other = replace(micro, token=twice, row=micro.row[keep], before=micro.before[keep])
        batches = (*layout.micro_batches[:-1], other)
        with pytest.raises(RuntimeError, match="where the batch has"):
            assert_exact(Layout(batches, 0, 0), tokens, prefixes, tokens.ids)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ["tree", "gae"])
def test_the_learner_checks_every_batch(make_model, sampled, layout, estimator, monkeypatch):
    """Something between the trees and the model changes one id: the update stops before a step is taken."""
    learner = Learner(make_model(), LearnerConfig(layout=layout, estimator=estimator), updates=3)
    learner.update(sampled)
    real = learner._layout_of

    def altered(tokens, prefixes):
        made = real(tokens, prefixes)
        micro = made.micro_batches[0]
        ids = micro.ids.copy()
        ids[0, 0] += 1
        return replace(made, micro_batches=(replace(micro, ids=ids), *made.micro_batches[1:]))

    monkeypatch.setattr(learner, "_layout_of", altered)
    before = [p.clone() for p in learner.model.parameters()]
    with pytest.raises(RuntimeError, match=r"would not score what was sampled: tree .* at position 0"):
        learner.update(sampled)
    assert all((a == b).all() for a, b in zip(before, learner.model.parameters(), strict=True))
