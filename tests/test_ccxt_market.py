"`venue.ccxt` over real HTTP against a server on this machine that answers with Binance's own recorded bodies."
import gzip
import json
import threading
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from bnml.core.base import Retry, Skip, Unreachable, shared
from bnml.data.history import fetch
from bnml.data.lake import Lake
from bnml.venue.ccxt import Banned, CcxtVenue
from bnml.venue.ports import MarketData

HOUR = 3_600_000
SAMPLES = shared() / "data/api_samples" if shared() else None
needs_samples = pytest.mark.skipif(SAMPLES is None, reason="no recorded venue answers beside this checkout")


class Street(ThreadingHTTPServer):
    "Answers by path; remembers what was asked."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = {}, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        path, query = urlparse(self.path).path, {k: v[0] for k, v in parse_qs(urlparse(self.path).query).items()}
        self.server.asked.append((path, query))
        status, body = self.server.answers[path](query)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def street():
    server = Street()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def venue(street): return CcxtVenue(rest_url=street.url, gap_s=0, timeout_s=5)


def klines(n, start=0):
    "The shape of GET /api/v3/klines."
    def answer(query):
        first, count = int(query["startTime"]), int(query["limit"])
        times = [t for t in range(start, start + n * HOUR, HOUR) if t >= first][:count]
        return 200, [[t, "100.00000000", "101.00000000", "99.00000000", "100.50000000", "12.30000000", t + HOUR - 1, "1236.15000000", 9, "6.1", "613.05", "0"] for t in times]
    return answer


def test_is_market_data(venue): assert isinstance(venue, MarketData)


def test_every_address_is_the_given_server(venue, street):
    client = venue._client
    assert client.urls["api"] and all(u.startswith(street.url) for u in client.urls["api"].values())
    assert not {"test", "demo"} & set(client.urls)


def test_history_arrives_page_by_page_in_the_lake(venue, street, tmp_path):
    street.answers = {"/api/v3/klines": klines(2300), "/api/v3/time": lambda q: (200, {"serverTime": 2299 * HOUR + 5})}
    lake = Lake(tmp_path / "lake")
    results = fetch(venue, ["BTCUSDT", "ETHUSDT"], "1h", 0, None, lake)
    assert [(r.symbol, r.added, r.missing) for r in results] == [("BTCUSDT", 2299, 0), ("ETHUSDT", 2299, 0)]  # the forming bar stays out
    pages = sorted(int(q["startTime"]) for p, q in street.asked if p.endswith("klines") and q["symbol"] == "BTCUSDT")
    assert pages == [0, 1000 * HOUR, 2000 * HOUR]


@needs_samples
def test_recorded_klines_quote_and_time(venue, street):
    def body(name): return json.loads((SAMPLES / f"nautilus/http_json/{name}_response.json").read_text())
    street.answers = {"/api/v3/klines": lambda q: (200, body("klines")), "/api/v3/ticker/bookTicker": lambda q: (200, body("book_ticker")),
                      "/api/v3/time": lambda q: (200, body("server_time"))}
    (bar,) = venue.bars("LTCBTC", "1w", 0)
    assert (bar.open_time_ms, bar.open, bar.high, bar.low, bar.close, bar.volume) == (1499040000000, 0.0163479, 0.8, 0.015758, 0.015771, 148976.11427815)
    quote = venue.quote("LTC/BTC")
    assert (quote.bid, quote.ask, quote.bid_qty, quote.ask_qty) == (4.0, 4.000002, 431.0, 9.0)
    assert venue.server_time_ms() == 1499827319559


@needs_samples
@pytest.mark.parametrize("name, count", [("exchangeInfo-full-2021-10-12.json.gz", 1695), ("exchangeInfo-full-2023-04-10.json.gz", 2183),
                                         ("exchangeInfo-TSLABUSDT-2026-09-26.json", 1)])
def test_recorded_instruments(venue, street, name, count):
    raw = (SAMPLES / name).read_bytes()
    street.answers = {"/api/v3/exchangeInfo": lambda q: (200, gzip.decompress(raw) if name.endswith("gz") else raw)}
    found = venue.instruments()
    assert len(found) == count
    if "ETHBTC" in found: assert (found["ETHBTC"].step, found["ETHBTC"].min_notional) == (Decimal("0.0001"), Decimal("0.0001"))


@needs_samples
def test_recorded_errors_say_what_to_do(venue, street):
    errors = {(e["http_status"], json.dumps(e["body"])[:30]): e for e in json.loads((SAMPLES / "errors-observed.json").read_text())}
    by_status = {e["http_status"]: e for e in errors.values()}
    unknown = next(e for e in errors.values() if isinstance(e["body"], dict) and e["body"]["code"] == -1121)
    for entry, kind in ((unknown, Skip), (by_status[403], Unreachable), (by_status[429], Retry)):  # after a 429 nobody asks for a while
        body = entry["body"].encode() if isinstance(entry["body"], str) else entry["body"]
        street.answers = {"/api/v3/klines": lambda q: (entry["http_status"], body)}
        with pytest.raises(kind): venue.bars("BTCUSDT", "1h", 0)


def test_a_ban_is_kept_without_asking_again(venue, street):
    street.answers = {"/api/v3/time": lambda q: (418, {"code": -1003, "msg": "Way too much request weight used; IP banned until 4070908800000."})}
    with pytest.raises(Banned, match="2099-01-01T00:00:00Z"): venue.server_time_ms()
    with pytest.raises(Banned): venue.server_time_ms()
    assert len(street.asked) == 1


@pytest.mark.parametrize("body", [b"", b'[[1499040000000, "0.016', b"null", b"{}", b'[["x"]]'])
def test_a_cut_off_answer_may_be_asked_again(venue, street, body):
    street.answers = {"/api/v3/klines": lambda q: (200, body), "/api/v3/exchangeInfo": lambda q: (200, body), "/api/v3/time": lambda q: (200, body),
                      "/api/v3/ticker/bookTicker": lambda q: (200, body)}
    for call in (lambda: venue.bars("BTCUSDT", "1h", 0), venue.instruments, venue.server_time_ms, lambda: venue.quote("BTCUSDT")):
        with pytest.raises(Retry): call()


@pytest.mark.parametrize("row", [["NaN"] * 4, ["-1", "2", "-3", "1"], ["1", "0.5", "0.4", "1"]])
def test_impossible_bars_skip_the_symbol(venue, street, row):
    street.answers = {"/api/v3/klines": lambda q: (200, [[0, *row, "1.0", HOUR - 1]])}
    with pytest.raises(Skip, match="BTCUSDT"): venue.bars("BTCUSDT", "1h", 0)


def test_a_dead_server_is_unreachable():
    with pytest.raises(Unreachable, match="check the network"): CcxtVenue(rest_url="http://127.0.0.1:9", timeout_s=1).server_time_ms()
