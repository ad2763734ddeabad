"Watching the market without keys: real answers over the wire as JSON lines, a file that a kill leaves whole, and quotes that a backtest can use."
import json
import os
import re
import signal
import time
from collections import Counter
from decimal import Decimal
from urllib.request import urlopen

import pytest

from bnml.core.base import source
from bnml.data.panel import Panel
from bnml.data.quotes import load_quotes
from bnml.data.synth import synth_market
from bnml.domain.market import default_instrument
from bnml.venue.rehearsal import serve
from tests.nursery import start
from tests.shell import here

SYMBOLS = ("BTCUSDT", "ETHUSDT")
WHOLE = Panel.from_frames(synth_market(SYMBOLS, "1m", "2025-03-01", "2025-03-01T01:00", 7), "1m")
LISTED = {s: default_instrument(s, float(WHOLE.close[0, j])) for j, s in enumerate(SYMBOLS)}
LINE = re.compile(r'\{"time":"2025-03-01T00:3\d:\d\d(\.\d{3})?Z","symbol":"(BTC|ETH)USDT","bid":[0-9.]+,"ask":[0-9.]+,"spread_bps":[0-9.]+(,"interval":"1m","close":[0-9.]+)?\}')


@pytest.fixture
def stage():
    with serve(WHOLE, LISTED, {"USDT": Decimal(1000)}, {}, start_ms=int(WHOLE.times[30]) + 1_000, spread_bps=4.0) as it: yield it


def where(url, ws="ws://127.0.0.1:1/ws"): return {"BNML__EXCHANGE__REST_URL": url, "BNML__EXCHANGE__WS_URL": ws, "BNML__EXCHANGE__WS_API_URL": ws + "-api/v3"}


@pytest.fixture
def watch(stage, own_home):
    def call(*words, url=None, symbols="BTCUSDT,ETHUSDT", code=0):
        got, out, err = here(["realtime-paper", "--symbols", symbols, "--every", "0.1", *words], own_home, env=where(url or stage.url))
        assert got == code and "Traceback" not in err, err
        return out.splitlines(), "".join(line for line in err.splitlines(True) if "wrong clock" not in line)  # the rehearsal plays a day long past
    return call


def recorded(home, symbol="BTCUSDT"): return home / "data/realtime" / f"{symbol}-binance-rehearsal.jsonl"


def test_what_the_venue_says_is_told_and_kept(stage, watch, own_home):
    lines, err = watch("--iterations", "3", "--interval", "1m")
    assert len(lines) == 6 and all(LINE.fullmatch(line) for line in lines), lines
    told = [json.loads(line) for line in lines]
    assert [t["symbol"] for t in told] == [*SYMBOLS] * 3 and err == f"6 of 6 quotes kept in {own_home}/data/realtime\n"
    with urlopen(stage.url + "/api/v3/ticker/bookTicker?symbol=ETHUSDT") as a: book = json.load(a)
    assert told[-1]["bid"] == pytest.approx(float(book["bidPrice"]), rel=0.01) and 0 < told[-1]["bid"] < told[-1]["ask"]
    assert all(t["spread_bps"] == pytest.approx((t["ask"] - t["bid"]) / (t["ask"] + t["bid"]) * 2e4, abs=1e-6) for t in told)
    tick = float(LISTED["BTCUSDT"].tick)
    assert told[0]["close"] == pytest.approx(float(WHOLE.close[29, 0]), abs=tick)  # of the minute before the clock's
    asked = Counter(r["request"] for r in stage.books()["requests"])
    assert asked == {"GET /api/v3/time": 1, "GET /api/v3/ticker/bookTicker": 7, "GET /api/v3/klines": 2}, asked  # the last look was ours; closes once a minute; no order, no key
    for s in SYMBOLS: assert recorded(own_home, s).read_text().splitlines() == [line for line in lines if s in line]
    done = json.loads(here(["data", "quotes", str(recorded(own_home)), "--json"], own_home)[1])[0]
    assert (done["symbol"], done["rows"], done["added"]) == ("BTCUSDT", 3, 3)
    assert load_quotes("BTCUSDT").bid.tolist() == [t["bid"] for t in told[::2]]
    watch("--iterations", "1", symbols="BTCUSDT")
    assert json.loads(here(["data", "quotes", str(recorded(own_home)), "--json"], own_home)[1])[0]["added"] == 1


def test_a_killed_run_leaves_whole_lines_and_a_torn_one_is_mended(stage, watch, own_home):
    words = ("-m", "bnml.cli", "realtime-paper", "--symbols", "BTCUSDT", "--every", "0.05", "--iterations", "0")
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 0), (signal.SIGTERM, 0)):
        before = len(recorded(own_home).read_text()) if recorded(own_home).exists() else 0
        loop = start(*words, cwd=source(), env={**os.environ, **where(stage.url), "BNML_HOME": str(own_home)})
        end = time.monotonic() + 30
        while not recorded(own_home).exists() or len(recorded(own_home).read_text()) < before + 400:
            assert loop.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        loop.send_signal(how)
        _, err = loop.communicate(timeout=20)
        assert loop.returncode == code and ("quotes kept in" in err) == (code == 0), err
    text = recorded(own_home).read_text()
    assert text.endswith("\n") and all(LINE.fullmatch(line) for line in text.splitlines())
    with recorded(own_home).open("a") as f: f.write('{"time":"2025-03-01T00:3')  # a machine that lost its power
    (line,), _ = watch("--iterations", "1", symbols="BTCUSDT")
    assert recorded(own_home).read_text() == text + line + "\n"


def test_trouble_is_told_and_the_next_symbol_asked_for(stage, watch):
    stage.fault("server_error", step="market", times=1)
    lines, err = watch("--iterations", "1", "--interval", "1m")
    assert [json.loads(line)["symbol"] for line in lines] == ["ETHUSDT"]
    assert err.startswith("warning: BTCUSDT: ") and "1 of 2 quotes kept" in err and err.count("\n") == 2


def test_a_venue_that_never_answers_is_69(watch, own_home):
    lines, err = watch("--iterations", "2", url="http://127.0.0.1:1", code=69)
    assert not lines and err.count("warning: ") == 4 and "none of 4 questions was answered" in err
    assert not recorded(own_home).exists()


@pytest.mark.parametrize("words, code, said", [
    (("--symbols", "NOPEUSDT"), 65, "NOPEUSDT is not listed at binance; correct its name in --symbols or universe.symbols\n"),
    (("--every", "0.01"), 2, "--every 0.01 is not from 0.08 to 86400 seconds: 2 symbols may take half of the venue's request budget, which trading shares\n"),
    (("--iterations", "-1"), 2, "greater than or equal to 0"),
    (("--interval", "7m"), 2, "'7m' is no interval of binance; it has 1s, 1m"),
])
def test_a_slip_is_one_sentence(watch, words, code, said):
    lines, err = watch(*words, code=code)
    assert not lines and said in err and err.count("\n") == 1, err


def test_without_symbols_there_is_nothing_to_watch(own_home):
    code, out, err = here(["realtime-paper"], own_home)
    assert (code, out, err) == (2, "", "name what to watch: --symbols BTCUSDT,ETHUSDT (or set universe.symbols)\n")
