"Short stories in which exactly one limit, or one duty of the desk, has something to do."
from copy import copy

from bnml.core.base import Retry

from . import judge
from .world import WIDE, World

A, B, C = "BTCUSDT", "SOLUSDT", "DOGEUSDT"
BUY, WEAK, SELL = (1, 90.0), (1, 40.0), (-1, 80.0)
CALM = dict(leader="", max_price_jump_pct=1000, max_symbol_stops=1000, max_stops=1000, max_orders_per_minute=1000, max_orders_per_hour=1000,
            max_price_gap_pct=100, max_cluster_exposure=1)
FIXED = {"mode": "fixed_fraction", "fixed_fraction": 0.3, "max_position": 0.3, "active": 0.95, "reserve": 0.0, "buffer": 0.02}

ALL = FIXED | {"fixed_fraction": 0.95, "max_position": 0.95, "active": 0.97}
SMALL = FIXED | {"fixed_fraction": 0.01}


def bars(w: World, *rows):
    "Rows of (shape or {symbol: shape}, said)."
    for shapes, said in rows:
        w.bar(shapes if isinstance(shapes, dict) else dict.fromkeys((A, B, C), shapes), said=said)
        judge.every_step(w)


def both(w): bars(w, ("flat", {A: BUY, B: BUY}), ("flat", {}))


def one(w): bars(w, ("flat", {A: BUY}), ("flat", {}))


def again(w):
    "Bought, stopped out, bought once more; another symbol too."
    bars(w, ("flat", {A: BUY}), ("flat", {}), ({A: "gap"}, {}), ("flat", {A: BUY, B: BUY}), ("flat", {}))


def twice(w):
    "Two losses by stops, and a third signal."
    bars(w, ("flat", {A: BUY, B: BUY}), ("flat", {}), ({A: "gap", B: "gap"}, {}), ("flat", {C: BUY}), ("flat", {}))


def recovers(w):
    "All in one position: at a close it is a hair above its stop, then it recovers and is sold; a small entry would risk next to nothing."
    bars(w, *[("flat", {})] * 2, ("flat", {A: BUY}), ("flat", {}), ({A: "brink"}, {}), ({A: "back"}, {A: SELL}), ("flat", {}))
    w.extra["sizing"] = SMALL
    w.restart(*w.profile)
    bars(w, ("flat", {}), ("flat", {B: BUY}), ("flat", {}))


def falls(w):
    "The account falls, and something is to be bought."
    bars(w, ("flat", {A: BUY}), ("flat", {}), ({A: "down"}, {}), ({A: "down"}, {B: BUY}), ("flat", {}))


def held(w):
    "A symbol that is held is proposed again, by a scanner that looks at nothing."
    rank = w.engine.scanner.rank
    w.engine.scanner.rank = lambda row, skip=(), spreads=None: rank(row, (), spreads)
    bars(w, ("flat", {A: BUY}), ("flat", {A: BUY}), ("flat", {}))


def greedy(w):
    "Sizes that leave nothing."
    from bnml.trade import sizing
    old = sizing.stakes
    sizing.stakes = lambda s, equity, *args: {"greedy": 0.6 * equity}
    try: both(w)
    finally: sizing.stakes = old


def leaps(w): bars(w, ("leap", {A: BUY}), ("flat", {}))


def dear(w):
    w.spread = 50.0
    one(w)


def thin(w):
    w.depth = 1000.0
    one(w)


def apart(w):
    w.traded = 0.95
    one(w)


def late(w):
    w.bar({}, said={A: BUY}, late_ms=700_000)
    bars(w, ("flat", {}))


def missed(w):
    "Risk is shown a feed that catches up, and the engine does not look."
    w.engine.sight.feed = copy(w.engine.feed)
    w.engine.sight.feed.late = True
    one(w)


def doubted(w):
    w.engine.risk.doubt = lambda symbol, ms: (float("inf"), "the model is not trusted")
    one(w)


STORM = [({A: s}, {}) for s in ("leap", "gap", "leap", "gap")]


def wild(w): bars(w, *STORM, ("flat", {B: BUY}), ("flat", {}))


def calmed(w): bars(w, *STORM, ("flat", {B: BUY}), *[({A: s}, {}) for s in ("up", "down", "up", "down", "up")], ({A: "down"}, {C: BUY}), ("flat", {}))


def switched(w):
    w.killed = True
    one(w)


def paused(w):
    w.command("pause")
    w.tend_now()
    w.paused = True
    one(w)


def robbed(w):
    "Somebody takes 500 out of the account, and nobody told the ledger."
    real = w.line.balances
    w.line.balances = lambda: {a: x - 500 * (a == "USDT") for a, x in real().items()}
    for ms in (61_000, 2000, 2000, 2000): w.tend(ms)
    one(w)


def forbid(w, symbol: str, why: str):
    "No entry in this symbol may leave."
    real = w.witness
    def witness(intents):
        real(intents)
        for i in intents: assert i.purpose != "ENTRY" or i.symbol != symbol, f"an entry in {symbol} leaves, and {why}"
    w.witness = witness


def catching_up(w):
    "The engine's feed tells missed bars, and risk is not shown it."
    w.engine.sight.feed = copy(w.engine.feed)
    w.engine.feed.late = True
    forbid(w, A, "its bar is old news")
    one(w)


def barred(w):
    w.engine.feed.barred = lambda symbol: "halted by the venue" if symbol == A else ""
    forbid(w, A, "it is halted")
    one(w)


