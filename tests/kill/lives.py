"Runner after runner on one ledger and one venue: start, compare, let the market go, kill."
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path

from bnml.core.base import source

from .judge import Books, bare, differences, given_up
from .stage import KEYS, SYMBOLS, Market, stage

SESSION = "live-binance-rehearsal"
LOCKS = {"PAPER_ONLY": "0", "ALLOW_LIVE": "1", **KEYS}
LOOSE = {"max_positions": 3, "max_exposure": 1.0, "max_symbol_exposure": 1.0, "max_cluster_exposure": 1.0, "leader": "", "max_leader_correlation": 1.0,
         "max_spread_bps": 1000.0, "max_depth_share": 1.0, "depth_bps": 1000.0, "max_quote_age_s": 1e6, "max_data_age_s": 1e6, "max_price_gap_pct": 50.0,
         "max_price_jump_pct": 1000.0, "max_volatility_ratio": 1e6, "daily_loss_pct": 100.0, "weekly_loss_pct": 100.0, "max_drawdown_pct": 100.0,
         "max_consecutive_losses": 10**6, "max_stops": 10**6, "max_symbol_stops": 10**6, "cooldown_minutes": 0.0, "max_orders_per_minute": 10**6,
         "max_orders_per_hour": 10**6, "max_orders_per_day": 10**6}  # a rough test must not end because a limit did its work
AGREED_S, PROTECTED_S, READY_S = 8.0, 5.0, 60.0
PROMPT_S = 2.0  # after a start a position is covered at once, unless the order that covers it is in doubt


def settings(venue, url: str | None) -> dict:
    "A busy live runner at the rehearsal."
    own = {"rest_url": venue.url, "ws_url": venue.ws_url, "ws_api_url": venue.ws_api_url, "testnet": False}
    return {"mode": "live", "strategy": "tests.kill.churn:Churn", "exchange": own, "universe": {"symbols": list(SYMBOLS)}, "storage": {"database_url": url},
            "data": {"interval": "1m", "history_bars": 60, "grace_s": 0.05}, "risk": LOOSE, "sizing": {"mode": "fixed_fraction", "fixed_fraction": 0.05},
            "exits": {"stop_atr": 2.0, "trail_after_atr": 0.2, "trail_atr": 1.0, "trail_step_atr": 0.05, "targets": [[0.8, 0.4], [1.6, 0.3], [4.0, 1.0]]}}


def busy() -> float:
    "How many want each processor: the clock on the wall tells little where others run."
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def in_doubt(rows: dict) -> bool:
    "Is a sale, or a stop, one of which nobody knows whether it arrived?"
    sales = {i["client_id"] for i in rows.get("intents", ()) if i["purpose"] != "ENTRY"}
    return any(o["status"] == "UNKNOWN" and o["client_id"] in sales for o in rows.get("orders", ()))


class Nursery:
    "Forks runners from a process that is warm."
    def __init__(self, folder: Path):
        env = {k: v for k, v in os.environ.items() if not k.startswith("BNML__")} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source())}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.kill.child", "--nursery"], cwd=source(), env=env, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=(folder / "nursery.txt").open("w"), bufsize=1)
        self.told, self.ends = queue.Queue(), {}
        assert self.process.stdout.readline() == "warm\n", (folder / "nursery.txt").read_text()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            word = json.loads(line)
            if "born" in word: self.told.put(word["born"])
            else: self.ends[word["ended"]] = word["code"]

    def bear(self, order: dict) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        return self.told.get(timeout=30)

    def close(self):
        "End it, and whatever it has born."
        self.process.stdin.close()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        self.process.wait()


@dataclass
class Found:
    "What a suite saw."
    database: str
    seed: int
    kills: int = 0
    moments: dict = field(default_factory=dict)  # kind or step → kills
    orders: int = 0
    fills: int = 0
    bars: int = 0
    duplicates: int = 0
    orphans: int = 0
    lost_fills: int = 0
    unprotected: int = 0  # restarts after which a position stood bare for too long
    ledger_differences: int = 0
    other: int = 0  # a runner that did not start or ended by itself
    worst_protection_s: float = 0.0
    worst_agreement_s: float = 0.0
    ready_s: float = 0.0
    seconds: float = 0.0
    problems: list = field(default_factory=list)

    @property
    def good(self) -> bool: return not self.problems

    def add(self, where: str, what: list[str]):
        "Count differences by what they are."
        for w in what:
            kind = {"duplicate": "duplicates", "orphan": "orphans", "lost fill": "lost_fills", "invented fill": "duplicates", "bare": "unprotected", "died": "other"}.get(w.split(":")[0], "ledger_differences")
            setattr(self, kind, getattr(self, kind) + 1)
            self.problems.append(f"{where}: {w}")

    def told(self) -> dict: return asdict(self) | {"good": self.good}


