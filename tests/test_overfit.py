"The statistics of luck: worked figures, twins that count one by one, and how often they are right on noise."
import math
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from scipy import integrate, stats

from bnml.core.base import UsageError
from bnml.ml.overfit import (deflate, deflated_sharpe, expected_max, expected_max_sharpe, min_backtest_length, moments, overfit_summary, pbo,
                             permutation_test, psr, stationary_bootstrap)
from bnml.ml.resample import block_length

DAY, VAR = 2.5 / math.sqrt(250), 0.5 / 250  # annual Sharpe 2.5 and variance 0.5, a day
SETS, STRATEGIES, BARS = 64, 200, 1000


@pytest.fixture(scope="module")
def noise() -> list[np.ndarray]:
    "Independent sets of worthless strategies."
    return [np.random.default_rng(1000 + i).normal(0, 0.01, (BARS, STRATEGIES)) for i in range(SETS)]


def sharpes_of(returns: np.ndarray) -> np.ndarray:
    return returns.mean(axis=0) / returns.std(axis=0, ddof=1)


def test_the_worked_figures():
    assert round(expected_max_sharpe(100, VAR), 4) == 0.1132
    assert round(deflated_sharpe(DAY, 1250, -3, 10, 100, VAR), 4) == 0.9004
    assert round(deflated_sharpe(DAY, 1250, -3, 10, 46, VAR), 4) == 0.9505
    assert round(deflated_sharpe(DAY, 1250, 0, 3, 88, VAR), 4) == 0.9505
    assert round(min_backtest_length(45, 1.0), 2) == 5.0 and min_backtest_length(46) > 5
    assert math.ceil(min_backtest_length(45, exact=True)) == 5


@pytest.mark.parametrize("n", [1, 2, 7, 100, 12345, 1e7])
def test_the_exact_maximum_is_the_integral(n):
    density = lambda x: x * n * stats.norm.pdf(x) * math.exp((n - 1) * stats.norm.logcdf(x))
    assert expected_max(n, exact=True) == pytest.approx(integrate.quad(density, -12, 12, points=[0, 2, 4, 6], limit=400)[0], abs=1e-6)
    assert n == 1 or expected_max(n) == pytest.approx(expected_max(n, exact=True), abs=0.05)


def test_moments_are_those_of_scipy():
    r = np.random.default_rng(2).gamma(2, 0.01, 900) - 0.018
    m = moments(r)
    assert (m.skew, m.kurt) == pytest.approx((stats.skew(r), stats.kurtosis(r, fisher=False)))
    assert m.sharpe == pytest.approx(r.mean() / r.std(ddof=1))


def test_psr_is_as_sure_as_it_says():
    "Of histories with a true Sharpe of 0.05, a tenth has less than 10 % of PSR against it, also when returns are skewed."
    rng = np.random.default_rng(3)
    shares = []
    for draw in (lambda: rng.normal(size=600), lambda: (rng.gamma(4, 1, 600) - 4) / -2):  # the second one is skewed by -1
        found = [psr(m.sharpe, m.n, m.skew, m.kurt, 0.05) for m in (moments(0.05 + draw()) for _ in range(1000))]
        shares.append(np.mean(np.array(found) < 0.1))
    assert shares == pytest.approx([0.1, 0.1], abs=0.03)


def test_pbo_of_noise_is_a_half(noise):
    values = [pbo(r).value for r in noise]
    assert np.mean(values) == pytest.approx(0.5, abs=0.06)
    assert np.std(values) > 0.05  # a single set says little


def test_no_more_noise_passes_than_chance_allows(noise):
    passed = 0
    for r in noise:
        s = sharpes_of(r)
        passed += deflate(r[:, s.argmax()], s).dsr >= 0.95
    assert passed <= stats.binom.ppf(0.99, SETS, 0.05)


def test_without_deflation_nearly_all_of_them_pass(noise):
    assert np.mean([deflate(r[:, sharpes_of(r).argmax()], [0.0]).psr > 0.95 for r in noise]) > 0.95


def test_a_planted_edge_passes(noise):
    for r in noise[:8]:
        r = r.copy()
        r[:, 17] += 0.0025
        s = sharpes_of(r)
        assert s.argmax() == 17 and deflate(r[:, 17], s).dsr > 0.95 and pbo(r).value < 0.01


