"Every figure that vectorbt also has is vectorbt's, on the equity curves of real candles."
import math
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bnml.core.base import shared
from bnml.lab.analysis import activity
from bnml.lab.curve_metrics import curve_stats, drawdown_table
from bnml.lab.metrics import bar_returns, compute_metrics, drawdown, monthly_table
from bnml.lab.relative import daily_closes, relative_stats
from bnml.lab.rolling import period_table, rolling_table
from bnml.lab.sensitivity import ANSWERS, break_even, by_vector
from bnml.lab.trade_metrics import trade_details, streaks
from bnml.ml.indicators import ema
from bnml.ml.overfit import deflated_sharpe, moments

SYMBOLS, CASH, WINDOW = ("BTCUSDT", "SOLUSDT", "OMUSDT"), 10_000.0, 720  # OMUSDT lost nine tenths within hours


def same(ours, theirs, what):
    "Equal to 1e-9 of the value."
    assert np.asarray(ours, dtype=float) == pytest.approx(np.asarray(theirs, dtype=float), rel=1e-9, abs=1e-300, nan_ok=True), what


@pytest.fixture(scope="module", params=SYMBOLS)
def made(request):
    "vectorbt's portfolio of a crossover on real candles, with costs, and its curve, trades and yardstick as we take them."
    folder = shared() and shared() / "data" / "binance"
    if not (folder and folder.is_dir()): pytest.skip("real candles are not here: ../shared/data/binance is missing")
    import vectorbt as vbt
    from vectorbt.portfolio import dispatch
    bars = pd.read_parquet(folder / f"{request.param}-1h.parquet").set_index("open_time").tz_localize(None)
    close = bars.close.to_numpy()
    above = ema(close, 20) > ema(close, 80)
    up = pd.Series(above & ~np.append(False, above[:-1]), index=bars.index)
    pf = vbt.Portfolio.from_signals(bars.close, up, ~pd.Series(above, index=bars.index), fees=0.001, slippage=0.0005, init_cash=CASH, freq="1h")
    times = bars.index.as_unit("ms").asi8
    closed = pf.trades.closed.records
    trades = pd.DataFrame(dict(symbol=request.param, side="BUY", quantity=closed["size"], entry_time_ms=times[closed.entry_idx], entry_price=closed.entry_price,
                               exit_time_ms=times[closed.exit_idx], exit_price=closed.exit_price, exit_reason="SIGNAL", fees=closed.entry_fees + closed.exit_fees,
                               pnl=closed.pnl, position_id=""))
    exposure = pf.gross_exposure().to_numpy()
    won, lost = (f(pf.trades.closed.values, engine="rust") for f in (dispatch.trade_winning_streak, dispatch.trade_losing_streak))  # closed.winning_streak, uncompiled
    return dict(won=won, lost=lost, pf=pf, acc=pf.get_returns_acc(), equity=pf.value().to_numpy(), times=times, trades=trades, hold=CASH * close / close[0], exposure=exposure)


def test_the_headline(made):
    pf, acc = made["pf"], made["acc"]
    m = compute_metrics(made["equity"], made["times"], made["trades"], "1h", start_equity=CASH, benchmark_equity=made["hold"], exposure=made["exposure"])
    closed = pf.trades.closed
    assert m["trades"] == closed.count() > 50
    same([m[k] for k in ("total_return", "cagr", "volatility", "sharpe", "sortino", "calmar", "max_drawdown", "benchmark_return", "equity_end")],
         [pf.total_return(), acc.annualized(), acc.annualized_volatility(), acc.sharpe_ratio(), acc.sortino_ratio(), acc.calmar_ratio(), -acc.max_drawdown(),
          acc.benchmark_rets.vbt.returns.total(), pf.final_value()], "curve")
    same([m[k] for k in ("win_rate", "profit_factor", "avg_trade", "avg_win", "avg_loss", "best_trade", "worst_trade", "avg_trade_return", "avg_bars_held", "max_consecutive_losses")],
         [closed.win_rate(), closed.profit_factor(), closed.expectancy(), *(x.values.mean() for x in (closed.winning.pnl, closed.losing.pnl)),
          closed.pnl.values.max(), closed.pnl.values.min(), closed.returns.values.mean(), closed.duration.values.mean(), made["lost"].max()], "trades")
    same(m["fees"], (closed.records.entry_fees + closed.records.exit_fees).sum(), "fees")
    same(m["exposure"], pf.gross_exposure().mean(), "exposure")
    at_work = activity(made["exposure"], math.nan, 8760)
    same([at_work["time_in_market"], at_work["max_exposure"]], [pf.position_coverage(), pf.gross_exposure().max()], "at work")