class Life:
    "One runner process."
    def __init__(self, scene: "Scene", plan: dict | None = None):
        self.scene, n = scene, len(list(scene.home.glob("err-*")))
        self.err = scene.home / f"err-{n:04d}"
        order = {"env": {"BNML_HOME": str(scene.home), "PYTHONPATH": str(source()), **LOCKS}, "out": str(scene.home / "out"), "err": str(self.err), "plan": plan or {},
                 "argv": ["--mode", "live", "--json"]}
        if scene.broken: order["plan"] = {**order["plan"], "broken": scene.broken}
        self.pid, self.began = scene.nursery.bear(order), time.monotonic()

    @property
    def code(self) -> int | None: return self.scene.nursery.ends.get(self.pid)

    @property
    def ready(self) -> bool:
        try: told = json.loads((self.scene.home / "data/state/status.json").read_text())
        except (OSError, ValueError): return False
        return told.get("pid") == self.pid

    def kill(self):
        try: os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.gone()

    def gone(self, seconds: float = 10.0) -> bool:
        "Wait for its end."
        end = time.monotonic() + seconds
        while self.code is None and time.monotonic() < end: time.sleep(0.005)
        return self.code is not None

    def wait_ready(self, until: float) -> bool:
        "Ready before a moment?"
        while not self.ready and self.code is None and time.monotonic() < until: time.sleep(0.01)
        return self.ready and self.code is None

    def last_words(self) -> str:
        lines = self.err.read_text().strip().splitlines() if self.err.exists() else []
        return " | ".join(lines[-6:])[-900:]


class Scene:
    "A venue, a ledger, and the runners that live there one after the other."
    def __init__(self, venue, nursery: Nursery, home: Path, url: str | None, rng: random.Random, found: Found, broken: str = ""):
        self.venue, self.nursery, self.home, self.rng, self.found, self.broken = venue, nursery, home, rng, found, broken
        home.mkdir(parents=True, exist_ok=True)
        self.settings = settings(venue, url)
        (home / "bot.yaml").write_text(json.dumps(self.settings))
        self.books = Books(url or f"sqlite:///{home}/data/state/ledger.db", SESSION)
        self.market = Market(venue, random.Random(rng.random()))
        self.market.start()
        self.namespace, self.life, self.sold = None, None, set()

    def look(self) -> tuple[dict, dict]:
        "The venue's books and the ledger."
        self.venue.street.log.clear()  # of requests: not asked for here
        while True:
            before = self.venue.books()
            rows = self.books.read() if self.books.engine.dialect.name == "postgresql" or (self.home / "data/state/ledger.db").exists() else {}
            return before, rows

    def start(self, plan: dict | None = None) -> Life:
        self.life = Life(self, plan)
        return self.life

    def compare(self, where: str, until: float = float("inf")) -> bool:
        "Wait until a ready runner's ledger and the venue's books agree; False when the moment came first."
        ready, agreed, covered, gaps, open_, doubted, rows = time.monotonic(), None, None, [], {}, False, {}
        while (now := time.monotonic()) - ready < AGREED_S and (agreed is None or covered is None):
            if now > until: return False
            if self.life.code is not None:
                self.found.add(where, [f"died: exit code {self.life.code}: {self.life.last_words()}"])
                return True
            books, rows = self.look()
            gaps, open_ = differences(books, rows, self.namespace), bare(books)
            spent = time.monotonic() - ready
            agreed = spent if not gaps and agreed is None else agreed if not gaps else None
            covered = spent if not open_ and covered is None else covered if not open_ else None
            doubted |= bool(open_) and in_doubt(rows)
            if agreed is None or covered is None: time.sleep(0.05)
        f = self.found
        f.worst_agreement_s, f.worst_protection_s = max(f.worst_agreement_s, agreed or spent), max(f.worst_protection_s, covered or spent)
        limit = PROTECTED_S if doubted else min(PROTECTED_S, PROMPT_S * busy())
        if open_ or (covered or 0) > limit: f.add(where, [f"bare: {s} {q}" for s, q in (open_ or {"for": f"{covered:.1f} s"}).items()])
        if gaps: f.add(where, gaps)
        late = given_up(rows) - self.sold
        self.sold |= late
        f.add(where, [f"bare: {cid} had to be sold, for nothing protected it" for cid in sorted(late)])
        return True

    def killed(self, kind: str):
        self.found.kills += 1
        self.found.moments[kind] = self.found.moments.get(kind, 0) + 1

    def count(self):
        "Figures of the whole."
        books, _ = self.look()
        self.found.orders += len(books["orders"])
        self.found.fills += len(books["trades"])
        self.found.bars += self.market.bars

    def close(self):
        self.market.end()
        if self.life is not None and self.life.code is None: self.life.kill()
        self.books.engine.dispose()


