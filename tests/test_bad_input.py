"What a clumsy user gets: one sentence with place and remedy, the right exit code, and a home in which nothing was half-written."
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import zipfile
from pathlib import Path

import pytest

from bnml import cli, runner
from bnml.data.bars import times_of
from bnml.data.synth import synth_bars
from tests.shell import forked

SMALL = {"BNML__MODEL__TREES": "6", "BNML__MODEL__DEPTH": "3", "BNML__MODEL__MODELS": "lgb", "BNML__MODEL__N_SPLITS": "2", "BNML__MODEL__HORIZONS": "5", "BNML__MODEL__JOBS": "1", "BNML__MODEL__THREADS": "1",
         "BNML__DATA__PACE_S": "0"}
RULE = ("--strategy", "rules.crossover")
SPAN = ("--from", "2024-04-10", "--to", "2024-04-12")
BTC = ("--symbols", "BTCUSDT")
REPLAY = ("runner", "--replay", "2024-04-10:2024-04-12", *BTC)


def tree(home: Path) -> dict[str, str]:
    "Content of every file below a home; locks and an empty ledger are no result."
    found = {str(p.relative_to(home)): p for p in home.rglob("*") if p.is_file()} if home.is_dir() else {".": home}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in found.items() if not name.endswith(".lock") and "state/ledger.db" not in name}


def sessions(home: Path) -> int:
    "Sessions that the ledger of a home knows."
    path = home / "data/state/ledger.db"
    if not path.is_file() or path.read_bytes()[:6] != b"SQLite": return 0
    with sqlite3.connect(f"file:{path}?immutable=1", uri=True) as db:
        there = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'sessions'").fetchone()
        return db.execute("SELECT count(*) FROM sessions").fetchone()[0] if there else 0


@pytest.fixture
def told(monkeypatch, capsys):
    "Run a command in a home: (exit code, stdout, stderr); a refusal is one sentence and changes nothing."
    def call(home, *words, code, says=(), env=None, lines=1):
        monkeypatch.setenv("BNML_HOME", str(home))
        for name, value in {**SMALL, **(env or {})}.items(): monkeypatch.setenv(name, value)
        words, before, begun = [str(w) for w in words], tree(home), sessions(home)
        capsys.readouterr()
        got = runner.main(words[1:]) if words[:1] == ["runner"] else cli.main(words)
        out, err = capsys.readouterr()
        assert got == code, f"exit {got}: {out[-500:]}{err[-3000:]}"
        if code:
            assert "Traceback" not in err and err.count("\n") == lines, err
            assert tree(home) == before and sessions(home) == begun, "something was written"
        if "--json" in words and out: json.loads(out)
        for text in (says,) if isinstance(says, str) else says: assert text in err, err
        return out, err
    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A home with two symbols of four months and two versions of a small model."
    home = tmp_path_factory.mktemp("base")
    kept = dict(os.environ)
    try:
        os.environ.update({**SMALL, "BNML_HOME": str(home)})
        assert cli.main(["data", "synth", "--symbols", "BTCUSDT,ETHUSDT", "--from", "2024-01-01", "--to", "2024-05-01", "--json"]) == 0
        for to in ("2024-03-15", "2024-04-01"): assert cli.main(["train", *BTC, "--to", to, "--json"]) == 0
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return home


@pytest.fixture
def home(base, tmp_path):
    "A copy that may be damaged."
    return Path(shutil.copytree(base, tmp_path / "home"))


# --- files to import

BARS = synth_bars("SOLUSDT", "1h", "2024-01-01", "2024-01-03")
HEAD = "open_time,open,high,low,close,volume\n"


def klines(change=lambda rows: rows, n=12) -> bytes:
    "Two days as Binance writes them, changed."
    rows = [[int(t), *v, int(t) + 3_599_999, 1.0, 1, 1.0, 1.0, 0] for t, v in zip(times_of(BARS), BARS.to_numpy().tolist())]
    return ("\n".join(",".join(map(str, r[:n])) for r in change(rows)) + "\n").encode()


def cell(i, j, value):
    def change(rows):
        rows[i][j] = value
        return rows
    return change


def micro(rows): return [[r[0] * 1000, *r[1:6], r[6] * 1000, *r[7:]] if i >= 24 else r for i, r in enumerate(rows)]


