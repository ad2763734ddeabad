"Every template runs once, tiny, and its page draws all its figures in a browser that may reach nobody."
import json
import shutil

import pytest

from bnml.core.clock import to_ms
from bnml.data.panel import Panel
from bnml.data.synth import synth_market
from bnml.lab.artifacts import make_run_id
from bnml.lab.vector import backtest_vector
from bnml.ml.options import ModelSettings
from bnml.ml.registry import Registry
from bnml.ml.train import train
from bnml.ops.report import run_report, templates
from bnml.ops.shelf import diff_reports, list_reports
from bnml.trade.rules import Crossover

START, HOURS = to_ms("2025-01-01"), 2000
BROWSER = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
SUBJECTS = {"backtest", "training"}  # what this file makes a subject for


@pytest.fixture(scope="module")
def market() -> dict:
    return synth_market(["BTCUSDT", "ETHUSDT"], "1h", START, START + HOURS * 3_600_000, 7)


def a_backtest(market, **asked):
    "A small vector backtest in the common folder."
    run = backtest_vector(Crossover(5, 20), Panel.from_frames(market, "1h"), **asked)
    params = {"strategy": "rules.crossover", "symbols": sorted(market), "interval": "1h", "engine": "vector", **asked}
    return run.save(None, params | {"run_id": make_run_id(params, "synthetic")})


@pytest.fixture
def subject(market, own_home):
    "Makes the subject of a template."
    def make(template):
        if template == "backtest":
            a_backtest(market)
        if template == "training":
            settings = ModelSettings(horizons=(5,), models=("lgb",), trees=10, depth=3, n_splits=2, min_rows=500, threads=1, feature_limit=10)
            results = train(market, settings, ["BTCUSDT"], "1h", registry=Registry())
            assert not results[0].error
    return make


def look(page_path) -> dict:
    "Open a page in Chromium: what it asked for, what it complained about, what its figures look like."
    from playwright.sync_api import sync_playwright
    asked, errors = [], []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto(page_path.as_uri(), wait_until="load")
        page.wait_for_function("[...document.querySelectorAll('.figure')].every(f => f.querySelector('.main-svg'))", timeout=30_000)
        drawn = page.eval_on_selector_all(".figure", """boxes => boxes.map(b => ({
            area: b.querySelector('.main-svg').getBoundingClientRect().height * b.querySelector('.main-svg').getBoundingClientRect().width,
            marks: b.querySelectorAll('.main-svg path, .main-svg image, .main-svg rect').length}))""")
        code_before = page.locator(".code").first.is_visible()
        page.click("#toggle")
        code_after = page.locator(".code").first.is_visible()
        browser.close()
    return dict(outside=[u for u in asked if not u.startswith(("file:", "data:", "blob:"))], errors=errors, drawn=drawn,
                toggled=(code_before, code_after))


def test_every_template_has_a_subject_here():
    assert SUBJECTS <= set(templates())


@pytest.mark.parametrize("template, figures", [("backtest", 4), ("training", 8)])
def test_report_opens_offline_with_every_figure(template, figures, subject, own_home):
    subject(template)
    report = run_report(template)
    html = report.html.read_text()
    assert html.count('class="figure"') == figures
    assert html.count("plotly.js v") == 1, "plotly.js stands in the page once"
    assert json.loads((report.folder / "metrics.json").read_text())
    assert not any(c["outputs"] for c in json.loads(templates()[template].read_text())["cells"] if c["cell_type"] == "code"), "templates are stored without outputs"
    if not BROWSER:
        pytest.skip("no Chromium to open the page with: apt-get install chromium")
    seen = look(report.html)
    assert seen["outside"] == [] and seen["errors"] == []
    assert len(seen["drawn"]) == figures and all(f["area"] > 10_000 and f["marks"] > 5 for f in seen["drawn"])
    assert seen["toggled"] == (False, True)


def test_the_same_report_twice_and_another_one(market):
    made = []
    first = run_report("backtest", fallback=lambda: {"run_dir": str(made.append(1) or a_backtest(market))})
    assert made == [1] and first.html.exists(), "a run is made where there is none"
    again = run_report("backtest", fallback=lambda: pytest.fail("there is a backtest already"))
    assert first == again and len(list_reports()) == 1
    a_backtest(market, quote_per_trade=100.0)
    other = run_report("backtest")
    assert other.run_id != first.run_id and [r["run_id"] for r in list_reports()] == [other.run_id, first.run_id]
    assert diff_reports(first.run_id, other.run_id)["metrics"]["fees"][2] < 0, "smaller trades pay smaller fees"


def test_a_template_that_refuses_says_why_and_leaves_nothing(own_home):
    from bnml.core.base import BadData
    with pytest.raises(BadData, match="run `bnml backtest` first"):
        run_report("backtest")
    with pytest.raises(BadData, match="run `bnml train` first"):
        run_report("training")
    assert not list((own_home / "reports").glob("*/*"))

