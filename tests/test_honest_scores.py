"""Scores are honest: labels shuffled in blocks leave every model within noise of zero, a planted column is found by every model.

One synthetic market, its own features, five-hour labels that overlap. A world is a shuffle of the labels, or a fresh planted column: the whole pipeline
learns in it, and each model gives three figures on the last fold, all of which are zero for a model that knows nothing:

- gain: Brier score of the dummy less its own (learning noise makes it negative, so only more than zero is an edge);
- order: rank correlation of P(BUY) − P(SELL) with the return;
- money: return after costs of its strongest BUYs less that of any row.

Worlds are independent draws, so a figure's mean over them, in standard errors, follows Student's t with WORLDS − 1 degrees of freedom. Six opinions and
three figures are eighteen questions: BOUND is the quantile that chance passes once in a hundred such tests (Bonferroni), on both sides.
"""
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr, t as student

from bnml.core.clock import to_ms
from bnml.data.synth import synth_bars
from bnml.ml.ensemble import strongest_buys
from bnml.ml.evidence import chosen, opinions
from bnml.ml.fitting import validate
from bnml.ml.material import Request, gather
from bnml.ml.options import ModelSettings
from bnml.ml.scores import brier

HOUR, FIRST, HORIZON, BLOCK = 3_600_000, to_ms("2024-01-01"), 5, 48
WORLDS, OPINIONS, FIGURES = 12, ("rf", "xgb", "lgb", "seq", "ensemble", "logistic"), ("gain", "order", "money")
BOUND = float(student.ppf(1 - 0.01 / (2 * len(OPINIONS) * len(FIGURES)), WORLDS - 1))
SETTINGS = ModelSettings(trees=12, depth=4, n_splits=2, min_rows=500, feature_limit=12, threads=1, require_edge=False, context="")


@pytest.fixture(scope="module")
def rows():
    "Two thousand labelled hours of a synthetic market."
    market = {"SYNUSDT": synth_bars("SYNUSDT", "1h", FIRST, FIRST + 2500 * HOUR, seed=7)}
    return gather(market, "SYNUSDT", Request("1h"), SETTINGS).dataset(HORIZON, Request("1h"), SETTINGS)[0]


def shuffled(data, rng):
    "The same rows with what came after them exchanged, two days at a time."
    parts = np.array_split(np.arange(len(data)), len(data) // BLOCK)
    order = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
    return replace(data, y=data.y[order], net=data.net[order])


def planted(data, rng, share=0.5):
    "A column that knows `share` of the return's deviation, in place of the first one."
    known = (data.net - data.net.mean()) / data.net.std()
    X, full = data.X.copy(), data.full.copy()
    X[:, 0] = full[data.rows, 0] = share * known + np.sqrt(1 - share ** 2) * rng.standard_normal(len(data))
    return replace(data, X=X, full=full)


def order(p, net):
    "Rank correlation of an opinion with the return; one that says the same of every row has none."
    lead = p[:, 2] - p[:, 0]
    return spearmanr(lead, net).statistic if np.ptp(lead) > 0 else 0.0


def figures(data):
    "(opinions, figures) on the last fold."
    seen = validate(data, SETTINGS)
    said, test = opinions(seen, chosen(seen, data, SETTINGS)[0]), seen.folds[-1][1]
    y, net = data.y[test], data.net[test]
    dummy = brier(y, said["dummy"][test])
    return [[dummy - brier(y, p := said[name][test]), order(p, net), strongest_buys(p, net, HORIZON)[0] - net.mean()]
            for name in OPINIONS]


def errors_from_zero(data, world):
    "Mean of every figure over the worlds, in its own standard errors: (opinions, figures)."
    found = np.array([figures(world(data, np.random.default_rng(seed))) for seed in range(WORLDS)])
    return found.mean(axis=0) / (found.std(axis=0, ddof=1) / np.sqrt(WORLDS))


def table(z): return {name: dict(zip(FIGURES, np.round(row, 1))) for name, row in zip(OPINIONS, z)}


def test_shuffled_labels_leave_nothing(rows):
    z = errors_from_zero(rows, shuffled)
    assert np.isfinite(z).all() and z.max() < BOUND and z[:, 1:].min() > -BOUND, table(z)


def test_a_planted_column_is_found_by_every_model(rows):
    z = errors_from_zero(rows, lambda data, rng: planted(shuffled(data, rng), rng))
    assert z.min() > BOUND, table(z)
