"Calibration, conformal sets and the decision: held equal to scikit-learn and MAPIE, covering what they promise, blind to later rows."
import json

import numpy as np
import pytest

from bnml.core.base import canonical_json
from bnml.ml.calibration import METHODS, Calibrator, fit_calibrator, isotonic, log_odds, platt
from bnml.ml.conformal import coverage, fit_conformal
from bnml.ml.decision import Decider, settle
from bnml.ml.ensemble import choose_rule, ensemble_weights
from bnml.ml.scores import calibration_errors

H = 3_600_000


def market(seed: int, n: int = 4000) -> dict:
    "Honest probabilities, a loud and a blind learner, labels and returns that follow them."
    r = np.random.default_rng(seed)
    truth = r.dirichlet([2, 3, 2], n)
    y = (r.uniform(size=n)[:, None] > truth.cumsum(axis=1)).sum(axis=1).clip(0, 2) - 1
    loud = truth ** 2 / (truth ** 2).sum(axis=1, keepdims=True)
    return {"truth": truth, "y": y, "loud": loud, "blind": r.dirichlet([2, 3, 2], n), "start": np.arange(n) * H, "end": np.arange(5, n + 5) * H,
            "net": 0.01 * y - 0.0024 + r.normal(0, 0.004, n)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("places", [2, 16])
def test_the_staircase_is_scikit_learns(seed, places):
    learn = pytest.importorskip("sklearn.isotonic")
    r = np.random.default_rng(seed)
    p = np.round(r.beta(2, 4, 700), places)
    hit, w, q = r.uniform(size=700) < p ** 1.5, r.uniform(0.1, 3, 700), np.linspace(-0.1, 1.1, 997)
    theirs = learn.IsotonicRegression(out_of_bounds="clip").fit(p, hit, w)
    np.testing.assert_allclose(np.interp(q, *isotonic(p, hit, w, least=1)), theirs.predict(q), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_sigmoid_is_scikit_learns(seed):
    "Platt's fit on log-odds, with weights; theirs by L-BFGS."
    learn = pytest.importorskip("sklearn.calibration")
    r = np.random.default_rng(seed)
    p, w = r.beta(1 + seed, 4, 900), r.uniform(0.1, 3, 900)
    hit = r.uniform(size=900) < p ** 1.5
    theirs = learn._SigmoidCalibration().fit(log_odds(p), hit, w)
    np.testing.assert_allclose(platt(p, hit, w), [-theirs.a_, -theirs.b_], atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_json_keeps_every_bit(method):
    m = market(1)
    c = fit_calibrator(method, m["loud"], m["y"])
    again = Calibrator.from_dict(json.loads(canonical_json(c.to_dict())))
    assert again == c and again.apply(m["blind"]).tobytes() == c.apply(m["blind"]).tobytes()
    assert c.apply(m["blind"].astype(np.float32)).dtype == np.float64


class Said:
    "A fitted classifier whose features are its probabilities."
    classes_ = np.array([-1, 0, 1])
    def fit(self, X, y): return self
    def predict(self, X): return self.classes_[np.asarray(X).argmax(axis=1)]
    def predict_proba(self, X): return np.asarray(X)
    def __sklearn_is_fitted__(self): return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("n", [59, 500])
def test_the_sets_are_mapies(alpha, n):
    mapie = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin
    m = market(int(100 * alpha) + n)
    learner = type("Learner", (ClassifierMixin, Said, BaseEstimator), {})()
    theirs = mapie.SplitConformalClassifier(learner, confidence_level=1 - alpha, conformity_score="lac", prefit=True)
    theirs.conformalize(m["loud"][:n], m["y"][:n])
    _, sets = theirs.predict_set(m["loud"][1000:3000])
    ours = fit_conformal(m["loud"][:n], m["y"][:n], alpha).sets(m["loud"][1000:3000])
    assert (ours == sets[:, :, 0]).all() and 0 < ours.sum() < ours.size


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("said", ["truth", "loud", "blind"])
def test_coverage_is_what_was_promised(alpha, said):
    "On exchangeable rows, whatever the learner is worth: each seed within 2 points, their mean within one."
    found = []
    for seed in range(5):
        m = market(seed, 40_000)
        sets = fit_conformal(m[said][:20_000], m["y"][:20_000], alpha).sets(m[said][20_000:])
        found.append(coverage(sets, m["y"][20_000:]))
    assert np.abs(np.array(found) - (1 - alpha)).max() < 0.02 and abs(np.mean(found) - (1 - alpha)) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_confidence_is_what_comes_true(seed):
    "Settled on a loud learner and a blind one; on later rows the calibration error is below 0.05."
    m, fit, late = market(seed, 8000), slice(0, 5000), slice(5100, None)
    part = lambda rows: {k: m[k][rows] for k in ("loud", "blind")}
    decider, settled = settle(part(fit), m["y"][fit], m["start"][fit], m["end"][fit], m["net"][fit], 5, conformal_alpha=0.3, embargo_ms=12 * H)
    action, confidence, proba = decider.decide(part(late))
    assert max(calibration_errors(m["y"][late], proba, action).values()) < 0.05 < calibration_errors(m["y"][late], m["loud"][late])["decided"]
    assert (action != 0).sum() > 50 and np.array_equal(confidence[action != 0], 100 * np.take_along_axis(proba, action[:, None].astype(int) + 1, 1)[action != 0, 0])
    assert settled.choice.edge > 2 * settled.choice.error > 0


def test_later_rows_are_never_read():
    "Returns and labels of the test rows poisoned: they are not handed in, and what stands behind the slices changes nothing before them."
    m, n = market(9), 3000
    def fitted(y, net, rows=slice(0, n)):
        return settle({k: m[k][rows] for k in ("loud", "blind")}, y[rows], m["start"][rows], m["end"][rows], net[rows], 5, embargo_ms=12 * H)
    poison = np.random.default_rng(0)
    y, net = m["y"].copy(), m["net"].copy()
    y[n:], net[n:] = poison.choice([-1, 0, 1], len(y) - n), 9.0
    clean, dirty = fitted(m["y"], m["net"]), fitted(y, net)
    assert canonical_json([clean[0].to_dict(), clean[1].to_dict()]) == canonical_json([dirty[0].to_dict(), dirty[1].to_dict()])
    first = clean[1].slices["B"]["from_ms"] // H
    y, net = m["y"].copy(), m["net"].copy()
    y[first:], net[first:] = poison.choice([-1, 0, 1], len(y) - first), 9.0       # B poisoned: what A taught stays, byte for byte
    taught = lambda d, s: canonical_json([d.weights, s.losses, s.economic, s.slices["A"]])
    assert taught(*fitted(y, net)) == taught(*clean)
    purged = slice(clean[1].slices["A"]["rows"], first)                            # the rows between A and B teach nobody
    y, net = m["y"].copy(), m["net"].copy()
    y[purged], net[purged] = 0, 9.0
    assert canonical_json(fitted(y, net)[0].to_dict()) == canonical_json(clean[0].to_dict())


def test_noise_gets_no_rule():
    "A blind learner over forty markets of fair coins after costs: hardly ever is a rule believed."
    believed = 0
    for seed in range(40):
        r = np.random.default_rng(seed)
        choice = choose_rule(r.dirichlet([3, 3, 3], 1500), r.normal(0, 0.01, 1500), 5, floor=0.33)
        believed += choice.rule.threshold <= 1
    assert believed <= 8


@pytest.mark.parametrize("floor", [0.0, 0.33, 0.4, 0.45])
def test_no_rule_below_the_floor(floor):
    m = market(3)
    rule = choose_rule(m["truth"], m["net"], 5, floor=floor).rule
    action, confidence = rule.decide(m["truth"])
    assert rule.threshold >= floor and confidence[action != 0].min() >= 100 * floor


def test_weights_are_never_nan_or_negative():
    r = np.random.default_rng(2)
    odd = [np.nan, np.inf, -np.inf, None, 0.0, 1e-300, 1e300, -5.0]
    for _ in range(300):
        losses = dict(zip("abcd", r.choice(np.array(odd, object), 4)))
        edges = {n: (r.choice(np.array(odd, object)), int(r.integers(0, 3))) for n in "abc"}
        w = np.array(list(ensemble_weights(losses, edges).values()))
        assert np.isfinite(w).all() and (w >= 0).all() and abs(w.sum() - 1) < 1e-12


def test_a_manifest_brings_the_same_decisions_back():
    m = market(5)
    rows = {k: m[k] for k in ("loud", "blind")}
    decider = settle(rows, m["y"], m["start"], m["end"], m["net"], 5, conformal_alpha=0.3)[0]
    again = Decider.from_dict(json.loads(canonical_json(decider.to_dict())))
    for ours, theirs in zip(decider.decide(rows), again.decide(rows)):
        assert ours.tobytes() == theirs.tobytes()
