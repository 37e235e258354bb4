"""Attention along the paths of packed rows against softmax attention with the whole mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from token_trees import asked

from agents.packing import packed_layout
from agents.path_attention import path_attention, segments_of
from agents.tree_attention import ancestor_mask


@st.composite
def packed_ends(draw):
    """`ends` of a packed row: of random trees, of one path, of single tokens, or of tokens that branch anywhere."""
    kind = draw(st.sampled_from(["trees", "path", "single", "nested"]))
    length = draw(st.integers(1, 24))
    if kind == "path":
        return np.full(length, length)
    if kind == "single":
        return np.arange(length) + 1
    if kind == "nested":
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        return nested(rng, length)
    tokens, values = draw(asked(max_trees=2, waves=1))
    batches = packed_layout(tokens, values, draw(st.sampled_from([30, 80]))).micro_batches
    return batches[0].ends[0] if batches else np.ones(1, dtype=np.int64)


def nested(rng, length):
    """A random forest in depth-first order in which every token is a node."""
    parents = np.full(length, -1)
    branch = []  # from a root to the last node
    for i in range(length):
        branch = branch[: int(rng.integers(max(len(branch) - 2, 0), len(branch) + 1))]
        parents[i] = branch[-1] if branch else -1
        branch.append(i)
    ends = np.arange(length) + 1
    for i in reversed(range(length)):
        if parents[i] >= 0:
            ends[parents[i]] = max(ends[parents[i]], ends[i])
    return ends


def inputs(length, heads, shared, d, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, length, d), (heads // shared, length, d), (heads // shared, length, d), (heads, length, d)]
    q, k, v, out = (2 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], out.to(dtype)


def dense(q, k, v, ends, scale):
    group = len(q) // len(k)
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    mask = ancestor_mask(torch.from_numpy(ends)[None])[0]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None], scale=scale)[0]


def apart(one, other):
    return max(((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in zip(one, other, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    ends=packed_ends(),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    d=st.sampled_from([1, 4]),
    blocks=st.sampled_from([(1, 1), (3, 2), (4, 1000), (1000, 3), (1000, 1000)]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_those_of_the_whole_mask(ends, heads, d, blocks, seed):
    tensors, weights = inputs(len(ends), *heads, d, seed)
    got = path_attention(*tensors, segments_of(ends, keys=blocks[1]), 0.7, queries=blocks[0])
    expected = dense(*tensors, ends, 0.7)
    assert got.shape == expected.shape and apart([got], [expected]) < 1e-12
    gradients = [torch.autograd.grad((x * weights).sum(), tensors) for x in (got, expected)]
    assert apart(*gradients) < 1e-12


@settings(max_examples=100, deadline=None)
@given(ends=packed_ends(), keys=st.sampled_from([1, 3, 1000]))
def test_segments_cover_the_row_and_their_tokens_are_seen_alike(ends, keys):
    segments = segments_of(ends, keys=keys)
    assert [s.start for s in segments] == [0, *(s.stop for s in segments)][:-1] and segments[-1].stop == len(ends)
    for segment in segments:
        assert 0 < segment.stop - segment.start <= keys and segment.end >= segment.stop
        assert (ends[segment.start : segment.stop] == segment.end).all()


def test_numeric_gradients():
    ends = np.array([7, 7, 4, 4, 7, 6, 7, 9, 9])
    tensors, _ = inputs(len(ends), 4, 2, 3, seed=1)
    segments = segments_of(ends, keys=2)
    assert torch.autograd.gradcheck(lambda q, k, v: path_attention(q, k, v, segments, 0.5, queries=3), tensors)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted):
    ends = np.array([5, 5, 3, 5, 5])
    tensors, weights = inputs(len(ends), 2, 1, 4, seed=2)
    everything = torch.autograd.grad((path_attention(*tensors, segments_of(ends), 0.5) * weights).sum(), tensors)
    tensors = [x if i in wanted else x.detach() for i, x in enumerate(tensors)]
    (path_attention(*tensors, segments_of(ends), 0.5) * weights).sum().backward()
    for i, x in enumerate(tensors):
        assert x.grad is None if i not in wanted else apart([x.grad], [everything[i]]) < 1e-12


def test_scores_that_would_overflow():
    """Sums of exponentials are carried relative to the greatest score so far."""
    ends = np.array([6, 6, 4, 4, 6, 6])
    tensors, weights = inputs(len(ends), 2, 2, 4, seed=3)
    big = [(1e3 * tensors[0].detach()).requires_grad_(), tensors[1], tensors[2]]
    got = path_attention(*big, segments_of(ends, keys=2), 1.0, queries=2)
    assert torch.isfinite(got).all() and apart([got], [dense(*big, ends, 1.0)]) < 1e-12
    gradients = torch.autograd.grad((got * weights).sum(), big)
    expected = torch.autograd.grad((dense(*big, ends, 1.0) * weights).sum(), big)
    assert all(torch.isfinite(x).all() for x in gradients) and apart(gradients, expected) < 1e-9


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_is_as_near_as_it_can_be(dtype, tolerance):
    ends = nested(np.random.default_rng(4), 40)
    tensors, weights = inputs(len(ends), 4, 2, 8, seed=4, dtype=dtype)
    got = path_attention(*tensors, segments_of(ends), 0.35)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = dense(*exact, ends, 0.35)
    assert got.dtype == dtype and apart([got.double()], [expected]) < tolerance
    gradients = torch.autograd.grad((got * weights).sum(), tensors)
    reference = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert all(x.dtype == dtype for x in gradients)
    assert apart([x.double() for x in gradients], reference) < tolerance