def zipped(*members) -> bytes:
    import io
    with zipfile.ZipFile(made := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members: z.writestr(name, data)
    return made.getvalue()


def parquet(frame=None) -> bytes:
    import io
    (BARS.reset_index() if frame is None else frame).to_parquet(made := io.BytesIO())
    return made.getvalue()


def flipped(data: bytes, *at) -> bytes:
    out = bytearray(data)
    for i in at: out[i] ^= 0xFF
    return bytes(out)


FILES = {
    "duplicate": ("SOLUSDT-1h.csv", lambda: klines(lambda r: r[:5] + [r[4]] + r[5:]), (), 65, "row 6 (2024-01-01T04:00:00Z) repeats the time"),
    "unsorted": ("SOLUSDT-1h.csv", lambda: klines(lambda r: r[:4] + [r[5], r[4]] + r[6:]), (), 65, "row 6 (2024-01-01T04:00:00Z) is earlier"),
    "missing column": ("SOLUSDT-1h.csv", lambda: HEAD.replace(",low", "").encode() + klines(n=5), (), 65, "column low is missing"),
    "five columns": ("SOLUSDT-1h.csv", lambda: klines(n=5), (), 65, "5 columns without a header; add one"),
    "nan": ("SOLUSDT-1h.csv", lambda: klines(cell(7, 4, "NaN")), (), 65, "row 8 (2024-01-01T07:00:00Z) has a missing"),
    "infinite": ("SOLUSDT-1h.csv", lambda: klines(cell(7, 4, "inf")), (), 65, "row 8 (2024-01-01T07:00:00Z) has a missing or infinite"),
    "negative": ("SOLUSDT-1h.csv", lambda: klines(cell(3, 3, -1)), (), 65, "row 4 (2024-01-01T03:00:00Z) has a price that is zero or negative"),
    "high < low": ("SOLUSDT-1h.csv", lambda: klines(cell(3, 2, 0.01)), (), 65, "row 4 (2024-01-01T03:00:00Z) has high < low; fetch"),
    "word": ("SOLUSDT-1h.csv", lambda: klines(cell(2, 1, "abc")), (), 65, "row 3 has open 'abc', which is no number; fix"),
    "no such time": ("SOLUSDT-1h.csv", lambda: klines(cell(2, 0, 10**30)), (), 65, "row 3 has the time 1000000"),
    "far time": ("SOLUSDT-1h.csv", lambda: klines(cell(2, 0, 2**63 - 1)), (), 65, "row 3 has the time"),
    "mixed units": ("SOLUSDT-1h.csv", lambda: klines(micro), (), 65, "row 25 has its time in us and the rows before in ms; split"),
    "unfinished": ("SOLUSDT-1h.csv", lambda: klines(lambda r: cell(47, 6, r[47][0] + 60_000)(r)), (), 65, "row 48 is an unfinished bar; drop it"),
    "other interval": ("SOLUSDT-5m.csv", klines, (), 65, "60 minutes after the row before, not 5m; give the interval"),
    "other grid": ("SOLUSDT-1h.csv", klines, ("--interval", "4h"), 65, "does not start on the 4h grid"),
    "no interval": ("SOLUSDT-1h.csv", klines, ("--interval", "1x"), 2, "interval '1x' is not understood; write 1m"),
    "no name": ("candles.csv", klines, (), 2, "name it like BTCUSDT-1h.csv or give --symbol"),
    "bad symbol": ("candles.csv", klines, ("--symbol", "../x", "--interval", "1h"), 2, "'../x' is not a symbol"),
    "empty": ("SOLUSDT-1h.csv", lambda: b"", (), 65, "the file is empty; download"),
    "header only": ("SOLUSDT-1h.csv", lambda: HEAD.encode(), (), 65, "no rows below the header; download"),
    "cut": ("SOLUSDT-1h.csv", lambda: klines()[:-60], (), 65, "columns instead of 12; fix the row"),
    "bytes": ("SOLUSDT-1h.csv", lambda: b"\xff\xfe\0\1", (), 65, "not a text file in UTF-8"),
    "page": ("SOLUSDT-1h.csv", lambda: b"<html><body>404</body></html>", (), 65, "column open_time is missing"),
    "xlsx": ("SOLUSDT-1h.xlsx", klines, (), 2, "use .csv, .csv.gz, .zip or .parquet"),
    "two in a zip": ("SOLUSDT-1h.zip", lambda: zipped(("a.csv", klines()), ("b.csv", klines())), (), 65, "this one holds 2; unpack it"),
    "none in a zip": ("SOLUSDT-1h.zip", zipped, (), 65, "this one holds 0"),
    "cut zip": ("SOLUSDT-1h.zip", lambda: zipped(("a.csv", klines()))[:300], (), 65, "the zip is damaged"),
    "rotten zip": ("SOLUSDT-1h.zip", lambda: flipped(zipped(("a.csv", klines())), 200), (), 65, "the zip is damaged"),
    "bad gzip": ("SOLUSDT-1h.csv.gz", lambda: b"no gzip", (), 65, "the gzip file is damaged"),
    "cut parquet": ("SOLUSDT-1h.parquet", lambda: parquet()[:-40], (), 65, "not a readable Parquet file"),
    "rotten parquet": ("SOLUSDT-1h.parquet", lambda: flipped(parquet(), 100, 300), (), 65, "download or export it again"),
    "no rows": ("SOLUSDT-1h.parquet", lambda: parquet(BARS.reset_index().iloc[:0]), (), 65, "there are no rows in it"),
    "words in parquet": ("SOLUSDT-1h.parquet", lambda: parquet(BARS.reset_index().assign(open="a")), (), 65, "not a readable Parquet file"),
    "other prices": ("BTCUSDT-1h.csv", klines, (), 65, ("BTCUSDT 1h bar 2024-01-01T00:00:00Z has", "the lake has", "--replace")),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_not_candles(what, base, told, tmp_path):
    name, data, flags, code, says = FILES[what]
    (path := tmp_path / name).write_bytes(data())
    says = (says,) if isinstance(says, str) else says
    out, _ = told(base, "data", "import", path, *flags, "--json", code=code, says=(*says, *([] if code == 2 else [name])))
    assert out == ""


def test_one_bad_file_among_good_ones_and_a_missing_one(base, told, tmp_path):
    (good := tmp_path / "SOLUSDT-1h.csv").write_bytes(klines())
    (bad := tmp_path / "XRPUSDT-1h.csv").write_bytes(klines(n=5))
    told(base, "data", "import", good, bad, code=65, says="XRPUSDT-1h.csv: 5 columns")
    told(base, "data", "import", good, tmp_path / "ADAUSDT-1h.csv", code=2, says="there is no file")


# --- symbols, ranges, flags

NONE_THERE = "no symbol is named in ','; write BTCUSDT"
SLIPS = [
    (("backtest", "--symbols", "BTCUSD", *SPAN, *RULE), 65, "the lake has no 1h bars of BTCUSD; did you mean BTCUSDT?"),
    (("backtest", "--symbols", "B!C", *SPAN, *RULE), 2, "'B!C' is not a symbol; write BTCUSDT"),
    (("backtest", "--symbols", ",", *SPAN, *RULE), 2, NONE_THERE),
    (("train", "--symbols", ","), 2, NONE_THERE),
    (("data", "synth", "--symbols", ","), 2, NONE_THERE),
    (("runner", "--symbols", ",", *RULE), 2, "--symbols names nothing; write BTCUSDT"),
    (("models", "rollback", "", "--horizon", "5"), 2, "no symbol is named in ''"),
    (("models", "rollback", "ETHUSDT", "--horizon", "5"), 77, "ETHUSDT horizon 5 has no earlier version"),
    (("backtest", *BTC, "--from", "2024-04-12", "--to", "2024-04-10", *RULE), 2, "is empty; FROM must be before TO"),
    (("backtest", *BTC, "--from", "2024-04-12", "--to", "2024-04-12", *RULE), 2, "is empty; FROM must be before TO"),
    (("backtest", *BTC, "--from", "2030-01-01", "--to", "2030-02-01", *RULE), 65, ("it holds 2024-01-01T00:00:00Z to 2024-05-01", "choose a range within")),
    (("backtest", *BTC, "--from", "2030-01-01", *RULE), 65, "choose a range within"),
    (("backtest", *BTC, "--to", "2010-01-01", *RULE), 65, "bars of BTCUSDT to 2010-01-01T00:00:00Z; it holds"),
    (("backtest", *BTC, "--from", "9999-01-01", *RULE), 65, "choose a range within"),
    (("backtest", *BTC, "--from", "yesterday", *RULE), 2, "'yesterday' is not a time; write 2025-03-01"),
    (("backtest", *BTC, "--from", "2024-13-01", *RULE), 2, "'2024-13-01' is not a time"),
    (("backtest", "--interval", "4h", *SPAN, *RULE), 65, "no 4h bars of any symbol; run `bnml data import`"),
    (("backtest", "--interval", "1x", *RULE), 78, "interval '1x' is not understood"),
    (("train", *BTC, "--to", "2010-01-01"), 65, "choose a range within"),
    (("train", *BTC, "--to", "2024-01-10"), 65, "1000 labelled rows are needed: import more history"),
    (("train", *BTC, "--to", "soon"), 2, "'soon' is not a time"),
    (("train", *BTC, "--horizons", "0"), 78, "horizons must be positive"),
    (("train", "--symbols", "BTCUSD"), 65, "did you mean BTCUSDT?"),
    (("runner", "--replay", "2024", *RULE), 2, "'2024' is not a range; write FROM:TO"),
    (("runner", "--replay", "2024-04-12:2024-04-10", *RULE), 2, "is empty: FROM must be before TO"),
    (("runner", "--replay", "2034-04-10:2034-04-12", *RULE), 65, "choose a range within"),
    (("runner", "--replay", "2024-04-10:2024-04-12", "--symbols", "BTCUSD", *RULE), 65, "did you mean BTCUSDT?"),
    (("runner", "--cycles", "0"), 2, "--cycles is at least 1"),
    (("runner", "--cycles", "x"), 2, "invalid int value: 'x'"),
    (("runner", "--mode", "papr"), 78, "mode 'papr' is unknown; use paper, testnet or live"),
    (("runner", "--speed", "3"), 2, "unrecognized arguments: --speed 3; `python -m bnml.runner --help`"),
    (("data", "synth", "--symbols", "ABCUSDT", "--from", "2024-02-01", "--to", "2024-01-01"), 2, "is empty; FROM must be before TO"),
    (("data", "synth", "--symbols", "ABCUSDT", "--seed", "-3"), 2, "the seed -3 is negative"),
    (("data", "synth", "--symbols", "ABCUSDT", "--from", "1000-01-01"), 65, "starts at 2017-01-01T00:00:00Z"),
    (("data", "check", "--interval", "1x"), 2, "interval '1x' is not understood"),
    (("data", "fetch"), 2, "name what to fetch"),
    (("data", "import"), 2, "missing argument 'files'; `bnml data import --help`"),
    (("data", "quotes"), 2, "missing argument 'files'; `bnml data quotes --help`"),
    (("data", "quotes", "/nowhere/BTCUSDT-book.csv"), 2, "there is no file /nowhere/BTCUSDT-book.csv; check the path"),
    (("frobnicate",), 2, "no such command 'frobnicate'; `bnml --help`"),
    (("backtest", "--speed", "3"), 2, "no such option: --speed; `bnml backtest --help`"),
    (("backtest", "--engine", "warp"), 2, "'warp' is not one of 'replay', 'vector'; `bnml backtest --help`"),
    (("backtest", "--models", "asof"), 2, "'asof' is not one of 'current', 'as-of'"),
    (("report", "nothing"), 2, "no such command 'nothing'; `bnml report --help`"),
    (("report", "backtest", "-p", "speed"), 2, "'speed' is not name=value"),
    (("audit", "leakage", "--symbols", "NOPEUSDT"), 65, "the lake has no 1h bars of NOPEUSDT"),
    (("audit", "risk"), 2, "the ledger has no session yet; run `python -m bnml.runner` first"),
    (("trade", "close"), 2, "name one symbol, or write --all"),
    (("trade", "close", "BTCUSDT"), 2, "BTCUSDT is not held; open positions: none"),
    (("trade", "place", "BTCUSDT", "--quote", "0"), 2, "sizes are above 0"),
    (("status", "--watch", "--json"), 2, "--watch is for people"),
    (("backtest", *SPAN, *BTC, "--strategy", "rules.crosover"), 78, "did you mean rules.crossover?"),
    (("backtest", *SPAN, *BTC, "--strategy", "rules.crossover(fast=50)"), 78, "fast=50 must be below slow=21"),
    (("backtest", *SPAN, *BTC, "--strategy", "rules.crossover(quick=1)"), 78, "unexpected keyword argument 'quick'"),
    (("backtest", *SPAN, *BTC, "--strategy", "nowhere.at_all:Rule"), 78, "is it in this folder or installed?"),
    (("backtest", *SPAN, *BTC, "--strategy", "no.py:Rule"), 78, "there is no file no.py"),
    (("backtest", *SPAN, *BTC, "--strategy", ":Rule"), 78, "write package.module:Class or file.py:Class"),
    (("backtest", *SPAN, *BTC, "--strategy", ".x:Rule"), 78, "write package.module:Class or file.py:Class"),
    (("backtest", "--from", "2024-03-20", "--to", "2024-03-25", *BTC), 77, ("knows prices up to 2024-03-31", "train with `--to 2024-03-20`", "--models as-of")),
    (("backtest", "--from", "2024-03-20", "--to", "2024-03-25", *BTC, "--engine", "vector"), 77, "--models as-of"),
    (("runner", "--replay", "2024-03-20:2024-03-25", *BTC), 77, "knows prices up to 2024-03-31"),
    (("backtest", "--from", "2024-02-20", "--to", "2024-02-25", *BTC, "--models", "as-of"), 77, "whose labels end before 2024-02-20T00:00:00Z: run `bnml train"),
    (("backtest", *SPAN, "--symbols", "ETHUSDT"), 77, "no model for ETHUSDT horizon 5: run `bnml train --symbols ETHUSDT"),
    (("runner", "--replay", "2024-04-10:2024-04-12", "--symbols", "ETHUSDT"), 77, "no model for ETHUSDT horizon 5"),
]


@pytest.mark.parametrize("words, code, says", SLIPS, ids=[" ".join(w)[:70] for w, _, _ in SLIPS])
def test_a_slip_of_the_tongue(words, code, says, base, told):
    told(base, *words, code=code, says=says)


def test_as_of_takes_the_version_that_is_old_enough(home, told):
    out, _ = told(home, "backtest", "--from", "2024-03-20", "--to", "2024-03-22", *BTC, "--models", "as-of", "--json", code=0)
    assert json.loads(out)["run_id"]


# --- settings

YAML = {
    "unknown": ("risk:\n  max_position: 3\n", "unknown setting risk.max_position; did you mean risk.max_positions?"),
    "unknown section": ("risky:\n  max_positions: 3\n", "unknown setting risky; `bnml config show`"),
    "section as value": ("risk: 3\n", "risk is a section, not a value"),
    "range": ("risk:\n  max_positions: -3\n", "risk.max_positions: input should be greater than or equal to 1 (got -3)"),
    "type": ("risk:\n  max_positions: many\n", "risk.max_positions: input should be a valid integer"),
    "nan": ("risk:\n  max_exposure: .nan\n", "risk.max_exposure"),
    "infinite": ("risk:\n  max_spread_bps: .inf\n", "risk.max_spread_bps: input should be a finite number"),
    "reason code": ("risk:\n  disable: [NO_SUCH]\n", "risk.disable: NO_SUCH is not one of"),
    "not a list": ("universe:\n  symbols: BTCUSDT\n", "universe.symbols: input should be a list such as [a, b]"),
    "bad symbol": ("universe:\n  symbols: ['B!C']\n", "'B!C' is not a symbol"),
    "mode": ("mode: papr\n", "mode 'papr' is unknown; use paper"),
    "twice": ("mode: paper\nmode: live\n", "line 2: the key mode stands twice"),
    "brackets": ("risk: [1, 2\nmode: paper\n", "line 2: expected ',' or ']'"),
    "tabs": ("risk:\n\tmax_positions: 3\n", "line 2: found character"),
    "a list": ("- a\n- b\n", "must hold `section: setting: value`, not a list"),
    "code": ("mode: !!python/object/apply:os.system ['true']\n", "line 1: could not determine a constructor"),
    "bytes": (b"\xff\xfe\0\1", "can't be read"),
    "buckets": ("sizing:\n  active: 0.95\n  reserve: 0.5\n", "together they are at most 1"),
    "fee": ("costs:\n  taker: 2\n", "costs.taker: input should be less than 0.1 (got 2)"),
}


@pytest.mark.parametrize("what", YAML)
def test_a_settings_file(what, base, told, tmp_path):
    text, says = YAML[what]
    (path := tmp_path / "bot.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    place = () if what == "buckets" else ("bot.yaml",)
    told(base, "config", "check", "--config", path, "--json", code=78, says=(says, *place))


ENV = {
    "BNML__RISK__MAX_POSITON": ("3", "did you mean risk.max_positions?"),
    "BNML__RISK__MAX_POSITIONS": ("-1", "greater than or equal to 1"),
    "BNML__UNIVERSE__SYMBOLS": ("[BTC", "is not JSON"),
    "MAX_POSITION_PERCENT": ("20", "0.2 means 20 %"),
    "MAX_DRAWDOWN": ("0.05", "5.0 means 5 %"),
    "EXCHANGE": ("kraken", "'binance', 'bybit' or 'okx'"),
    "BINANCE_TESTNET": ("maybe", "write 1 or 0"),
    "BNML_CONFIG": ("/no/such.yaml", "/no/such.yaml does not exist; `bnml config init`"),
}


@pytest.mark.parametrize("name", ENV)
def test_a_variable(name, base, told):
    value, says = ENV[name]
    place = name if name != "BNML_CONFIG" else "settings file"
    told(base, "config", "check", "--json", code=78, says=(says, place), env={name: value})
    told(base, *REPLAY, *RULE, code=78, says=says, env={name: value})


@pytest.mark.parametrize("name", ["MAX_POSITION_PERCENT", "MAX_DRAWDOWN"])
@pytest.mark.parametrize("value", ["abc", "5%", "-1", "nan"])
def test_an_alias_that_is_no_number(name, value, base, told):
    told(base, "config", "check", code=78, says=(f"{name}={value}", "must be"), env={name: value})


@pytest.mark.parametrize("text, says", [(b"BNML__RISK__MAXPOS=3\n", "unknown setting risk.maxpos"), (b"a line\n", "line 1: write NAME=value"),
                                        (b"\xff\xfe", "can't be read")])
def test_a_dotenv(text, says, home, told):
    (home / ".env").write_bytes(text)
    told(home, "config", "check", code=78, says=says)


def test_a_database_that_is_none(home, told):
    (home / "data/state").mkdir(exist_ok=True)
    (home / "data/state/ledger.db").write_bytes(b"this is no database" * 99)
    told(home, *REPLAY, *RULE, code=65, says="the ledger is damaged (file is not a database); move it away")
    for url, says in (("nonsense", "is no address of a database"), ("mysql://a@b/c", "names mysql; the ledger is kept in sqlite or postgresql")):
        told(home, *REPLAY, *RULE, code=78, says=says, env={"BNML__STORAGE__DATABASE_URL": url})
    told(home, *REPLAY, *RULE, code=75, says="does not exist; make it", env={"BNML__STORAGE__DATABASE_URL": "sqlite:////no/dir/x.db"})


# --- strategies

TOP = "from bnml.domain.signal import Strategy, SignalFrame, signals\nclass A(Strategy):\n    name = 'a'\n"
STRATEGIES = {
    "import raises": ("raise ValueError('boom')\n", 78, "line 1: ValueError: boom"),
    "import exits": ("import sys; sys.exit(3)\n", 78, "SystemExit: 3"),
    "syntax": ("class A(:\n", 78, "line 1: invalid syntax"),
    "unknown import": ("import nonexisting_thing\n", 78, "No module named 'nonexisting_thing'"),
    "unknown name": ("from bnml.domain.signal import Stratgy\n", 78, "cannot import name 'Stratgy'"),
    "no strategy": ("class A: pass\n", 78, "derive it from bnml.domain.signal.Strategy"),
    "a number": ("A = 3\n", 78, "'int' object is not callable"),
    "init raises": (TOP + "    def __init__(self): raise RuntimeError('no key')\n", 78, "line 4: RuntimeError: no key"),
    "no frame": (TOP, 78, "has no frame(symbol, bars)"),
    "frame raises": (TOP + "    def frame(self, s, bars): return bars.nothing\n", 78, "has no attribute 'nothing'; mend the strategy"),
    "nothing": (TOP + "    def frame(self, s, bars): return None\n", 78, "bars gave a NoneType; return a SignalFrame"),
    "too short": (TOP + "    def frame(self, s, bars): return signals(s, bars[:5], bars.close[:5] > 0, bars.close[:5] < 0)\n", 78, "gave a SignalFrame of 5 rows"),
    "warm-up": (TOP + "    warmup_bars = 'many'\n    def frame(self, s, bars): return signals(s, bars, bars.close > 0, bars.close < 0)\n", 78, "warmup_bars is 'many'"),
    "peeks": (TOP + "    def frame(self, s, bars): return signals(s, bars, bars.close.shift(-1) > bars.close, bars.close.shift(-1) < bars.close)\n", 77,
              "strategy a is refused by the audit: look-ahead"),
}


@pytest.mark.parametrize("what", STRATEGIES)
def test_a_strategy_of_ones_own(what, base, told, tmp_path):
    text, code, says = STRATEGIES[what]
    (path := tmp_path / "mine.py").write_text(text)
    spec = ("--strategy", f"{path}:A")
    told(base, "backtest", *SPAN, *BTC, *spec, "--json", code=code, says=says)
    told(base, *REPLAY, *spec, "--json", code=code, says=says)
    if what in ("frame raises", "peeks"):
        told(base, "backtest", *SPAN, *BTC, *spec, "--engine", "vector", code=code, says=says)
        told(base, "runner", "--mode", "mock", "--cycles", "1", *BTC, *spec, code=code, says=says)


# --- damage

DAMAGE = {"cut": lambda b: b[:len(b) // 2], "bit": lambda b: flipped(b, len(b) // 2), "empty": lambda b: b"", "junk": lambda b: b"\0\xffjunk",
          "list": lambda b: b"[1, 2]", "gone": None}
LAKE, MODEL = "data/lake/1h/BTCUSDT", "data/models/BTCUSDT/5"


def spoil(path: Path, how: str):
    path.unlink() if DAMAGE[how] is None else path.write_bytes(DAMAGE[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_candles(how, home, told):
    path = next((home / LAKE).glob("*.parquet"))
    spoil(path, how)
    says = ("is damaged", str(home / LAKE), "import or fetch the symbol again")
    told(home, "backtest", *SPAN, *BTC, *RULE, "--json", code=65, says=says)
    told(home, *REPLAY, *RULE, "--json", code=65, says=says)
    if how == "bit":
        told(home, "train", *BTC, "--json", code=65, says=says)
        told(home, "data", "check", "--json", code=65, says=says)
        told(home, "audit", "data", "--json", code=77, says=says)
        told(home, "data", "synth", *BTC, "--from", "2024-01-01", "--to", "2024-05-02", code=65, says=says)


@pytest.mark.parametrize("how", ["cut", "empty", "junk", "list", "folder"])
def test_damaged_manifest(how, home, told):
    path = home / LAKE / "manifest.json"
    if how == "folder":
        path.unlink()
        path.mkdir()
    else: spoil(path, how)
    for words in (("backtest", *SPAN, *BTC, *RULE), ("data", "list"), ("data", "check")): told(home, *words, "--json", code=65, says="manifest.json is damaged (not a manifest)")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["lgb.onnx", "manifest.json"])
def test_damaged_model(name, how, home, told):
    version = (home / MODEL / "current").read_text().split()[0]
    spoil(home / MODEL / "versions" / version / name, how)
    told(home, "backtest", *SPAN, *BTC, "--json", code=65, says=(name, "bnml models rollback"))
    told(home, *REPLAY, "--json", code=65, says=name)
    told(home, "models", "verify", "--json", code=77, says=("1 of 2 models do not pass", name))
    told(home, "backtest", *SPAN, "--json", code=77, says="no symbol has sound models")


def test_damaged_pointer(home, told):
    (home / MODEL / "current").write_bytes(b"\0\xff")
    for words in (("backtest", *SPAN, *BTC), ("models", "list"), ("models", "rollback", "BTCUSDT", "--horizon", "5")): told(home, *words, code=65, says="current can't be read")
    (home / MODEL / "current").unlink()
    told(home, "backtest", *SPAN, *BTC, code=77, says="no model for BTCUSDT horizon 5")


# --- state

@pytest.mark.parametrize("data", [b"\0\xff", b"hello", b"[1]", b"null", b"{}", b'{"engaged": "no"}', b""])
def test_a_kill_switch_that_can_not_be_read_is_engaged(data, home, told):
    (home / "data/state").mkdir(exist_ok=True)
    (path := home / "data/state/kill_switch.json").write_bytes(data)
    out, _ = told(home, "kill-switch", "status", "--json", code=0)
    assert json.loads(out)["engaged"] is True
    _, said = told(home, "runner", "--mode", "live", code=77, says="CLOSED  kill switch released: engaged", lines=10)
    assert said.startswith("mode=live requires env vars: EXCHANGE_API_KEY, EXCHANGE_API_SECRET\n")
    told(home, "kill-switch", "release", code=0)
    assert json.loads(path.read_text())["engaged"] is False


@pytest.mark.parametrize("name", ["status.json", "open_positions.json"])
@pytest.mark.parametrize("data", [b"\0\xff", b"[1]", b"", b'"x"'])
def test_a_status_that_can_not_be_read(name, data, home, told):
    (home / "data/state").mkdir(exist_ok=True)
    (home / "data/state" / name).write_bytes(data)
    for words in (("status",), ("trade", "close", "--all")): told(home, *words, code=65, says=(name, "delete it, the runner writes a new one"))


def test_two_runners(home, told):
    (home / "data/state").mkdir(exist_ok=True)
    with open(home / "data/state/runner.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told(home, *REPLAY, *RULE, "--json", code=75, says=("another runner", str(home), "stop it"))


WRITERS = [("data", "synth", "--symbols", "XRPUSDT", "--from", "2024-01-01", "--to", "2024-12-01"), ("backtest", *SPAN, *BTC, *RULE), (*REPLAY, *RULE),
           ("train", *BTC), ("runner", "--mode", "mock", "--cycles", "1", *BTC, *RULE), ("kill-switch", "engage"), ("config", "init"),
           ("models", "rollback", "BTCUSDT", "--horizon", "5")]


def test_a_home_that_is_a_file(told, tmp_path):
    (path := tmp_path / "home").write_text("in the way")
    for words in (*WRITERS[2:3], *WRITERS[4:], WRITERS[0], ("status",)): told(path, *words, "--json", code=75, says=(str(path), "free the disk or make the folder writable"))
    told(path, "backtest", *SPAN, *BTC, *RULE, code=65, says="the lake has no 1h bars of BTCUSDT")


def test_an_output_that_can_not_be(home, told, tmp_path):
    (path := tmp_path / "file").write_text("in the way")
    for out in (path, path / "deeper", "/proc/nowhere"):
        told(home, "backtest", *SPAN, *BTC, *RULE, "--out", out, "--json", code=75, says="free the disk or make the folder writable")
    assert path.read_text() == "in the way"


@pytest.fixture
def disk(base, tmp_path):
    "A small disk of its own with the home on it; its room can be taken away."
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"mounting a small disk needs root and its capabilities: {done.stderr.strip()}")
    try:
        shutil.copytree(base, place, dirs_exist_ok=True)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("free", [0, 24_576])
def test_a_full_disk(free, disk, told):
    room = os.statvfs(disk)
    with open(disk / "filler", "wb", buffering=0) as f: f.write(b"x" * max(0, room.f_bavail * room.f_frsize - free))
    for words in WRITERS[:5]: told(disk, *words, "--json", code=75, says="free the disk or make")
    if not free:
        for words in WRITERS[5:]: told(disk, *words, "--json", code=75, says="No space left on device; free the disk")


def test_a_read_only_disk(disk, told):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for words in WRITERS: told(disk, *words, "--json", code=75, says=("Read-only file system", "make the folder writable"))
    for words in (("data", "check"), ("models", "list"), ("config", "check")): told(disk, *words, "--json", code=0)


# --- the same through real processes

@pytest.mark.parametrize("module, words, code, says", [
    ("bnml.cli", ("backtest", "--symbols", "BTCUSD", "--json"), 65, "did you mean BTCUSDT?"),
    ("bnml.cli", ("frobnicate",), 2, "no such command 'frobnicate'"),
    ("bnml.runner", ("--replay", "2024-03-20:2024-03-25", "--symbols", "BTCUSDT", "--json"), 77, "knows prices up to"),
])
def test_a_process_says_the_same(module, words, code, says, base):
    got, out, err = forked(words, base, module, SMALL)
    assert (got, out, err.count("\n")) == (code, "", 1) and says in err, err