def test_the_curve(made):
    acc, falls = made["acc"], made["pf"].drawdowns
    m = curve_stats(made["equity"], "1h", CASH)
    same([m[k] for k in ("omega", "downside_risk", "value_at_risk", "cond_value_at_risk", "tail_ratio", "common_sense_ratio", "ulcer_index", "martin_ratio", "skew", "kurtosis")],
         [acc.omega_ratio(), acc.downside_risk(), acc.value_at_risk(), acc.cond_value_at_risk(), acc.tail_ratio(), acc.common_sense_ratio(), acc.ulcer_index(),
          acc.martin_ratio(), acc.obj.skew(), acc.obj.kurtosis()], "curve")
    same([m["best_bar"], m["worst_bar"]], [acc.max(), acc.min()], "extremes")
    assert m["drawdowns"] == falls.count()
    same([m["avg_drawdown"], m["max_drawdown_bars"], m["avg_drawdown_bars"]], [-falls.drawdown.values.mean(), falls.duration.values.max(), falls.duration.values.mean()], "under water")
    open_ = falls.active.records  # active_drawdown, uncompiled
    same([m["current_drawdown"], m["current_drawdown_bars"]], [(1 - open_.end_val / open_.peak_val).sum(), falls.active.duration.values.sum()], "now")
    same(drawdown(made["equity"], CASH), acc.drawdown(), "drawdown of every bar")
    t = drawdown_table(made["equity"], made["times"], CASH).sort_values("end_ms")
    theirs = falls.records.sort_values("end_idx")
    same(t[["peak_ms", "valley_ms", "end_ms"]].to_numpy(), made["times"][theirs[["peak_idx", "valley_idx", "end_idx"]].to_numpy()], "moments")
    same(t.depth, 1 - theirs.valley_val / theirs.peak_val, "depths")
    same(t.bars_down, falls.decline_duration.values[theirs.index], "bars down")
    same([m["under_water"], t.recovered.sum()], [falls.coverage(), falls.recovered.count()], "coverage")


def test_the_trades(made):
    closed = made["pf"].trades.closed
    d = trade_details(made["trades"], "1h")
    same([d[k] for k in ("expectancy", "sqn", "best_trade_return", "worst_trade_return", "avg_win_return", "avg_loss_return", "avg_bars_won", "avg_bars_lost", "max_consecutive_wins")],
         [closed.expectancy(), closed.sqn(), closed.returns.values.max(), closed.returns.values.min(),
          *(x.values.mean() for x in (closed.winning.returns, closed.losing.returns, closed.winning.duration, closed.losing.duration)), made["won"].max()], "trades")
    run = streaks(made["trades"].pnl.to_numpy())
    same(np.maximum(run, 0), made["won"], "wins in a row")
    same(np.maximum(-run, 0), made["lost"], "losses in a row")


def test_beside_a_yardstick(made):
    acc = made["acc"]
    m = relative_stats(made["equity"], made["hold"], "1h", CASH)
    same([m[k] for k in ("alpha", "beta", "information_ratio", "capture")], [acc.alpha(), acc.beta(), acc.information_ratio(), acc.capture()], "hours")
    days, equity, hold = daily_closes(made["times"], made["equity"], made["hold"])
    index = pd.to_datetime(days, unit="ms")
    rets = lambda x: pd.Series(bar_returns(x, CASH), index=index)
    theirs, m = rets(equity).vbt.returns(benchmark_rets=rets(hold), freq="1D"), relative_stats(equity, hold, "1d", CASH)
    same([m[k] for k in ("alpha", "beta", "information_ratio", "capture", "up_capture", "down_capture")],
         [theirs.alpha(), theirs.beta(), theirs.information_ratio(), theirs.capture(), theirs.up_capture(), theirs.down_capture()], "days")
    same(1 + rets(equity), 1 + acc.daily(), "daily growth")