def readied(scene: Scene, where: str) -> bool:
    "Start a runner and have it ready; notes the problem otherwise."
    life = scene.start()
    if life.wait_ready(time.monotonic() + READY_S):
        scene.found.ready_s = max(scene.found.ready_s, round(time.monotonic() - life.began, 2))
        return True
    scene.found.add(where, [f"died: not ready, exit code {life.code}: {life.last_words()}"])
    life.kill()
    return False


def random_kill(scene: Scene, n: int) -> bool:
    "One life from start to kill; False when the runner can't live."
    rng, where = scene.rng, f"seed {scene.found.seed}, kill {n}"
    kind = rng.choices(("start", "bar", "any"), (0.25, 0.5, 0.25))[0]
    life = scene.start()
    moment = life.began + rng.uniform(0.02, 1.5) if kind == "start" else float("inf")
    if not life.wait_ready(min(moment, life.began + READY_S)) and time.monotonic() < moment:
        scene.found.add(where, [f"died: not ready, exit code {life.code}: {life.last_words()}"])
        life.kill()
        return False
    if life.ready: scene.found.ready_s = max(scene.found.ready_s, round(time.monotonic() - life.began, 2))
    alive = scene.compare(where, moment) if life.ready and life.code is None else False
    scene.market.let(True)
    if alive and kind == "bar":
        for _ in range(rng.randint(1, 4)):
            scene.market.jumped.clear()
            scene.market.jumped.wait(20)
        time.sleep(rng.uniform(0.0, 0.3))
    elif alive: time.sleep(rng.uniform(0.0, 1.5) if kind == "any" else max(0.0, moment - time.monotonic()))
    if alive and rng.random() < 0.25:  # at rest in the middle of a life, too
        scene.market.let(False)
        time.sleep(rng.uniform(0.0, 0.3))
        scene.compare(where + ", before")
        scene.market.let(True)
    if life.code is not None: scene.found.add(where, [f"died: exit code {life.code}: {life.last_words()}"])
    life.kill()
    scene.killed(kind)
    if rng.random() < 0.5: time.sleep(rng.uniform(0.0, 0.5))  # the market goes on without us
    scene.market.let(False)
    return True


def named_kill(scene: Scene, step: str, n: int, patience_s: float = 60.0) -> bool:
    "A runner that dies at the n-th passage of a step, and the one that comes after it."
    where = f"seed {scene.found.seed}, {step} ({n})"
    life = scene.start({"step": step, "n": n})
    scene.market.let(True)
    if step == "after partial fill":
        for s in SYMBOLS: scene.venue.fault("partial_fill", symbol=s, times=3, fraction="0.4")
    died = life.gone(patience_s)
    scene.market.let(False)
    if not died or life.code != -signal.SIGKILL:
        scene.found.add(where, [f"died: it was not reached ({life.code}): {life.last_words()}"])
        life.kill()
    else: scene.killed(step)
    if not readied(scene, where): return False
    scene.compare(where)
    scene.life.kill()
    return True


@contextmanager
def scene(seed: int, folder: Path, nursery: Nursery, url: str | None, found: Found, broken: str = ""):
    "A stage and its scene, with the client ids' namespace known."
    with stage(seed) as venue:
        it = Scene(venue, nursery, folder, url, random.Random(seed), found, broken)
        it.namespace = namespace_of(it.settings)
        try:
            yield it
            it.count()
        finally:
            it.close()


def namespace_of(raw: dict) -> str | None:
    "What the client ids of these settings are made from."
    from bnml.ops.settings import Settings
    from bnml.trade.assembly import namespace

    from .churn import Churn
    return namespace(Churn(), Settings.model_validate(raw))


def secrets_in(folder: Path) -> list[str]:
    "Files that hold a secret."
    words = [w.encode() for w in KEYS.values()]
    return [str(p) for p in folder.rglob("*") if p.is_file() and any(w in p.read_bytes() for w in words)]