def silent(w):
    "The venue does not say what is free."
    def free(asset): raise Retry("the venue does not answer")
    w.line.free = free
    forbid(w, A, "nobody knows what is free")
    one(w)


def unheld(w):
    "So little that a stop below it would be worth less than an order may be."
    forbid(w, B, "no stop could hold it")
    bars(w, ("flat", {B: BUY}), ("flat", {}))


# code → (story, what is tightened, how the world is)
CHECKS = {
    "NO_QUANTITY": (one, dict(sizing=FIXED | {"mode": "fixed_quote", "fixed_quote": 1.0}), {}),
    "ALREADY_HELD": (held, {}, {}),
    "MAX_POSITIONS": (both, dict(max_positions=1), {}),
    "LOW_CONFIDENCE": (lambda w: bars(w, ("flat", {A: WEAK}), ("flat", {})), dict(min_confidence=60), {}),
    "WIDE_SPREAD": (dear, dict(max_spread_bps=20), {}),
    "BOOK_DEPTH": (thin, {}, dict(live=True)),
    "MAX_EXPOSURE": (both, dict(max_exposure=0.5), {}),
    "MAX_SYMBOL_EXPOSURE": (one, dict(max_symbol_exposure=0.2), {}),
    "MAX_CLUSTER_EXPOSURE": (both, dict(max_cluster_exposure=0.4, correlation_bars=20), dict(twins=True)),
    "LEADER_CORRELATION": (lambda w: bars(w, ("flat", {B: BUY}), ("flat", {})), dict(leader=A, correlation_bars=20), dict(twins=True)),
    "BUCKETS": (greedy, dict(sizing=FIXED | {"active": 0.5, "reserve": 0.3}), {}),
    "NO_CASH": (greedy, dict(disable=("MAX_EXPOSURE", "BUCKETS")), {}),
    "DAILY_LOSS": (one, dict(daily_loss_pct=1), {}),
    "WEEKLY_LOSS": (one, dict(weekly_loss_pct=1), {}),
    "COOLDOWN": (again, dict(cooldown_minutes=600), {}),
    "GLOBAL_COOLDOWN": (again, dict(global_cooldown_minutes=600), {}),
    "MAX_ORDERS_PER_MINUTE": (both, dict(max_orders_per_minute=1), {}),
    "MAX_ORDERS_PER_HOUR": (both, dict(max_orders_per_hour=1), {}),
    "MAX_ORDERS_PER_DAY": (both, dict(max_orders_per_day=1), {}),
    "PRICE_GAP": (apart, dict(max_price_gap_pct=1), dict(live=True)),
    "PRICE_JUMP": (leaps, dict(max_price_jump_pct=5), {}),
    "STALE_DATA": (late, dict(max_data_age_s=600), {}),
    "LATE_DATA": (missed, {}, dict(live=True)),
    "VOLATILITY": (wild, dict(leader=A, correlation_bars=20, volatility_bars=5, volatility_base_bars=20), {}),
    "SYMBOL_STOPS": (again, dict(max_symbol_stops=1), {}),
    "MODEL_DEGRADED": (doubted, {}, {}),
}
HOLDS = {
    "DAILY_LOSS": (recovers, dict(daily_loss_pct=3.82, sizing=ALL), {}),
    "WEEKLY_LOSS": (recovers, dict(weekly_loss_pct=3.82, sizing=ALL), {}),
    "MAX_DRAWDOWN": (falls, dict(max_drawdown_pct=0.6), {}),
    "CONSECUTIVE_LOSSES": (twice, dict(max_consecutive_losses=2), {}),
    "STOPLOSS_GUARD": (twice, dict(max_stops=2), {}),
    "VOLATILITY": (calmed, dict(leader=A, correlation_bars=20, volatility_bars=5, volatility_base_bars=20, volatility_resume=0.05), {}),
    "KILL_SWITCH": (switched, {}, {}),
    "PAUSED": (paused, {}, {}),
    "RECONCILE": (robbed, {}, {}),
}
REFUSALS = {
    "LATE": (catching_up, {}, {}),
    "SYMBOL_STATUS": (barred, {}, {}),
    "BALANCE_UNKNOWN": (silent, {}, {}),
    "NO_PROTECTION": (unheld, dict(sizing=FIXED | {"mode": "fixed_quote", "fixed_quote": 5.15}), {}),
}


def world_of(tightened: dict, how: dict, limits: dict | None = None) -> World:
    "A world with every limit out of the way but one."
    risk = {k: v for k, v in tightened.items() if k != "sizing"}
    known = {k: v for k, v in (CALM | risk).items() if k in _names()}
    return World("wide", "plain", extra={"risk": WIDE | known, "sizing": tightened.get("sizing", FIXED)}, **how)


def _names():
    from bnml.trade.breakers import RiskSettings
    return RiskSettings.model_fields


def found(scene) -> tuple[set, set]:
    "Play it: (what the audit or the judge finds, what risk said)."
    story, tightened, how = scene
    w = world_of(tightened, how)
    try:
        try:
            story(w)
            w.ledger.flush()
            bad = {v.code for v in judge.limits(w)}
        except (AssertionError, Exception) as e: bad = {type(e).__name__}
        said = {r for (x,) in w.rows("select reasons from verdicts") for r in x.split(",") if r}
        return bad, said
    finally: w.done()