def test_moving_windows(made):
    acc, fast = made["acc"], dict(window=WINDOW, engine="rust")
    t = rolling_table(made["equity"], made["times"], WINDOW, "1h", CASH, made["hold"])
    theirs = dict(total_return=acc.rolling_total(**fast), volatility=acc.rolling_annualized_volatility(**fast), sharpe=acc.rolling_sharpe_ratio(**fast),
                  sortino=acc.rolling_sortino_ratio(**fast), max_drawdown=-acc.rolling_max_drawdown(**fast), beta=acc.rolling_beta(**fast))
    for name, curve in theirs.items():
        curve = curve.iloc[WINDOW - 1:].to_numpy().copy()
        curve[~np.isfinite(curve) | np.isnan(t[name].to_numpy())] = math.nan  # where vectorbt divides by nothing we have no answer
        off = np.abs(t[name].to_numpy() - curve) / np.maximum(np.abs(curve), 1e-6 * np.nanmax(np.abs(curve)))
        assert np.nanmax(off) < 1e-9 and np.isnan(curve).mean() < 0.2, (name, np.nanmax(off))


def test_months(made):
    acc = made["acc"]
    theirs = 1 + acc.resample_total_return("MS").to_numpy()
    same(period_table(made["equity"], made["times"], "month", CASH).account + 1, theirs, "months as rows")
    same(monthly_table(made["equity"], made["times"], CASH)[list(range(1, 13))].stack().dropna() + 1, theirs, "months as a calendar")


def test_the_deflated_sharpe(made):
    import vectorbt as vbt
    r = bar_returns(made["equity"], CASH)
    m = moments(r)
    theirs = vbt.returns.metrics.deflated_sharpe_ratio(est_sharpe=m.sharpe, var_sharpe=1e-4, nb_trials=50, backtest_horizon=len(r), skew=m.skew, kurtosis=m.kurt)
    same(deflated_sharpe(m.sharpe, len(r), m.skew, m.kurt, 50, 1e-4), theirs, "DSR")


def test_what_the_start_is_worth():
    "The one difference: a loss inside the first bar is under water for us, and forgotten by vectorbt."
    assert curve_stats([90.0, 95.0], "1d", start_equity=100.0)["ulcer_index"] == pytest.approx(math.sqrt((0.1**2 + 0.05**2) / 2))


# ---- what costs do to a result, on real candles ----

@pytest.fixture(scope="module")
def asked():
    "A crossover on a year of ETHUSDT that earns something before costs, and the settings it runs under."
    from bnml.data.panel import Panel
    from bnml.trade.exits import ExitSettings
    from bnml.trade.rules import Crossover
    from bnml.trade.sizing import SizingSettings
    folder = shared() and shared() / "data" / "binance"
    if not (folder and folder.is_dir()): pytest.skip("real candles are not here: ../shared/data/binance is missing")
    bars = pd.read_parquet(folder / "ETHUSDT-1h.parquet").set_index("open_time")
    settings = SimpleNamespace(sizing=SizingSettings(mode="fixed_quote", fixed_quote=1_000.0), exits=ExitSettings(), account=SimpleNamespace(quote="USDT", start_balance=Decimal(10_000)),
                               costs=SimpleNamespace(maker=0.001, taker=0.001, fee_asset="quote", slippage_bps=2.0, latency_ms=250, participation=None))
    return Crossover(9, 21), Panel.from_frames({"ETHUSDT": bars}, "1h"), settings


def test_todays_costs_are_the_backtest_itself(asked):
    from bnml.lab.backtest import vector
    strategy, panel, settings = asked
    run, plain = by_vector(strategy, panel, settings, 500, audit=False), vector(strategy, panel, settings, 500, audit=False).metrics
    assert {k: run(0.001, 2.0)[k] for k in ANSWERS} == {k: plain[k] for k in ANSWERS}


def test_the_break_even_fee_is_gain_over_traded_value(asked):
    "With fixed sizes a fee takes its share of what is traded, so the crossing is known in closed form."
    strategy, panel, settings = asked
    run = by_vector(strategy, panel, settings, 500, audit=False)
    for slippage in (0.0, 2.0):
        free, paid = run(0.0, slippage), run(0.001, slippage)
        found = break_even(run, slippage_bps=slippage)
        assert found.engine == "vector" and not found.why
        assert found.fee == pytest.approx(free["total_return"] * 10_000 / (paid["fees"] / 0.001), abs=1e-6)
        assert run(found.fee - 1e-6, slippage)["total_return"] > 0 > run(found.fee + 1e-6, slippage)["total_return"]