def test_pbo_counts_as_one_would_by_hand():
    rng = np.random.default_rng(4)
    r = rng.normal(size=(803, 9)) * rng.uniform(0.5, 2, 9)  # blocks of unequal length
    edges, logits = np.linspace(0, 803, 9).astype(int), []
    parts = [np.arange(a, b) for a, b in zip(edges, edges[1:])]
    for way in combinations(range(8), 4):
        rows = np.concatenate([parts[b] for b in way])
        rest = np.setdiff1d(np.arange(803), rows)
        share = stats.rankdata(sharpes_of(r[rest]))[sharpes_of(r[rows]).argmax()] / 10
        logits.append(math.log(share / (1 - share)))
    found = pbo(r, blocks=8)
    np.testing.assert_allclose(found.logits, logits, atol=1e-9)
    assert found.value == np.mean(np.array(logits) <= 0) and len(pbo(r).logits) == 12_870


def test_strategies_that_never_traded_or_are_alike():
    r = np.random.default_rng(5).normal(0, 0.01, (400, 6))
    r[:, 2] = 0
    r[:, 4] = r[:, 3]
    assert 0 <= pbo(r).value <= 1
    alike = np.repeat(r[:, :1], 5, axis=1)
    assert pbo(alike).value == 1.0 and (pbo(alike).logits == 0).all()  # nothing to choose: the middle rank


def test_block_length_of_an_ar1():
    rng, rho, n = np.random.default_rng(6), 0.7, 5000
    found = []
    for _ in range(15):
        x = rng.normal(size=n)
        for i in range(1, n):
            x[i] += rho * x[i - 1]
        found.append(block_length(x))
    assert np.mean(found) == pytest.approx((2 * rho / (1 - rho ** 2)) ** (2 / 3) * n ** (1 / 3), rel=0.2)


def test_bootstrap_intervals_cover_as_often_as_they_say():
    "90 % intervals of the Sharpe of correlated, fat-tailed returns whose true Sharpe is known."
    rng, n, rho, mean = np.random.default_rng(7), 500, 0.3, 0.05
    sd = math.sqrt(5 / 3 / (1 - rho ** 2))  # a Student t with 5 degrees has variance 5/3
    hits = 0
    for seed in range(200):
        e = rng.standard_t(5, n + 50)
        for i in range(1, len(e)):
            e[i] += rho * e[i - 1]
        found = stationary_bootstrap(mean * sd + e[50:], "sharpe", level=0.9, draws=200, seed=seed)
        hits += found.low <= mean <= found.high
    assert hits / 200 == pytest.approx(0.9, abs=0.06)


def test_blind_decisions_are_called_so():
    "Decisions that cluster, returns that overlap: about one test in ten has a p-value below 0.1."
    rng, small = np.random.default_rng(8), 0
    for seed in range(150):
        net = np.convolve(rng.normal(0, 0.01, 1204), np.ones(5), "valid")
        steps = rng.normal(size=1200)
        for i in range(1, 1200):
            steps[i] += 0.9 * steps[i - 1]
        small += permutation_test(steps > 2, net, 5, 100, seed).value <= 0.1
    assert 4 <= small <= 30


@pytest.mark.parametrize(("returns", "reason"), [(np.zeros(200), "no trade"), (np.full(200, 0.001), "no variance"), (np.zeros(0), "0 returns")])
def test_nothing_to_say_is_said(returns, reason):
    d = deflate(returns, [0.1, 0.2])
    assert math.isnan(d.dsr) and math.isnan(d.psr) and reason in d.reason and reason in d.said()
    assert math.isnan(stationary_bootstrap(returns).low)


def test_a_summary_is_json_and_has_its_reason():
    quiet = overfit_summary(np.zeros(500, int), np.full(500, 0.01), 5, np.array([]), draws=10)
    assert math.isnan(quiet["p_value"]) and quiet["trials"] == 1 and "no trade" in quiet["reason"]


def test_wrong_questions():
    for call, said in ((lambda: expected_max(0), "at least the one"), (lambda: min_backtest_length(10, 0), "positive"), (lambda: pbo(np.ones((99, 3)), 5), "even")):
        with pytest.raises(UsageError, match=said):
            call()
