"Splits and weights against twins that ask every pair of rows and every bar."
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnml.ml.audit import label_overlap
from bnml.ml.combinatorial import combinatorial, n_paths, paths
from bnml.ml.splits import purge, walk_forward
from bnml.ml.weights import sample_weights, uniqueness

HOUR = 3_600_000
EMBARGO = st.integers(0, 12).map(lambda h: h * HOUR)


@st.composite
def panels(draw, most=60):
    "(symbol, start, end) of the rows of one to four symbols with different histories, holes and labels of every length, shuffled."
    rows = []
    for symbol in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, 20))
        for hour in range(first, first + draw(st.integers(8, most))):
            length = draw(st.integers(0, 14))
            if length: rows.append((symbol, hour * HOUR, (hour + length) * HOUR - draw(st.integers(0, 1))))  # 0 = no label here
    rows = draw(st.permutations(rows))
    return np.array(rows, np.int64).reshape(-1, 3).T


def long_panel(seed, longest=8):
    "A longer panel than Hypothesis likes to make: (symbol, start, end), shuffled."
    rng = np.random.default_rng(seed)
    symbol, hour = np.divmod(rng.choice(3 * 80, 150, replace=False), 80)
    length = rng.integers(1, longest + 1, 150)
    return symbol, (hour + 10 * symbol) * HOUR, (hour + 10 * symbol + length) * HOUR - rng.integers(0, 2, 150)


def overlapping(start, end, i, j, embargo):
    "Whether the windows of two rows come nearer than the embargo allows, ends included."
    return start[i] - embargo <= end[j] and start[j] - embargo <= end[i]


def judge(start, end, train, test, embargo, may=lambda i: True):
    "Fail on a row pair that overlaps, on a row that was dropped without need, and on a row on both sides."
    kept, tested = set(train.tolist()), set(test.tolist())
    assert not kept & tested and sorted(kept) == train.tolist()
    for i in set(range(len(start))) - tested:
        touches = any(overlapping(start, end, i, j, embargo) for j in tested)
        assert not (i in kept and touches), f"row {i} trains and overlaps the test"
        assert i in kept or touches or not may(i), f"row {i} was dropped without need"


@settings(max_examples=60, deadline=None)
@given(panels(30), EMBARGO, st.data())
def test_purge_any_rows(panel, embargo, data):
    _, start, end = panel
    if not len(start): return
    test = np.array(sorted(data.draw(st.sets(st.integers(0, len(start) - 1), min_size=1, max_size=8))))
    train = purge(start, end, test, embargo)
    judge(start, end, train, test, embargo)
    mask = np.isin(np.arange(len(start)), test)
    assert purge(start, end, mask, embargo).tolist() == train.tolist()


@settings(max_examples=40, deadline=None)
@given(panels(30), EMBARGO, st.integers(1, 4), st.one_of(st.none(), st.integers(3, 30)))
def test_walk_forward(panel, embargo, n_splits, window):
    _, start, end = panel
    if len(np.unique(start)) < 12: return
    window = window and window * HOUR
    folds = walk_forward(start, end, n_splits, embargo, 0.4, window)
    assert len(folds) == n_splits
    for train, test in folds:
        first = start[test].min()
        judge(start, end, train, test, embargo, lambda i: start[i] < first and (window is None or start[i] >= first - window))
        assert (end[train] + embargo < first).all() and not set(start[train]) & set(start[test])
    tested = np.concatenate([test for _, test in folds])
    assert sorted(tested) == np.flatnonzero(start >= start[folds[0][1]].min()).tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4).map(lambda h: h * HOUR), st.sampled_from([(3, 1), (4, 2), (5, 2), (5, 3), (6, 2)]))
def test_combinatorial(seed, embargo, shape):
    _, start, end = long_panel(seed)
    splits = combinatorial(start, end, *shape, embargo)
    assert len(splits) == comb(*shape)
    for train, test in splits:
        judge(start, end, train, test, embargo)
        assert not set(start[train]) & set(start[test])
    tested = np.bincount(np.concatenate([test for _, test in splits]))
    assert (tested == n_paths(*shape)).all()                        # every row as often as any other
    assert not any(label_overlap(train, test, start, end) for train, test in splits)
    whole = paths(start, [np.stack([test, np.full(len(test), k)], axis=1) for k, (_, test) in enumerate(splits)], *shape)
    assert whole.shape == (n_paths(*shape), len(start), 2)
    assert (whole[:, :, 0] == np.arange(len(start))).all()          # every path holds every row once
    for row in range(len(start)):                                   # told by another split on every path
        assert sorted(whole[:, row, 1]) == [k for k, (_, test) in enumerate(splits) if row in set(test.tolist())]


@pytest.mark.parametrize("n, k, splits, phi", [(6, 2, 15, 5), (4, 2, 6, 3), (10, 2, 45, 9), (12, 6, 924, 462), (5, 1, 5, 1)])
def test_number_of_paths(n, k, splits, phi):
    assert (comb(n, k), n_paths(n, k)) == (splits, phi) and splits * k == phi * n


@settings(max_examples=40, deadline=None)
@given(panels(40), st.booleans())
def test_uniqueness(panel, with_groups):
    symbol, start, end = panel
    group = symbol if with_groups else np.zeros(len(start), np.int64)
    spans = [(g, range(s // HOUR + 1, max((e - 1) // HOUR, s // HOUR + 1) + 1)) for g, s, e in zip(group.tolist(), start.tolist(), end.tolist())]
    want = []
    for g, span in spans:
        crowd = [sum(bar in other and g == h for h, other in spans) for bar in span]
        want.append(sum(1 / c for c in crowd) / len(crowd))
    assert np.allclose(uniqueness(start, end, HOUR, group), want, rtol=1e-12)
    if len(start): assert sample_weights(start, end, HOUR, True, 20, group).mean() == pytest.approx(1)
